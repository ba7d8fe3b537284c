"""SuperGLUE, eight tasks (Wang et al. 2019), each by its own name: `superglue/boolq`, `superglue/cb`, ...

The files are the benchmark's own JSON lines. Labels are words as there, `true` and `false` among them, and a
question of MultiRC has one line, a 1 or a 0 for each of its answers. `submit` has the test sets predicted
too, into the files that the benchmark's site takes.

The metrics are the benchmark's; the best checkpoint is chosen by the first of a task. Candidates are scored
as by the benchmark's own baseline, each in a pair with its text: COPA's two are compared by a softmax over
both, those of MultiRC and ReCoRD are right or wrong by themselves, and ReCoRD's likeliest is the answer. WiC
and WSC mark their words in the text, where that baseline also reads the outputs at these words. Left out: the
two diagnostic sets, AX-b and AX-g.
"""

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from experiments.metrics import answers
from experiments.tasks import benchmark, classes, hub, json_lines, questions
from experiments.tasks.benchmark import BenchmarkData
from experiments.tasks.classes import Contents, SCORE
from experiments.tasks.losses import of_candidates, of_classes
from experiments.tasks.questions import RIGHT
from experiments.tasks.superglue_rows import (
    alternatives,
    articles,
    cloze,
    Line,
    multiple_sentences,
    pair,
    paragraphs,
    Reader,
    winograd,
    word_in_context,
)
from experiments.tasks.task import Task


class SuperGLUESet(NamedTuple):
    """One of the eight. `rows_of`: what an object of its files has; `objects`: those of a table of
    `datasets`, where its rows are others; `labels`: in the order of `datasets`, or "score" where candidates
    are compared; `submitted`: what the site takes for a label."""

    directory: str
    rows_of: Reader
    labels: tuple[str, ...] = ("false", "true")
    metrics: tuple[str, ...] = ("accuracy",)
    objects: Callable[[Iterable[Any]], Iterable[Any]] = iter
    submitted: Callable[[str], Any] = str

    @property
    def asks(self) -> bool:
        """Whether it has questions with candidates."""
        return self.labels in (SCORE, RIGHT)


SETS = {
    "boolq": SuperGLUESet("BoolQ", pair("question", "passage")),
    "cb": SuperGLUESet(
        "CB",
        pair("premise", "hypothesis"),
        ("entailment", "contradiction", "neutral"),
        ("accuracy", "macro F1"),
    ),
    "copa": SuperGLUESet("COPA", alternatives, SCORE, submitted=int),
    "multirc": SuperGLUESet("MultiRC", multiple_sentences, RIGHT, ("F1a", "EM"), paragraphs),
    "record": SuperGLUESet("ReCoRD", cloze, RIGHT, ("F1", "EM"), articles),
    "rte": SuperGLUESet("RTE", pair("premise", "hypothesis"), ("entailment", "not_entailment")),
    "wic": SuperGLUESet("WiC", word_in_context),
    "wsc": SuperGLUESet("WSC", winograd, submitted=str.capitalize),
}


@dataclass(frozen=True)
class SuperGLUEData(BenchmarkData):
    """`BenchmarkData`, of eight sets."""

    task: Literal[
        "superglue/boolq",
        "superglue/cb",
        "superglue/copa",
        "superglue/multirc",
        "superglue/record",
        "superglue/rte",
        "superglue/wic",
        "superglue/wsc",
    ]
    directory: str = "superglue"
    seq_len: int = 256


def read(section: SuperGLUEData, directory: Path) -> Contents:
    """The rows or questions of each split, before any tokenizer: what can be wrong with the files is found
    here.
    """
    found = SETS[section.task.removeprefix("superglue/")]
    return benchmark.contents(
        section,
        found.labels,
        functools.partial(_rows_of, section, found, directory),
        {None: "val"},
        {found.directory: "test"},
        questions.checked if found.asks else classes.checked,
    )


def _rows_of(
    section: SuperGLUEData, found: SuperGLUESet, directory: Path, split: str, part: str | None
) -> tuple[list[Any], Any]:
    name: Any
    if section.dataset is None:
        name = benchmark.file_of(section, directory, "SuperGLUE", found.directory, f"{split}.jsonl")
        objects = json_lines.read(name)
    else:
        split = split.replace("val", "validation")
        config, name = section.task.removeprefix("superglue/"), f"{section.dataset}:{split}"
        table = hub.split_of(section.dataset, directory, split, config)
        objects = enumerate(found.objects(table), 1)
    labelled = split != "test"
    lines = (Line(values, number, f"`{name}` row {number}", labelled) for number, values in objects)
    return [row for line in lines for row in found.rows_of(line, found.labels)], name


def _submission(
    found: SuperGLUESet, name: str, labels: Sequence[str], inputs: Sequence[Any], texts: Sequence[str]
) -> dict[str, str]:
    """The file that the benchmark's site takes: an object a line, of MultiRC a paragraph a line."""
    lines: list[Any]
    if inputs and getattr(inputs[0], "each", False):
        paragraphs: dict[int, list[Any]] = {}
        for question, text in zip(inputs, texts, strict=True):
            paragraph, number = map(int, question.index.split("/"))
            labelled = [
                {"idx": int(answer), "label": int(label)}
                for answer, label in zip(question.names, text.split(), strict=True)
            ]
            paragraphs.setdefault(paragraph, []).append({"idx": number, "answers": labelled})
        lines = [{"idx": index, "passage": {"questions": each}} for index, each in paragraphs.items()]
    else:
        # Of ReCoRD's index, a paragraph's and a query's, the query's.
        lines = [
            {"idx": int(each.index.rpartition("/")[2]), "label": found.submitted(text)}
            for each, text in zip(inputs, texts, strict=True)
        ]
    return {f"{name}.jsonl": "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)}


def _task(name: str, found: SuperGLUESet) -> Task:
    own = answers.score if name == "record" else functools.partial(classes.score, found.metrics)
    shared: Any = questions if found.asks else classes
    return Task(
        section=SuperGLUEData,
        named=f"superglue/{name}",
        read=read,
        prepare=shared.prepare,
        loss=functools.partial(of_candidates, 2) if found.labels == SCORE else of_classes,
        predictor=shared.predictor,
        score=own,
        percentages=found.metrics,
        packs=False,
        labels=classes.labels_of,
        judge=functools.partial(shared.judge, own),
        files=functools.partial(
            classes.files, table=shared.table, submission=functools.partial(_submission, found)
        ),
    )


TASKS = tuple(_task(name, found) for name, found in SETS.items())
