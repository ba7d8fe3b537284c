"""GLUE, nine tasks of sentences (Wang et al. 2018), each by its own name: `glue/cola`, `glue/mrpc`, ...

The files are the benchmark's own, read by the names of their columns. Labels are written as there. The
validation set is labelled and public: it is what is scored, and what papers give. `submit` has the test sets
predicted too, into the files that the benchmark's site takes.

The metrics are the benchmark's; the best checkpoint is chosen by the first of a task. MNLI's validation set
has two parts, `matched` and `mismatched`. QQP's official file has a few lines that are cut off: rows with
too few columns are left out there, as in the benchmark's own code, and refused everywhere else.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from experiments.checks import at_least
from experiments.tasks import classes
from experiments.tasks.classes import Contents, Row, SCORE
from experiments.tasks.losses import of_classes
from experiments.tasks.splits import Splits
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
class GLUEData:
    """`directory` has the sets in directories of their official names (`CoLA/train.tsv`), or the files of
    this one. `dataset`: a directory or a name on the hub for `datasets` instead, such as "nyu-mll/glue".
    `submit`: predict the test set too. `class_weights`: of the labels in the loss, in their order, or
    "balanced"."""

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
    dataset: str | None = None
    seq_len: int = 128
    submit: bool = False
    class_weights: tuple[float, ...] | Literal["balanced"] | None = None
    max_rows: int | None = None
    max_valid_rows: int | None = None

    def __post_init__(self):
        at_least(1, "data", self, "seq_len", "max_rows", "max_valid_rows")


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
    train, name = rows_of("train", None)
    splits = {"train": classes.checked(train[: section.max_rows], found.labels, name, trains=True)}
    splits["valid"] = []
    for part, split in found.valid.items():
        rows, name = rows_of(split, part)
        splits["valid"] += classes.checked(rows, found.labels, name)
    further = {}
    if section.submit:
        further = {found.directory + suffix: rows_of(split, None)[0] for suffix, split in found.test.items()}
    return Contents(found.labels, splits, further)


def _of_files(
    section: GLUEData, found: GLUESet, directory: Path, split: str, part: str | None
) -> tuple[list[Row], Path]:
    place = directory / section.directory
    official = place / found.directory
    path = (official if official.is_dir() else place) / f"{split}.tsv"
    if not path.is_file():
        raise FileNotFoundError(
            f"no file `{path}`. `data.directory` names the directory of {found.directory}, or of all sets of "
            "GLUE."
        )
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
    import datasets

    config, name = section.task.removeprefix("glue/"), split.replace("dev", "validation")
    assert section.dataset is not None  # as the caller has seen
    local = directory / section.dataset
    if (local / "dataset_dict.json").is_file():
        loaded: Any = datasets.load_from_disk(str(local))
    elif local.exists():
        loaded = datasets.load_dataset(str(local))
    else:
        loaded = datasets.load_dataset(section.dataset, config)
    if name not in loaded:
        raise ValueError(
            f"the data set `{section.dataset}` has the splits {', '.join(loaded)}, not `{name}`."
        )
    table = loaded[name]
    missing = [column for column in (*found.hub, "label") if column not in table.column_names]
    if missing:
        raise ValueError(
            f"`{section.dataset}:{name}` has the columns {', '.join(table.column_names)}; "
            f"{found.directory} has {', '.join((*found.hub, 'label'))}."
        )
    texts = [list(table[column]) for column in found.hub]
    rows = []
    for number, label in enumerate(table["label"], 1):
        words = None if name.startswith("test") else _word(label, found.labels)
        first, second = (*(text[number - 1] for text in texts), None)[:2]
        rows.append(Row(first, second, words, number, str(number - 1), part))
    return rows, f"{section.dataset}:{name}"


def _word(label: Any, labels: tuple[str, ...]) -> str:
    if labels == SCORE:
        return str(label)
    return labels[label] if isinstance(label, int) and 0 <= label < len(labels) else str(label)


def files(classifier: Any, splits: Splits, params: Any) -> dict[str, str]:
    """The predictions with their probabilities, and for each test set the file that the benchmark's site
    takes, in `submission/`.
    """
    found = {"probabilities.tsv": classes.table(classifier, classifier.prompts, params)[1]}
    for name, inputs in splits.further.items():
        texts, found[f"further/{name}.tsv"] = classes.table(classifier, inputs, params)
        if classifier.labels == SCORE:
            texts = [f"{min(max(float(text), 0.0), 5.0):.3f}" for text in texts]
        lines = ["index\tprediction", *(f"{number}\t{text}" for number, text in enumerate(texts))]
        found[f"submission/{name}.tsv"] = "\n".join(lines) + "\n"
    return found


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
        judge=functools.partial(classes.judge, own),
        files=files,
    )


TASKS = tuple(_task(name, found) for name, found in SETS.items())
