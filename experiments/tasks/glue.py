"""GLUE, nine tasks of sentences (Wang et al. 2018), each by its own name: `glue/cola`, `glue/mrpc`, ...

The files are the benchmark's own, read by the names of their columns. Labels are written as there. The
validation set is labelled and public: it is what is scored, and what papers give. `submit` has the test sets
predicted too, into the files that the benchmark's site takes.

The metrics are the benchmark's; the best checkpoint is chosen by the first of a task. MNLI's validation set
has two parts, `matched` and `mismatched`. QQP's official file has a few lines that are cut off: rows with
too few columns are left out there, as in the benchmark's own code, and refused everywhere else.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from experiments.tasks import benchmark, classes, hub
from experiments.tasks.benchmark import BenchmarkData
from experiments.tasks.classes import Contents, Row, SCORE
from experiments.tasks.losses import of_classes
from experiments.tasks.task import Task


class GLUESet(NamedTuple):
    """One of the nine. `texts` and `label`: columns of the official files; `hub`: the texts' columns in
    `datasets`. `valid`, `test`: the splits by their part and file. `labels`: in the order of `datasets`.
    `bare`: the columns of a file without a line of names."""

    directory: str
    texts: tuple[str, ...]
    label: str
    hub: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    valid: Mapping[str | None, str] = {None: "dev"}
    test: Mapping[str, str] = {"": "test"}
    bare: tuple[str, ...] = ()
    cut_rows: bool = False


_PAIR = ("sentence1", "sentence2")
_YES = ("0", "1")
_ENTAILED = ("entailment", "not_entailment")
SETS = {
    "cola": GLUESet(
        "CoLA",
        ("sentence",),
        "label",
        ("sentence",),
        _YES,
        ("Matthews", "accuracy"),
        bare=("source", "label", "mark", "sentence"),
    ),
    "sst2": GLUESet("SST-2", ("sentence",), "label", ("sentence",), _YES),
    "mrpc": GLUESet("MRPC", ("#1 String", "#2 String"), "Quality", _PAIR, _YES, ("accuracy", "F1")),
    "stsb": GLUESet("STS-B", _PAIR, "score", _PAIR, SCORE, ("Pearson", "Spearman")),
    "qqp": GLUESet(
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        ("question1", "question2"),
        _YES,
        ("accuracy", "F1"),
        cut_rows=True,
    ),
    "mnli": GLUESet(
        "MNLI",
        _PAIR,
        "gold_label",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        valid={"matched": "dev_matched", "mismatched": "dev_mismatched"},
        test={"-m": "test_matched", "-mm": "test_mismatched"},
    ),
    "qnli": GLUESet("QNLI", ("question", "sentence"), "label", ("question", "sentence"), _ENTAILED),
    "rte": GLUESet("RTE", _PAIR, "label", _PAIR, _ENTAILED),
    "wnli": GLUESet("WNLI", _PAIR, "label", _PAIR, _YES),
}
# MNLI's published validation sets.
_MATCHED, _MISMATCHED = 9815, 9832


@dataclass(frozen=True)
class GLUEData(BenchmarkData):
    """`BenchmarkData`, of nine sets."""

    task: Literal[
        "glue/cola",
        "glue/sst2",
        "glue/mrpc",
        "glue/stsb",
        "glue/qqp",
        "glue/mnli",
        "glue/qnli",
        "glue/rte",
        "glue/wnli",
    ]
    directory: str = "glue"


def set_of(section: GLUEData) -> GLUESet:
    return SETS[section.task.removeprefix("glue/")]


def read(section: GLUEData, directory: Path) -> Contents:
    """The rows of each split, before any tokenizer: what can be wrong with the files is found here."""
    found = set_of(section)
    rows_of = (
        functools.partial(_of_datasets, section, found, directory)
        if section.dataset is not None
        else functools.partial(_of_files, section, found, directory)
    )
    submitted = {found.directory + suffix: split for suffix, split in found.test.items()}
    return benchmark.contents(section, found.labels, rows_of, found.valid, submitted)


def _of_files(
    section: GLUEData, found: GLUESet, directory: Path, split: str, part: str | None
) -> tuple[list[Row], Path]:
    path = benchmark.file_of(section, directory, "GLUE", found.directory, f"{split}.tsv")
    return list(_rows(path, found, split.startswith("test"), part)), path


def _rows(path: Path, found: GLUESet, unlabelled: bool, part: str | None) -> Iterator[Row]:
    """The rows of a table without quotes, whose first line has the names of its columns, or `bare` has."""
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"`{path}` is not UTF-8: {error}") from error
    lines = [line.removesuffix("\r") for line in lines]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise ValueError(f"`{path}` is empty.")
    named = unlabelled or not found.bare
    columns = lines[0].split("\t") if named else list(found.bare)
    texts = found.hub if unlabelled and found.bare else found.texts
    wanted = [*texts, *([] if unlabelled else [found.label])]
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise ValueError(
            f"`{path}` has the columns {', '.join(columns)}; {found.directory} has {', '.join(wanted)}. "
            "Name the directory of this set in `data.directory`."
        )
    for number, line in enumerate(lines[named:], 1 + named):
        cells = line.split("\t")
        if len(cells) < len(columns) and found.cut_rows:
            continue
        if len(cells) != len(columns):
            raise ValueError(
                f"`{path}` row {number} has {len(cells)} columns, and must have {len(columns)}: "
                f"{', '.join(columns)}."
            )
        row = dict(zip(columns, cells, strict=True))
        first, second = (*(row[name] for name in texts), None)[:2]
        label = None if unlabelled else row[found.label]
        yield Row(
            first, second, label, number, row.get("index", row.get("id", str(number - 1 - named))), part
        )


def _of_datasets(
    section: GLUEData, found: GLUESet, directory: Path, split: str, part: str | None
) -> tuple[list[Row], str]:
    config, name = section.task.removeprefix("glue/"), split.replace("dev", "validation")
    assert section.dataset is not None  # as the caller has seen
    table = hub.split_of(section.dataset, directory, name, config)
    missing = [column for column in (*found.hub, "label") if column not in table.column_names]
    if missing:
        raise ValueError(
            f"`{section.dataset}:{name}` has the columns {', '.join(table.column_names)}; "
            f"{found.directory} has {', '.join((*found.hub, 'label'))}."
        )
    texts = [list(table[column]) for column in found.hub]
    rows = []
    for number, label in enumerate(table["label"], 1):
        words = None if name.startswith("test") else classes.word(label, found.labels)
        first, second = (*(text[number - 1] for text in texts), None)[:2]
        rows.append(Row(first, second, words, number, str(number - 1), part))
    return rows, f"{section.dataset}:{name}"


def _submission(name: str, labels: Sequence[str], inputs: Any, texts: Sequence[str]) -> dict[str, str]:
    """The file that the benchmark's site takes."""
    if labels == SCORE:
        texts = [f"{min(max(float(text), 0.0), 5.0):.3f}" for text in texts]
    lines = ["index\tprediction", *(f"{number}\t{text}" for number, text in enumerate(texts))]
    return {f"{name}.tsv": "\n".join(lines) + "\n"}


def _task(name: str, found: GLUESet) -> Task:
    own = functools.partial(classes.score, found.metrics)
    parts = {"matched": range(_MATCHED), "mismatched": range(_MATCHED, _MATCHED + _MISMATCHED)}
    return Task(
        section=GLUEData,
        named=f"glue/{name}",
        read=read,
        prepare=classes.prepare,
        loss=of_classes,
        predictor=classes.predictor,
        score=own,
        percentages=found.metrics,
        parts=parts if name == "mnli" else {},
        packs=False,
        labels=classes.labels_of,
        head_bias=classes.mean_score if found.labels == SCORE else None,
        judge=functools.partial(classes.judge, own),
        files=functools.partial(classes.files, submission=_submission),
    )


TASKS = tuple(_task(name, found) for name, found in SETS.items())
