"""NIST-5 of a corpus (Doddington, 2002) as the E2E scorer's `-p` mode computes it.

    info(w_1..w_n) = log2(count(w_1..w_{n-1}) / count(w_1..w_n)), counted over all references
    NIST = sum over n of (info of the n-grams that match / number of n-grams) * exp(-beta * ln(min(1, c/r))^2)

c is the length of the hypotheses and r the sum of each input's mean reference length; beta makes the penalty
1/2 at c = 2r/3. An n-gram counts at most as often as in the one reference that has most of it, which is where
this differs from the Perl script for inputs with different numbers of references.
"""

import math
from collections import Counter
from collections.abc import Sequence

from experiments.metrics.ngrams import Counts, each_ngram, matches, Tokens


ORDER = 5
_BETA = math.log(2) / math.log(1.5) ** 2


def score(references: Sequence[Sequence[Tokens]], hypotheses: Sequence[Tokens]) -> float:
    """
    >>> round(score([["the cat sat on the mat".split()]], ["the cat sat on a mat".split()]), 6)
    2.187469
    """
    known: Counts = Counter({(): sum(len(reference) for group in references for reference in group)})
    information = 0.0
    for n in range(1, ORDER + 1):
        for group in references:
            for reference in group:
                known.update(each_ngram(reference, n))
        gained = 0.0
        for group, hypothesis in zip(references, hypotheses, strict=True):
            for ngram, hits in matches(hypothesis, group, n).items():
                gained += hits * math.log2(known[ngram[:-1]] / known[ngram])
        # A hypothesis shorter than n counts negative, as in the official scorer, which divides by zero where
        # this gives nothing.
        total = sum(len(hypothesis) - n + 1 for hypothesis in hypotheses)
        information += gained / total if total else 0.0
    expected = sum(sum(map(len, group)) / len(group) for group in references)
    ratio = sum(map(len, hypotheses)) / expected
    return information * math.exp(-_BETA * math.log(min(1.0, ratio)) ** 2)
