"""What the sets of GLUE and of SuperGLUE share: their section of a config, where their files are, and that
the validation set is scored, which is labelled and public, and the test set predicted where `submit` says so.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.checks import at_least
from experiments.tasks import classes
from experiments.tasks.classes import Contents


@dataclass(frozen=True)
class BenchmarkData:
    """`directory` has the sets in directories of their official names (`CoLA/train.tsv`, `CB/train.jsonl`),
    or the files of this one. `dataset`: a directory or a name on the hub for `datasets` instead, such as
    "nyu-mll/glue". `submit`: predict the test set too. `class_weights`: of the labels in the loss, in their
    order, or "balanced". `max_rows`, `max_valid_rows`: the first so many, of questions where a set has
    questions with several candidates."""

    task: str
    directory: str
    dataset: str | None = None
    seq_len: int = 128
    submit: bool = False
    class_weights: tuple[float, ...] | Literal["balanced"] | None = None
    max_rows: int | None = None
    max_valid_rows: int | None = None

    def __post_init__(self):
        at_least(1, "data", self, "seq_len", "max_rows", "max_valid_rows")


def file_of(section: BenchmarkData, directory: Path, benchmark: str, official: str, name: str) -> Path:
    """The file `name` of the set that is called `official`."""
    place = directory / section.directory
    path = (place / official if (place / official).is_dir() else place) / name
    if not path.is_file():
        raise FileNotFoundError(
            f"no file `{path}`. `data.directory` names the directory of {official}, or of all sets of "
            f"{benchmark}."
        )
    return path


def contents(
    section: BenchmarkData,
    labels: tuple[str, ...],
    rows_of: Callable[[str, str | None], tuple[list[Any], Any]],
    valid: Mapping[str | None, str],
    test: Mapping[str, str],
    checked: Callable[..., list[Any]] = classes.checked,
) -> Contents:
    """The rows of the splits. `rows_of(split, part)` gives a split's and the name of its file; `valid`: the
    splits of the validation set by their part; `test`: those of the test set by the name of their
    submission.
    """
    train, name = rows_of("train", None)
    splits = {"train": checked(train[: section.max_rows], labels, name, trains=True), "valid": []}
    for part, split in valid.items():
        rows, name = rows_of(split, part)
        splits["valid"] += checked(rows, labels, name)
    further = {name: rows_of(split, None)[0] for name, split in test.items()} if section.submit else {}
    return Contents(labels, splits, further)
