"""SQuAD: a question about a paragraph, whose answer stands in it (Rajpurkar et al. 2016), or nowhere, which
is version 2.0 (Rajpurkar et al. 2018).

The files are the benchmark's own, and say themselves of which version they are. The validation set is public:
it is what is answered and scored, and what papers give. The model points at the first and the last token of
an answer; `windows` has how a long context is read, and `spans` how an answer is found.

A run leaves `predictions.json`, `{id: text}` as the scorer takes it, and `nbest_predictions.json`, the best
answers with their probabilities; of version 2.0 also `null_odds.json`, how much higher no answer scores, and
`answers.json`, the best answers of all questions, which the search for a threshold needs.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.checks import at_least
from experiments.metrics import squad as metrics, warn
from experiments.tasks import squad_files
from experiments.tasks.losses import of_spans
from experiments.tasks.splits import Splits
from experiments.tasks.squad_files import Question
from experiments.tasks.task import Task


@dataclass(frozen=True)
class SQuADData:
    """The files `train` and `valid`. Windows over a long context begin `doc_stride` tokens apart; a question
    keeps its first `max_query_length` tokens. An answer has at most `max_answer_length` tokens;
    `n_best_size` are written. `null_threshold`: of version 2.0, how much higher no answer must score than the
    best one to be given. `max_rows`, `max_valid_rows`: of questions."""

    task: Literal["squad"]
    train: str
    valid: str
    seq_len: int = 384
    doc_stride: int = 128
    max_query_length: int = 64
    max_answer_length: int = 30
    n_best_size: int = 20
    null_threshold: float = 0.0
    max_rows: int | None = None
    max_valid_rows: int | None = None

    def __post_init__(self):
        names = ("seq_len", "doc_stride", "max_query_length", "max_answer_length", "n_best_size")
        at_least(1, "data", self, *names, "max_rows", "max_valid_rows")


Contents = Mapping[str, Sequence[Question]]


def read(section: SQuADData, directory: Path) -> Contents:
    """The questions of both files: what can be wrong with them is found here."""
    train, valid = (squad_files.read(directory / name) for name in (section.train, section.valid))
    return {"train": train[: section.max_rows], "valid": valid[: section.max_valid_rows]}


def prepare(section: SQuADData, contents: Contents, tokenizer: Any) -> Splits:
    """Windows over the contexts, and the questions of the validation set as test inputs."""
    # Imported here, because `score` asks the tasks too, and needs no package.
    from experiments.tasks.windows import Asked, Frame, Window, Windows, windows

    pad, typed = getattr(tokenizer, "pad_token_id", None) or 0, Frame.of(tokenizer).typed

    def examples(questions: Sequence[Question]) -> Windows:
        found = windows(
            questions,
            tokenizer,
            seq_len=section.seq_len,
            stride=section.doc_stride,
            longest=section.max_query_length,
        )
        return Windows(found, questions, section.seq_len, pad=pad, typed=typed)

    valid = examples(contents["valid"])
    own: list[list[Window]] = [[] for _ in valid.questions]
    for window in valid.windows:
        own[window.question].append(window)
    prompts = tuple(
        Asked(question.text, (), _references(question), None, question, tuple(found))
        for question, found in zip(valid.questions, own, strict=True)
    )
    return Splits(examples(contents["train"]), valid, prompts)


def _references(question: Question) -> tuple[str, ...]:
    return tuple(answer.text for answer in question.answers)


def labels_of(section: SQuADData, contents: Contents) -> tuple[str, ...]:
    """The outputs of the head."""
    return "start", "end"


def judge(section: SQuADData, outputs: Any, examples: Any, rows: Any) -> dict[str, float]:
    """The metrics in validation, F1 first, of the questions that have a window among these rows."""
    from experiments.tasks.spans import predicted

    places: dict[int, list[int]] = {}  # among the rows, of each question
    for place, row in enumerate(rows):
        places.setdefault(examples.windows[row].question, []).append(place)
    nullable = squad_files.has_impossible(examples.questions)
    found = []
    for number, own in places.items():
        windows = [examples.windows[rows[place]] for place in own]
        question = examples.questions[number]
        found.append(predicted(outputs[own], windows, question, section, nullable=nullable))
    scores = _scores(section, [examples.questions[number] for number in places], found)
    return {"f1": scores["f1"], **scores}


def _scores(section: SQuADData, questions: Sequence[Question], found: Sequence[Any]) -> metrics.Scores:
    """Of predictions, with the best threshold where questions may have no answer, and without numbers of
    questions.
    """
    names = [question.id for question in questions]
    references = dict(zip(names, map(_references, questions), strict=True))
    best = {name: each.best for name, each in zip(names, found, strict=True)}
    odds = {name: each.odds for name, each in zip(names, found, strict=True)}
    if any(each is None for each in odds.values()):
        return metrics.version_1(references, best)
    scores = metrics.version_2(references, best, odds, section.null_threshold)
    return {name: value for name, value in scores.items() if not name.endswith("total")}


def predictor(config: Any, model: Any, tokenizer: Any, prompts: Sequence[Any]) -> Any:
    """A `Reader`; imported here, because `plan` reads a config before JAX may start."""
    from experiments.tasks.reader import Reader

    return Reader.create(config, model, tokenizer, prompts)


def evaluate(reader: Any, params: Any) -> metrics.Scores:
    """The metrics of the answers to all questions of the run."""
    questions = [prompt.question for prompt in reader.prompts]
    return _scores(reader.data, questions, reader.predictions(params))


def files(reader: Any, splits: Splits, params: Any) -> dict[str, str]:
    """The predictions as the benchmark has them, and `references.json`, the questions that they answer."""
    found = reader.predictions(params)
    questions = [prompt.question for prompt in reader.prompts]

    def by_id(value: Callable[[Any], Any]) -> str:
        each = {question.id: value(one) for question, one in zip(questions, found, strict=True)}
        return json.dumps(each, ensure_ascii=False, indent=1) + "\n"

    contents = {
        "references.json": squad_files.written(questions),
        "predictions.json": by_id(lambda one: one.text),
        "nbest_predictions.json": by_id(_listed),
    }
    if reader.nullable:
        contents |= {
            "answers.json": by_id(lambda one: one.best),
            "null_odds.json": by_id(lambda one: one.odds),
        }
    return contents


def _listed(found: Any) -> list[dict[str, Any]]:
    return [
        {
            "text": span.text,
            "probability": probability,
            "start_logit": span.start_logit,
            "end_logit": span.end_logit,
        }
        for span, probability in zip(found.n_best, found.probabilities(), strict=True)
    ]


def score_files(
    references: Sequence[Path],
    hypotheses: Path,
    *,
    odds: Path | None = None,
    threshold: float | None = None,
    tell: Callable[[str], None] = warn,
) -> metrics.Scores:
    """The scores of a file of predictions, by the scorer of the version of the references.

    Raises:
      ValueError: a file is of another form, or, in version 2.0, lacks a question.
    """
    if len(references) > 1:
        raise ValueError(
            f"`--refs` is one file of SQuAD's, such as dev-v1.1.json, and got {len(references)}."
        )
    questions = squad_files.read(references[0], placed=False)
    golds = {question.id: _references(question) for question in questions}
    whole = functools.partial(_by_id, questions)
    if squad_files.has_impossible(questions):
        numbers = None if odds is None else whole(odds, float)
        return metrics.version_2(golds, whole(hypotheses, str), numbers, threshold or 0.0)
    if odds is not None:
        raise ValueError(
            f"`--null-odds` are of version 2.0, and `{references[0]}` is of version 1.1, where every "
            "question has an answer: leave them out."
        )
    texts = squad_files.by_id(hypotheses, str, questions)
    if len(texts) < len(golds):
        tell(f"{len(golds) - len(texts):,} of {len(golds):,} questions have no prediction, and score 0.")
    return metrics.version_1(golds, texts)


def _by_id(questions: Sequence[Question], path: Path, kind: type) -> dict[str, Any]:
    found = squad_files.by_id(path, kind, questions)
    missing = next((question.id for question in questions if question.id not in found), None)
    if missing is not None:
        raise ValueError(
            f"`{path}` has no {missing!r}, one of {len(questions) - len(found):,} that are missing of "
            f'{len(questions):,}: version 2.0 scores all questions; "" leaves one unanswered.'
        )
    return found


def scored_again(section: SQuADData, names: Sequence[str]) -> str:
    """What `score` is given to find these metrics again."""
    if "best_f1" not in names:
        return "--refs references.json --hyps predictions.json"
    threshold = f" --threshold {section.null_threshold!r}" if section.null_threshold else ""
    return f"--refs references.json --hyps answers.json --null-odds null_odds.json{threshold}"


_PARTS = ("", "HasAns_", "NoAns_", "best_")

TASK = Task(
    section=SQuADData,
    read=read,
    prepare=prepare,
    loss=of_spans,
    predictor=predictor,
    as_scored=lambda text: " ".join(text.split()),
    percentages=("exact_match", *(part + name for part in _PARTS for name in ("exact", "f1"))),
    packs=False,
    labels=labels_of,
    head="question_answering",
    judge=judge,
    files=files,
    evaluate=evaluate,
    score_files=score_files,
    scored_again=scored_again,
)
