"""What each set of SuperGLUE has in an object of its files, as rows of one text or two with a label, or as a
question with its candidates.

Words that a label is about are marked in their text: `*` around WiC's word and WSC's noun phrase, `#` around
WSC's pronoun, as T5's authors mark these two. (The benchmark's own baseline reads the model's outputs there.)
"""

import re
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from experiments.tasks import classes
from experiments.tasks.classes import Row
from experiments.tasks.json_lines import field
from experiments.tasks.questions import Question, RIGHT


class Line(NamedTuple):
    """An object of a file. `place`: the file and the row, in words; `labelled`: it is no test set's."""

    values: dict[str, Any]
    number: int
    place: str
    labelled: bool

    def get(self, name: str, kind: type = str) -> Any:
        return field(self.values, name, kind, self.place)

    def label(self, labels: Sequence[str], values: Any = None) -> str | None:
        """The label of the object, or of one in it, in a word."""
        values = self.values if values is None else values
        if self.labelled and "label" not in values:
            field(values, "label", object, self.place)
        return classes.word(values["label"], labels) if self.labelled else None


Reader = Callable[[Line, Sequence[str]], Iterable[Row | Question]]


def pair(first: str, second: str) -> Reader:
    """The reader of sets whose rows have two texts, in these fields."""
    return lambda line, labels: [_row(line, labels, line.get(first), line.get(second))]


def _row(line: Line, labels: Sequence[str], first: str, second: str | None) -> Row:
    return Row(first, second, line.label(labels), line.number, str(line.get("idx", int)))


def word_in_context(line: Line, labels: Sequence[str]) -> Iterator[Row]:
    """WiC: two sentences with the word of each marked."""
    first, second = (_with_word(line, number) for number in "12")
    yield _row(line, labels, first, second)


def _with_word(line: Line, number: str) -> str:
    text, start, end = (
        line.get(f"{name}{number}", kind) for name, kind in (("sentence", str), ("start", int), ("end", int))
    )
    if not 0 <= start < end <= len(text):
        raise ValueError(
            f"{line.place}: the word is from character {start} to {end} of `sentence{number}`, which has "
            f"{len(text)}."
        )
    return f"{text[:start]}* {text[start:end]} *{text[end:]}"


def winograd(line: Line, labels: Sequence[str]) -> Iterator[Row]:
    """WSC: a text with the noun phrase and the pronoun marked."""
    # `datasets` has no object around the spans.
    target = line.get("target", dict) if "target" in line.values else line.values
    words = line.get("text").split()
    spans = []
    for number, mark in ((1, "*"), (2, "#")):
        index, text = (
            field(target, f"span{number}_{name}", kind, line.place)
            for name, kind in (("index", int), ("text", str))
        )
        spans.append((mark, *_places(words, text.split(), index, f"{line.place}: `span{number}_index`")))
    marked = []
    for place, word in enumerate(words):
        marked += [mark for mark, start, _ in spans if start == place] + [word]
        marked += [mark for mark, _, end in reversed(spans) if end == place + 1]
    yield _row(line, labels, " ".join(marked), None)


def _places(words: list[str], span: list[str], index: int, name: str) -> tuple[int, int]:
    """Where a span begins and ends: the nearest place to `index` that has its words, since some indices of
    the official files are off by one; or `index` itself where other words are between.
    """
    bare = lambda parts: [part.strip(string.punctuation).casefold() for part in parts]
    wanted, found = bare(span), bare(words)
    same = [start for start in range(len(words)) if found[start : start + len(span)] == wanted]
    start = min(same, key=lambda start: abs(start - index)) if span and same else index
    if not (span and 0 <= start < len(words)):
        raise ValueError(f"{name} is {index}, and the text has {len(words)} words.")
    return start, min(start + len(span), len(words))


_ASKED = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}


def alternatives(line: Line, labels: Sequence[str]) -> Iterator[Question]:
    """COPA: a premise and a question, with two alternatives."""
    asked = line.get("question")
    if asked not in _ASKED:
        raise ValueError(f"{line.place}: `question` is {asked!r}, and must be one of {', '.join(_ASKED)}.")
    premise, choices = f"{line.get('premise')} {_ASKED[asked]}", [line.get("choice1"), line.get("choice2")]
    label = line.label(RIGHT)
    if label is not None:
        classes.known(label, RIGHT, line.place)
    index = str(line.get("idx", int))
    right = [None if label is None else str(int(name == label)) for name in RIGHT]
    rows = _candidates(line, index, premise, choices, right)
    references = () if label is None else (label,)
    yield Question(f"{premise} | {' / '.join(choices)}", rows, RIGHT, references)


def _candidates(
    line: Line, index: str, first: str, seconds: Iterable[str], right: Iterable[str | None]
) -> tuple[Row, ...]:
    return tuple(
        Row(first, second, one, line.number, index) for second, one in zip(seconds, right, strict=True)
    )


def multiple_sentences(line: Line, labels: Sequence[str]) -> Iterator[Question]:
    """MultiRC: a paragraph with questions, of whose answers any number are right. The tags that number its
    sentences are left out, and their numbers stay.
    """
    passage, paragraph = line.get("passage", dict), line.get("idx", int)
    text = _plain(re.sub(r"</?br?>", " ", field(passage, "text", str, line.place)))
    for question in field(passage, "questions", list, line.place):
        asked = _plain(field(question, "question", str, line.place))
        index = f"{paragraph}/{field(question, 'idx', int, line.place)}"
        answers = field(question, "answers", list, line.place)
        said = [_plain(field(answer, "text", str, line.place)) for answer in answers]
        right = [line.label(labels, answer) for answer in answers]
        if not answers:
            raise ValueError(f"{line.place}: question {index} has no answers.")
        rows = _candidates(line, index, text, (f"{asked} {answer}" for answer in said), right)
        names = tuple(str(field(answer, "idx", int, line.place)) for answer in answers)
        references = (" ".join(str(one) for one in right),) if line.labelled else ()
        yield Question(f"{text} | {asked} | {' / '.join(said)}", rows, names, references, each=True)


def paragraphs(table: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """MultiRC's objects, of which `datasets` has an answer a row."""
    found: dict[int, dict[str, Any]] = {}
    for row in table:
        index = row["idx"]
        passage = found.setdefault(
            index["paragraph"],
            {"idx": index["paragraph"], "passage": {"text": row["paragraph"], "questions": {}}},
        )["passage"]
        question = passage["questions"].setdefault(
            index["question"], {"idx": index["question"], "question": row["question"], "answers": []}
        )
        question["answers"].append({"idx": index["answer"], "text": row["answer"], "label": row["label"]})
    for each in found.values():
        each["passage"]["questions"] = list(each["passage"]["questions"].values())
    return list(found.values())


def cloze(line: Line, labels: Sequence[str]) -> Iterator[Question]:
    """ReCoRD: an article whose entities are the candidates for a gap in a sentence about it."""
    passage, paragraph = line.get("passage", dict), line.get("idx", int)
    article = field(passage, "text", str, line.place)
    text = _plain(re.sub(r"([.?!\"']?)\n@highlight\n", lambda found: f"{found[1] or '.'} ", article))
    names = tuple(
        dict.fromkeys(
            _entity(entity, article, line) for entity in field(passage, "entities", list, line.place)
        )
    )
    for asked in line.get("qas", list):
        query, number = (
            field(asked, name, kind, line.place) for name, kind in (("query", str), ("idx", int))
        )
        index, query = f"{paragraph}/{number}", _plain(query)
        if "@placeholder" not in query or not names:
            lacks = "candidates" if not names else "`@placeholder`"
            raise ValueError(f"{line.place}: query {index} has no {lacks}.")
        answers: tuple[str, ...] = ()
        if line.labelled:
            said = field(asked, "answers", list, line.place)
            answers = tuple(dict.fromkeys(_plain(field(each, "text", str, line.place)) for each in said))
            if not answers:
                raise ValueError(f"{line.place}: query {index} has no answers.")
        right = [str(int(name in answers)) if line.labelled else None for name in names]
        filled = (query.replace("@placeholder", name) for name in names)
        rows = _candidates(line, index, text, filled, right)
        yield Question(f"{text} | {query} | {' / '.join(names)}", rows, names, answers)


def _entity(entity: Any, article: str, line: Line) -> str:
    """Its words; the official files have its first and its last character."""
    if isinstance(entity, dict) and "text" in entity:
        return _plain(entity["text"])
    start, last = (field(entity, name, int, line.place) for name in ("start", "end"))
    if not 0 <= start <= last < len(article):
        raise ValueError(
            f"{line.place}: an entity is from character {start} to {last} of the text, which has "
            f"{len(article)}."
        )
    return _plain(article[start : last + 1])


def articles(table: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """ReCoRD's objects, of which `datasets` has a query a row."""
    as_texts = lambda values: [{"text": value} for value in values]
    return [
        {
            "idx": row["idx"]["passage"],
            "passage": {"text": row["passage"], "entities": as_texts(row["entities"])},
            "qas": [{"idx": row["idx"]["query"], "query": row["query"], "answers": as_texts(row["answers"])}],
        }
        for row in table
    ]


def _plain(text: str) -> str:
    return " ".join(text.split())
