"""CIDEr-D (Vedantam et al., 2015) as the caption evaluation of MS COCO computes it, on Penn Treebank tokens.

    g(text)[w] = count of w in text * (ln(inputs) - ln(max(1, inputs with w in a reference))) CIDEr = 10 *
    mean over n = 1..4 and references of min(g(h), g(r)) . g(r) / (|g(h)| |g(r)|) * exp(-(l_h - l_r)^2 / (2
    sigma^2))

sigma = 6, l is a length in words. Document frequencies come from these references, so that the score of an
input depends on all the others, and one input alone scores zero.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from experiments.metrics.ngrams import Counts, ngrams, Tokens


ORDER = 4
_SIGMA = 6.0


class _Vector(NamedTuple):
    """The weights of the n-grams of each order, their norms, and the number of words."""

    weights: list[dict[tuple[str, ...], float]]
    norms: list[float]
    length: int


def score(references: Sequence[Sequence[Tokens]], hypotheses: Sequence[Tokens]) -> float:
    """
    >>> references = [["a cheap pub".split()], ["a nice hotel".split()]]
    >>> round(score(references, ["a cheap pub".split(), "a bad hotel".split()]), 6)
    4.375
    """
    counted = [[_count(reference) for reference in group] for group in references]
    inputs_with: Counts = Counter()
    for group in counted:
        inputs_with.update({ngram for orders in group for counts in orders for ngram in counts})
    rarity = {ngram: math.log(len(counted) / inputs) for ngram, inputs in inputs_with.items()}
    unseen = math.log(len(counted))

    total = 0.0
    for group, hypothesis in zip(counted, hypotheses, strict=True):
        vector = _vector(_count(hypothesis), rarity, unseen)
        total += sum(_similarity(vector, _vector(reference, rarity, unseen)) for reference in group) / len(
            group
        )
    return 10 * total / len(counted)


def _count(tokens: Tokens) -> list[Counts]:
    # The implementation splits a text again, at any blank: a token such as `1 1/2`, with a no-break space, is
    # two here.
    words = " ".join(tokens).split()
    return [ngrams(words, n) for n in range(1, ORDER + 1)]


def _vector(orders: list[Counts], rarity: dict[tuple[str, ...], float], unseen: float) -> _Vector:
    weights = [
        {ngram: count * rarity.get(ngram, unseen) for ngram, count in counts.items()} for counts in orders
    ]
    norms = [math.sqrt(sum(weight * weight for weight in order.values())) for order in weights]
    return _Vector(weights, norms, orders[0].total())


def _similarity(hypothesis: _Vector, reference: _Vector) -> float:
    """The mean over the orders of the clipped cosine, less for different lengths."""
    total = 0.0
    for ours, theirs, our_norm, their_norm in zip(
        hypothesis.weights, reference.weights, hypothesis.norms, reference.norms, strict=True
    ):
        if our_norm and their_norm:
            total += sum(
                min(ours[ngram], theirs[ngram]) * theirs[ngram] for ngram in ours.keys() & theirs.keys()
            ) / (our_norm * their_norm)
    return total / ORDER * math.exp(-((hypothesis.length - reference.length) ** 2) / (2 * _SIGMA**2))
