"""SQuAD's files: the data set as JSON, `data`, `paragraphs`, `qas`, and predictions as `{id: text}`.

Version 2.0 says of each question whether it `is_impossible`, and version 1.1 does not. An answer stands in
its context from `answer_start` on, in characters; one that is off by up to two is put right.
"""

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """`start`: its first character in the context."""

    text: str
    start: int


class Question(NamedTuple):
    """`impossible`: whether it has no answer; None where the file is of version 1.1, and does not say."""

    id: str
    text: str
    context: str
    answers: tuple[Answer, ...]
    impossible: bool | None = None


# How far an `answer_start` may be off.
NEAR = 2
_WORDS = {str: "a text", int: "an integer", list: "a list", dict: "an object", bool: "true or false"}


def has_impossible(questions: Sequence[Question]) -> bool:
    """Whether they are of version 2.0."""
    return any(question.impossible is not None for question in questions)


def read(path: Path, *, placed: bool = True) -> list[Question]:
    """The questions of a file, in its order.

    Args:
      placed: answers have to stand where they are said to, as training needs.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is of another form; the file and the question are named.
    """
    found: list[Question] = []
    seen: set[str] = set()
    content = _json(path)
    for one, article in enumerate(_field(content, "data", list, f"`{path}`")):
        place = f"`{path}` data[{one}]"
        for two, paragraph in enumerate(_field(article, "paragraphs", list, place)):
            own = f"{place}.paragraphs[{two}]"
            context = _field(paragraph, "context", str, own)
            for three, node in enumerate(_field(paragraph, "qas", list, own)):
                question = _question(node, context, f"{own}.qas[{three}]", placed)
                if question.id in seen:
                    raise ValueError(f"{own}.qas[{three}]: the id {question.id!r} is there twice.")
                seen.add(question.id)
                found.append(question)
    if not found:
        raise ValueError(f"`{path}` is empty: it has no question.")
    return found


def _question(node: Any, context: str, place: str, placed: bool) -> Question:
    name = _field(node, "id", str, place)
    place = f"{place} (id {name!r})"
    impossible = _field(node, "is_impossible", bool, place) if "is_impossible" in node else None
    answers = []
    for number, answer in enumerate(_field(node, "answers", list, place)):
        own = f"{place}.answers[{number}]"
        text, start = _field(answer, "text", str, own), _field(answer, "answer_start", int, own)
        answers.append(Answer(text, _placed(text, start, context, own) if placed else start))
    if bool(answers) == bool(impossible):
        found = "has answers, and `is_impossible` is true" if impossible else "has no answer"
        raise ValueError(
            f"{place} {found}: a question has one or more `answers`, or says that it `is_impossible`, as "
            "those of version 2.0 do."
        )
    return Question(name, _field(node, "question", str, place), context, tuple(answers), impossible)


def _placed(text: str, start: int, context: str, place: str) -> int:
    """Where the answer begins: at `start`, or the nearest place to it."""
    near = sorted(range(max(start - NEAR, 0), start + NEAR + 1), key=lambda at: abs(at - start))
    found = next((at for at in near if text.strip() and context.startswith(text, at)), None)
    if found is None:
        there = context[max(start, 0) :][: len(text)]
        raise ValueError(
            f"{place}: the text is {text!r}, and at `answer_start` {start} its context has {there!r}: give "
            "the place of its first character."
        )
    return found


def _field(node: Any, key: str, kind: type, place: str) -> Any:
    if not isinstance(node, dict) or key not in node:
        held = f"has {', '.join(map(str, node)) or 'nothing'}" if isinstance(node, dict) else "is no object"
        raise ValueError(
            f"{place} {held}, and must have `{key}`: SQuAD's files have `data`, `paragraphs` and `qas`, "
            "each in the one before."
        )
    value = node[key]
    if type(value) is not kind:
        raise ValueError(f"{place}: `{key}` is {json.dumps(value)[:60]}, and must be {_WORDS[kind]}.")
    return value


def _json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no data file `{path}`.")
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"`{path}` is not valid JSON: {error}") from error


def written(questions: Sequence[Question]) -> str:
    """The questions as a file that `read` takes, whose articles have no title."""
    paragraphs = []
    for context, group in groupby(questions, key=lambda question: question.context):
        qas = []
        for question in group:
            answers = [{"text": answer.text, "answer_start": answer.start} for answer in question.answers]
            said = {} if question.impossible is None else {"is_impossible": question.impossible}
            qas.append({"id": question.id, "question": question.text, "answers": answers, **said})
        paragraphs.append({"context": context, "qas": qas})
    version = "v2.0" if has_impossible(questions) else "1.1"
    articles = [{"title": "", "paragraphs": paragraphs}]
    return json.dumps({"version": version, "data": articles}, ensure_ascii=False) + "\n"


def by_id(path: Path, kind: type, questions: Sequence[Question]) -> dict[str, Any]:
    """The texts (`kind` str) or numbers (float) of a file `{id: ...}`, for those of the questions that it
    has.

    Raises:
      ValueError: it is of another form, or has none of these questions.
    """
    content = _json(path)
    if not isinstance(content, dict):
        raise ValueError(f'`{path}` is no object of JSON, such as {{"id": ...}}.')
    found = {question.id: content[question.id] for question in questions if question.id in content}
    if not found:
        raise ValueError(
            f"`{path}` has none of the {len(questions):,} questions: it belongs to another file."
        )
    accepted = (str,) if kind is str else (int, float)
    for name, value in found.items():
        if not isinstance(value, accepted) or isinstance(value, bool):
            words = "a text" if kind is str else "a number"
            raise ValueError(f"`{path}` {name!r}: it is {json.dumps(value)[:60]}, and must be {words}.")
    return found
