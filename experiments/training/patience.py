"""When to stop early: after `train.patience` evaluations without a better one.

What has been found is read from `metrics.jsonl`, so that a run that goes on knows what an uninterrupted one
knows. The evaluation before the first step does not count: a new head may guess well.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.config import Train
from experiments.progress import read_metrics


def worth(found: Mapping[str, Any]) -> float:
    """By which evaluations are compared: the higher, the better. The first metric of a task that is judged,
    and otherwise the loss.

    >>> worth({"step": 5, "valid_loss": 2.0}), worth({"valid_loss": 2.0, "accuracy": 0.5, "F1": 0.4})
    (-2.0, 0.5)
    """
    metrics = (value for name, value in found.items() if name not in ("step", "valid_loss"))
    return next(metrics, -found["valid_loss"])


def exhausted(worths: Sequence[float], patience: int | None) -> bool:
    """Whether the last `patience` evaluations are no better than the best before them.

    >>> exhausted([0.5, 0.7, 0.6, 0.7], patience=2), exhausted([0.5, 0.7, 0.6], patience=2)
    (True, False)
    """
    if patience is None or len(worths) <= patience:
        return False
    return max(worths[-patience:]) <= max(worths[:-patience])


def worths(directory: Path, step: int) -> list[float]:
    """Of the run's evaluations from its first step up to `step`."""
    lines = read_metrics(directory / "metrics.jsonl")
    return [worth(line) for line in lines if "valid_loss" in line and 0 < line["step"] <= step]


def stopped_early(directory: Path, step: int, train: Train) -> bool:
    """Whether the run in `directory`, which is at `step`, has stopped by itself."""
    return exhausted(worths(directory, step), train.patience)
