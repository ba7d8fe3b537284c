"""What a run has to know of its task, as one value that the task's own file makes.

    TASK = Task(section=E2EData, read=read, prepare=pairs.prepare, score=score_e2e)

To add a task, copy a file such as `e2e.py`, and add its value to the list in `experiments/tasks/__init__.py`.
Whatever trains, decodes, scores and reports asks this value, and knows no task by its name.
"""

import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from experiments.tasks.losses import of_labels
from experiments.tasks.splits import Prompt, Splits


class Score(Protocol):
    """What predictions are worth, by the names of the metrics; None where one cannot be computed, and `tell`
    is told why.

    Several references an input, and one text. Of several reference files, an empty line is an empty
    reference.
    """

    def __call__(
        self, references: Sequence[Sequence[str]], texts: Sequence[str], *, tell: Callable[[str], None]
    ) -> dict[str, float | None]: ...


class Predictor(Protocol):
    """The test inputs, and one text for each of the first `count`, whatever the weights: what is generated,
    or a label. `section` is the config's `decode`: how many at a time, and whether the untouched base answers
    too.
    """

    @property
    def task(self) -> "Task": ...

    @property
    def section(self) -> Any: ...

    @property
    def prompts(self) -> Sequence[Prompt]: ...

    def texts(
        self, params: Any, count: int | None = None, *, tell: Callable[[int], None] = ...
    ) -> list[str]: ...


@dataclass(frozen=True)
class Task:
    """A task, from its files to its scores.

    In two steps, since the tokenizer may come from a base that has to be trained first: `read(section,
    directory)` needs only the files, so that what is wrong with them is known before anything is trained, and
    `prepare(section, contents, tokenizer)` makes the examples and the test inputs.

    Args:
      section: the dataclass of the config's `data`, whose first field is `task: Literal["its name"]`; it has
        `seq_len` too.
      loss: `loss(model, piece, smoothing)` gives the loss of everything that is counted in a batch, and the
        mask of what is: two arrays of one shape. `model(input_ids, ...)` is the adapted model.
      predictor: `predictor(config, model, tokenizer, prompts)` is what answers the test inputs. None: they
        are continued, as `decode` says.
      score: None: predictions are not scored.
      as_scored: what a prediction or a reference is in the files of a run, which `score` reads.
      percentages: the metrics that papers print in percent.
      parts: of the published test set, the inputs that are scored by themselves too, by their places.
      cuts: whether a section has what is longer than `seq_len` cut, prompts too.
      documents: `contents["train"]` is a list of documents, on which a tokenizer can be trained.
      packs: examples leave room, so that several can share a row.
      named: the task's name, where `section` is of several tasks.
      labels: `labels(section, contents)` are the outputs of the head that the base is given, a class each;
        one output is a score. None: the base keeps its head, whose outputs are the next token's.
      head: which head that is, one of `lora_jax.models.HEADS`.
      head_bias: `head_bias(examples)` is the bias with which a new head of one output begins to train on
        these, where it has a bias. None: zero.
      judge: `judge(section, outputs, examples, rows)` gives the metrics of the head's outputs for these rows
        of the validation examples, by name. The first says which checkpoint is the best, and is the better
        the higher it is. None: the loss says it.
      files: `files(predictor, splits, params)` gives what a run leaves beside its predictions: the content of
        each file, by its name. Every process computes it, and one writes it.
      evaluate: `evaluate(predictor, params)` gives the scores of these weights, in place of `score`, where
        they are of more than one text an input. Every process computes it.
      score_files: `score_files(references, hypotheses, *, odds, threshold, tell)` gives the scores of files
        in the benchmark's own form, where that is no text a line.
      scored_again: `scored_again(section, names)` gives the arguments with which `score` finds the metrics of
        these names again, from the files of a run.
    """

    section: type
    read: Callable[[Any, Path], Any]
    prepare: Callable[[Any, Any, Any], Splits]
    loss: Callable[..., tuple[Any, Any]] = of_labels
    predictor: Callable[..., Predictor] | None = None
    score: Score | None = None
    as_scored: Callable[[str], str] = str
    percentages: tuple[str, ...] = ("BLEU",)
    parts: Mapping[str, range] = field(default_factory=dict)
    cuts: Callable[[Any], bool] = lambda section: False
    documents: bool = False
    packs: bool = True
    named: str | None = None
    labels: Callable[[Any, Any], tuple[str, ...]] | None = None
    head: str = "sequence_classification"
    head_bias: Callable[[Any], float] | None = None
    judge: Callable[[Any, Any, Any, Any], dict[str, float]] | None = None
    files: Callable[[Any, Splits, Any], dict[str, str]] | None = None
    evaluate: Callable[[Any, Any], Mapping[str, float]] | None = None
    score_files: Callable[..., Mapping[str, float]] | None = None
    scored_again: Callable[[Any, Sequence[str]], str] = lambda section, names: (
        "--refs references.txt --hyps predictions.txt"
    )

    @property
    def name(self) -> str:
        """As `data.task` and `score` spell it."""
        return self.named or typing.get_args(typing.get_type_hints(self.section)["task"])[0]

    @property
    def is_scored(self) -> bool:
        """Whether `score` takes it."""
        return self.score is not None or self.score_files is not None
