"""The user's own rows: one text or two, and a label (`classification`) or a number (`regression`), from a
table or JSON lines whose columns the config names.

The labels are those of the training file in the order of the alphabet, unless `data.labels` names them.
Labels stay words: 1 and "1" are one label.
"""

import csv
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.checks import at_least
from experiments.tasks import classes, json_lines
from experiments.tasks.classes import Contents, Row, SCORE
from experiments.tasks.losses import of_classes
from experiments.tasks.task import Task


METRICS = {"classification": ("accuracy", "macro F1", "Matthews"), "regression": ("Pearson", "Spearman")}


@dataclass(frozen=True)
class ClassificationData:
    """Files `.csv` or `.tsv` with a line of names, or `.jsonl` with an object a line. `text`, `pair` and
    `label`: the columns; without `pair` there is one text. `test`: labelled rows that are predicted and
    scored at the end, in place of `valid`; `predict`: rows that are predicted only. `metric`: by which the
    best checkpoint is chosen; null: accuracy, or Pearson's correlation. `class_weights`: of the labels in the
    loss, in their order, or "balanced"."""

    task: Literal["classification", "regression"]
    train: str
    valid: str
    test: str | None = None
    predict: str | None = None
    text: str = "text"
    pair: str | None = None
    label: str = "label"
    labels: tuple[str, ...] | None = None
    metric: Literal["accuracy", "macro F1", "Matthews", "Pearson", "Spearman"] | None = None
    seq_len: int = 128
    class_weights: tuple[float, ...] | Literal["balanced"] | None = None
    max_rows: int | None = None
    max_valid_rows: int | None = None

    def __post_init__(self):
        at_least(1, "data", self, "seq_len", "max_rows", "max_valid_rows")
        if self.metric is not None and self.metric not in METRICS[self.task]:
            raise ValueError(
                f"`data.metric` is {self.metric!r}, and {self.task} has {', '.join(METRICS[self.task])}."
            )
        if self.labels is not None and (self.task == "regression" or len(set(self.labels)) < 2):
            raise ValueError(
                "`data.labels` are two or more classes: leave them out of a regression, and of labels that "
                "the training file has."
            )


def read(section: ClassificationData, directory: Path) -> Contents:
    """The rows of each split, before any tokenizer: what can be wrong with the files is found here."""

    def rows_of(name: str, labelled: bool = True) -> list[Row]:
        return list(_rows(directory / name, section, labelled))

    train = rows_of(section.train)[: section.max_rows]
    labels = SCORE if section.task == "regression" else section.labels
    if labels is None:
        labels = tuple(sorted({row.label or "" for row in train}))
        if len(labels) == 1:
            raise ValueError(
                f"`{directory / section.train}` has the one label {labels[0]!r}: a head needs two to tell "
                "apart."
            )
    rows = {"train": classes.checked(train, labels, directory / section.train, trains=True)}
    for split, name in (("valid", section.valid), ("test", section.test)):
        if name is not None:
            rows[split] = classes.checked(rows_of(name), labels, directory / name)
    further = {}
    if section.predict is not None:
        further = {Path(section.predict).stem: rows_of(section.predict, labelled=False)}
    return Contents(labels, rows, further)


def _rows(path: Path, section: ClassificationData, labelled: bool) -> Iterator[Row]:
    """The rows of a file. Errors name the file and the row."""
    if not path.is_file():
        raise FileNotFoundError(f"no data file `{path}`.")
    readers = {".csv": _of_table, ".tsv": _of_table, ".jsonl": _of_lines}
    if path.suffix not in readers:
        raise ValueError(f"`{path}` is none of {', '.join(readers)}.")
    wanted = {"text": section.text, "pair": section.pair, "label": section.label if labelled else None}
    columns = {key: column for key, column in wanted.items() if column is not None}
    count = 0
    try:
        for number, row in readers[path.suffix](path, columns):
            cells = {
                key: _cell(row[column], f"`{path}` row {number}", column) for key, column in columns.items()
            }
            yield Row(cells["text"], cells.get("pair"), cells.get("label"), number, str(count))
            count += 1
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"`{path}` cannot be read: {error}") from error
    if not count:
        raise ValueError(f"`{path}` is empty: it has no row with a text.")


def _cell(value: Any, place: str, column: str) -> str:
    if value is None or isinstance(value, list | dict):
        raise ValueError(f"{place}: `{column}` is {json.dumps(value)}, and must be a text or a number.")
    return value if isinstance(value, str) else json.dumps(value)


def _of_table(path: Path, columns: dict[str, str]) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as handle:
        table = csv.reader(handle, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        names = next(table, [])
        _check_columns(names, columns, f"`{path}`")
        for cells in table:
            if not cells:
                continue
            if len(cells) != len(names):
                raise ValueError(
                    f"`{path}` row {table.line_num} has {len(cells)} columns, and must have {len(names)}: "
                    f"{', '.join(names)}."
                )
            yield table.line_num, dict(zip(names, cells, strict=True))


def _of_lines(path: Path, columns: dict[str, str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, row in json_lines.read(path):
        _check_columns(list(row), columns, f"`{path}` row {number}")
        yield number, row


def _check_columns(names: Sequence[str], columns: dict[str, str], place: str) -> None:
    for key, column in columns.items():
        if column not in names:
            raise ValueError(
                f"{place} has the columns {', '.join(names) or 'none'}, and `data.{key}` is {column!r}: name "
                "one of them."
            )


def judge(section: ClassificationData, outputs: Any, examples: Any, rows: Any) -> dict[str, float]:
    """The metrics in validation, that of `section.metric` first."""
    names = METRICS[section.task]
    found = classes.judge(functools.partial(classes.score, names), section, outputs, examples, rows)
    first = section.metric or names[0]
    return {first: found[first], **found}


def _task(name: str) -> Task:
    return Task(
        section=ClassificationData,
        named=name,
        read=read,
        prepare=classes.prepare,
        loss=of_classes,
        predictor=classes.predictor,
        score=functools.partial(classes.score, METRICS[name]),
        percentages=METRICS[name],
        packs=False,
        labels=classes.labels_of,
        head_bias=classes.mean_score if name == "regression" else None,
        judge=judge,
        files=classes.files,
    )


TASKS = tuple(map(_task, METRICS))
