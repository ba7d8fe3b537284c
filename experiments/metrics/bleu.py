"""BLEU-4 of a corpus (Papineni et al., 2002) as the E2E scorer's `-p` mode computes it.

    BLEU = exp(min(0, 1 - r/c)) * (p_1 p_2 p_3 p_4)^(1/4)

c is the length of all hypotheses, r that of the references nearest to each in length (of two equally near,
the shorter), and p_n the part of the hypotheses' n-grams that a reference has. Where no n-gram matches, p_n
is a tiny number instead of zero. Left out: smoothing for single sentences.
"""

import math
from collections.abc import Sequence

from experiments.metrics.ngrams import matches, Tokens


ORDER = 4
_TINY, _SMALL = 1e-15, 1e-9


def score(references: Sequence[Sequence[Tokens]], hypotheses: Sequence[Tokens]) -> float:
    """
    >>> round(score([["the cat sat on the mat".split()]], ["the cat sat on a mat".split()]), 6)
    0.537285
    """
    length = sum(map(len, hypotheses))
    nearest = sum(
        min((abs(len(reference) - len(hypothesis)), len(reference)) for reference in group)[1]
        for group, hypothesis in zip(references, hypotheses, strict=True)
    )
    log_precision = 0.0
    for n in range(1, ORDER + 1):
        hits = sum(
            matches(hypothesis, group, n).total()
            for group, hypothesis in zip(references, hypotheses, strict=True)
        )
        # A hypothesis shorter than n counts negative, as in the official scorer, not zero.
        total = sum(len(hypothesis) - n + 1 for hypothesis in hypotheses)
        log_precision += math.log(max(hits, _TINY) / max(total, _SMALL)) / ORDER
    return math.exp(min(0.0, 1 - nearest / length) + log_precision)
