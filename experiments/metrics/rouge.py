"""ROUGE-L (Lin, 2004) as the caption evaluation of MS COCO computes it, on Penn Treebank tokens.

    P = max over references of lcs/len(hypothesis), R = max over references of lcs/len(reference)
    F = (1 + beta^2) P R / (R + beta^2 P), beta = 1.2, averaged over the inputs

lcs is the length of the longest common subsequence. P and R may come from different references.
"""

from collections.abc import Sequence

from experiments.metrics.ngrams import Tokens


_BETA = 1.2


def score(references: Sequence[Sequence[Tokens]], hypotheses: Sequence[Tokens]) -> float:
    """
    >>> round(score([["the cat sat on the mat".split(), ["cat"]]], ["the cat".split()]), 6)
    1.0
    """
    scores = [_of_input(group, hypothesis) for group, hypothesis in zip(references, hypotheses, strict=True)]
    return sum(scores) / len(scores)


def _of_input(references: Sequence[Tokens], hypothesis: Tokens) -> float:
    # A text without tokens has one, the empty one: two such texts are equal, and nothing divides by zero.
    hypothesis = hypothesis or [""]
    pairs = [(_lcs(hypothesis, reference or [""]), len(reference or [""])) for reference in references]
    precision = max(common for common, _ in pairs) / len(hypothesis)
    recall = max(common / length for common, length in pairs)
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _lcs(first: Tokens, second: Tokens) -> int:
    """The length of the longest common subsequence, one row of the table in the bits of one integer (Hyyrö,
    2004).

    A zero bit is a place where the table's row steps up by one.
    """
    places: dict[str, int] = {}
    for place, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << place
    full = row = (1 << len(first)) - 1
    for token in second:
        same = row & places.get(token, 0)
        row = (row + same | row - same) & full
    return len(first) - row.bit_count()
