"""BLEU-4 of a corpus (Papineni et al., 2002) as Moses' `multi-bleu.perl` computes it, with which WebNLG and
DART are scored.

    BLEU = exp(min(0, 1 - r/c)) * (p_1 p_2 p_3 p_4)^(1/4)

As in `bleu`, c is the length of all hypotheses, and r that of the references nearest to each in length (of
two equally near, the shorter). It differs where there is little: a precision of zero makes BLEU zero, and a
hypothesis shorter than n has no n-grams. An empty line of a reference file is a reference without tokens,
which is nearest to a very short hypothesis.
"""

import math
from collections.abc import Sequence

from experiments.metrics.bleu import ORDER
from experiments.metrics.ngrams import matches, Tokens


def score(references: Sequence[Sequence[Tokens]], hypotheses: Sequence[Tokens]) -> float:
    """
    >>> round(score([["the cat sat on the mat".split()]], ["the cat sat on a mat".split()]), 6)
    0.537285
    >>> score([["the cat sat on the mat".split()]], ["the cat".split()])
    0.0
    """
    pairs = list(zip(references, hypotheses, strict=True))
    length = sum(map(len, hypotheses))
    nearest = sum(
        min((abs(len(reference) - len(hypothesis)), len(reference)) for reference in group)[1]
        for group, hypothesis in pairs
    )
    log_precision = 0.0
    for n in range(1, ORDER + 1):
        hits = sum(matches(hypothesis, group, n).total() for group, hypothesis in pairs)
        if not hits or not nearest:
            return 0.0
        total = sum(max(len(hypothesis) - n + 1, 0) for hypothesis in hypotheses)
        log_precision += math.log(hits / total) / ORDER
    return math.exp(min(0.0, 1 - nearest / length) + log_precision)
