"""What adapters are compared by: the first metric of a task that is judged, and otherwise the validation
loss.

A task of labels is judged by its metric, as it is where papers print it. The loss of a classifier may grow
while it gets better.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.training.patience import worth


LOSS = "validation loss"


def evaluations(metrics: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines of a sweep's log that hold an evaluation."""
    return [line for line in metrics if "valid_loss" in line]


def of_adapter(line: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What an evaluation found of one adapter, without those that are not finite.

    >>> of_adapter({"step": 5, "valid_loss": {"a": 2.0, "b": 1.0}, "F1": {"a": 0.5, "b": None}}, "b")
    {'valid_loss': 1.0}
    """
    own = {key: value.get(name) for key, value in line.items() if isinstance(value, Mapping)}
    return {key: value for key, value in own.items() if value is not None}


def metric_of(line: Mapping[str, Any]) -> str | None:
    """The metric of an evaluation that adapters are compared by; None: by the loss.

    >>> metric_of({"step": 5, "valid_loss": {"a": 2.0}, "F1": {"a": 0.5}, "accuracy": {"a": 0.4}})
    'F1'
    """
    return next((key for key in line if key not in ("step", "valid_loss")), None)


def cost(found: Mapping[str, Any]) -> float | None:
    """The lower, the better: of what an evaluation found of one adapter. None: nothing finite.

    >>> cost({"valid_loss": 2.0}), cost({"valid_loss": 2.0, "F1": 0.5}), cost({})
    (2.0, -0.5, None)
    """
    return -worth(found) if "valid_loss" in found else None


def by(metric: str | None) -> Any:
    """The key that sorts the lines of a sweep's table, the best first."""
    return lambda line: line["mean"] if metric is None else -line["mean"]
