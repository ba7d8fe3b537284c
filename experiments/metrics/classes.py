"""What predicted labels and numbers are worth: accuracy, F1, Matthews' correlation, Pearson's and Spearman's.

Plain Python, so that `score` needs no package. Each takes the references first. A correlation with a constant
is 0, as scikit-learn has Matthews'; SciPy has none of the other two.
"""

import math
from collections.abc import Callable, Sequence


def accuracy(references: Sequence[str], predictions: Sequence[str]) -> float:
    """
    >>> accuracy(["yes", "no"], ["yes", "yes"])
    0.5
    """
    same = [one == other for one, other in zip(references, predictions, strict=True)]
    return sum(same) / len(same)


def f1(references: Sequence[str], predictions: Sequence[str], positive: str = "1") -> float:
    """Of one label: the harmonic mean of precision and recall, and 0 where it is neither predicted nor there.

    >>> f1(["1", "1", "0"], ["1", "0", "0"])
    0.6666666666666666
    """
    both = list(zip(references, predictions, strict=True))
    found = both.count((positive, positive))
    each = sum((one == positive) + (other == positive) for one, other in both)
    return 2 * found / each if each else 0.0


def macro_f1(references: Sequence[str], predictions: Sequence[str]) -> float:
    """The plain mean of the F1 of every label that is there or predicted."""
    labels = sorted({*references, *predictions})
    return sum(f1(references, predictions, label) for label in labels) / len(labels)


def matthews(references: Sequence[str], predictions: Sequence[str]) -> float:
    """Matthews' correlation of two labels, or of more (Gorodkin 2004).

    >>> matthews(["1", "0", "1"], ["1", "0", "1"])
    1.0
    """
    labels = sorted({*references, *predictions})
    one_hot = lambda values: [[float(value == label) for value in values] for label in labels]
    pairs = list(zip(one_hot(references), one_hot(predictions), strict=True))
    together = sum(_covariance(one, other) for one, other in pairs)
    spread = sum(_covariance(one, one) for one, _ in pairs) * sum(
        _covariance(other, other) for _, other in pairs
    )
    return together / math.sqrt(spread) if spread > 0 else 0.0


def pearson(references: Sequence[float], predictions: Sequence[float]) -> float:
    spread = _covariance(references, references) * _covariance(predictions, predictions)
    return _covariance(references, predictions) / math.sqrt(spread) if spread > 0 else 0.0


def spearman(references: Sequence[float], predictions: Sequence[float]) -> float:
    """Pearson's of the ranks; equal numbers share the mean of theirs."""
    return pearson(_ranks(references), _ranks(predictions))


def _covariance(one: Sequence[float], other: Sequence[float]) -> float:
    mean, other_mean = math.fsum(one) / len(one), math.fsum(other) / len(other)
    return math.fsum((x - mean) * (y - other_mean) for x, y in zip(one, other, strict=True))


def _ranks(values: Sequence[float]) -> list[float]:
    """
    >>> _ranks([3.0, 1.0, 3.0])
    [1.5, 0.0, 1.5]
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks, start = [0.0] * len(values), 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for place in order[start:end]:
            ranks[place] = (start + end - 1) / 2
        start = end
    return ranks


def answers_f1(references: Sequence[str], predictions: Sequence[str]) -> float:
    """F1 of the answers of all questions, each of which is 1, right, or 0: MultiRC's F1a.

    >>> answers_f1(["1 0 1", "0 1"], ["1 0 0", "0 1"])
    0.8

    Raises:
      ValueError: a question has labels for another number of answers.
    """
    both = [(one.split(), other.split()) for one, other in zip(references, predictions, strict=True)]
    for number, (one, other) in enumerate(both, 1):
        if len(one) != len(other):
            raise ValueError(
                f"prediction {number} has {len(other)} labels, and question {number} has {len(one)} answers: "
                "a line has a 1 or a 0 for each, such as `1 0 1`."
            )
    return f1(*([label for pair in both for label in pair[side]] for side in (0, 1)))


METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "accuracy": accuracy,
    "F1": f1,
    "macro F1": macro_f1,
    "Matthews": matthews,
    "F1a": answers_f1,
    "EM": accuracy,
}
"""Of labels, by the names that reports have."""

CORRELATIONS: dict[str, Callable[[Sequence[float], Sequence[float]], float]] = {
    "Pearson": pearson,
    "Spearman": spearman,
}
"""Of numbers."""


def of(
    names: Sequence[str], references: Sequence[str], predictions: Sequence[str]
) -> dict[str, float | None]:
    """The named metrics of labels, or of numbers as text.

    Raises:
      ValueError: nothing to score; a correlation is asked for, and a text is no number.
    """
    if not references:
        raise ValueError("there is nothing to score: no references.")
    if not any(name in CORRELATIONS for name in names):
        return {name: METRICS[name](references, predictions) for name in names}
    numbers = [
        _numbers(texts, kind) for texts, kind in ((references, "reference"), (predictions, "prediction"))
    ]
    return {name: CORRELATIONS[name](*numbers) for name in names}


def _numbers(texts: Sequence[str], kind: str) -> list[float]:
    found = []
    for number, text in enumerate(texts, 1):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"{kind} {number} is {text!r}, and must be a number.")
        found.append(value)
    return found
