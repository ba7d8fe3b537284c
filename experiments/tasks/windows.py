"""Questions and their contexts as tokens: windows that slide over a context, and how they become batches.

A window is a question and a part of its context, with the tokenizer's special tokens around both. Windows of
one question begin `stride` tokens of the context apart, as those of BERT's authors do, and the last one ends
where the context ends. A window without the whole answer points at its first token.

A batch holds `input_ids`, `attention_mask` and, where the tokenizer tells the two texts apart,
`token_type_ids`, each (B, T); `labels`, (B, 2), the columns where the answer starts and ends; and `mask`,
(B, 1), which is 0 for a row that only fills the batch.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from experiments.tasks.examples import padded_width
from experiments.tasks.splits import Prompt
from experiments.tasks.squad_files import Question


# Texts that are encoded at once: the tokenizer's lists of offsets take much more room than the arrays here.
CHUNK = 512


class Window(NamedTuple):
    """`question`: its place among the questions. `first`: the column of the first token of the context, and
    `offsets`, (tokens, 2), where each of them begins and ends in it. `span`: the columns of the answer, (0,
    0) where it is not in this window.
    """

    question: int
    ids: np.ndarray
    first: int
    offsets: np.ndarray
    span: tuple[int, int]


@dataclass(frozen=True)
class Asked(Prompt):
    """A question that is to be answered, and the windows over its context."""

    question: Any = None
    windows: tuple[Window, ...] = ()


class Encoded(NamedTuple):
    """A text: its ids, and where each token begins and ends in it, (tokens, 2)."""

    ids: np.ndarray
    offsets: np.ndarray


@dataclass(frozen=True)
class Frame:
    """The special tokens of a pair of texts: before them, between them and after them. `typed`: whether the
    second text has a type of its own.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    typed: bool

    @classmethod
    def of(cls, tokenizer: Any) -> "Frame":
        """What this tokenizer puts around two texts.

        Raises:
          ValueError: it cannot say where a token stands in its text.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"the base's tokenizer is a {type(tokenizer).__name__}, which does not say where a token "
                "stands in its text: take a base with a `tokenizer.json`."
            )
        found = tokenizer("a", "a", return_attention_mask=False)
        ids, texts = found["input_ids"], found.sequence_ids(0)
        one, two = ([place for place, text in enumerate(texts) if text == number] for number in (0, 1))
        return cls(
            tuple(ids[: one[0]]),
            tuple(ids[one[-1] + 1 : two[0]]),
            tuple(ids[two[-1] + 1 :]),
            any(found.get("token_type_ids") or ()),
        )

    @property
    def size(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)


def encoded(texts: Sequence[str], tokenizer: Any) -> Iterator[Encoded]:
    """Each text by itself, without special tokens."""
    for start in range(0, len(texts), CHUNK):
        found = tokenizer(
            list(texts[start : start + CHUNK]),
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        for ids, offsets in zip(found["input_ids"], found["offset_mapping"], strict=True):
            yield Encoded(np.asarray(ids, np.int32), np.asarray(offsets, np.int32).reshape(-1, 2))


def windows(
    questions: Sequence[Question], tokenizer: Any, *, seq_len: int, stride: int, longest: int
) -> list[Window]:
    """The windows of all questions, in their order. `longest`: the tokens that a question keeps.

    Raises:
      ValueError: a context has no token, or a window no room for `stride` of them.
    """
    frame = Frame.of(tokenizer)
    distinct = list(dict.fromkeys(question.context for question in questions))
    contexts = dict(zip(distinct, encoded(distinct, tokenizer), strict=True))
    asked = encoded([question.text.strip() for question in questions], tokenizer)
    found = []
    for place, (question, said) in enumerate(zip(questions, asked, strict=True)):
        context, kept = contexts[question.context], said.ids[:longest]
        room = seq_len - frame.size - len(kept)
        if room < stride:
            raise ValueError(
                f"`data.seq_len` ({seq_len}) leaves {max(room, 0)} tokens for the context beside the "
                f"{len(kept)} of "
                f"question {question.id!r} and {frame.size} special ones, fewer than `data.doc_stride` "
                f"({stride}), so "
                "that windows would leave some out: set a larger `seq_len` or a smaller `doc_stride`."
            )
        if not len(context.ids):
            raise ValueError(f"question {question.id!r} has a context without any token.")
        head = [*frame.before, *kept, *frame.between]
        for start, stop in parts(len(context.ids), room, stride):
            ids = np.concatenate([head, context.ids[start:stop], frame.after]).astype(np.int32)
            offsets = context.offsets[start:stop]
            span = _columns(question, context.offsets, start, stop)
            span = (0, 0) if span is None else (len(head) + span[0], len(head) + span[1])
            found.append(Window(place, ids, len(head), offsets, span))
    return found


def parts(count: int, room: int, stride: int) -> list[tuple[int, int]]:
    """Where the windows over `count` tokens begin and end.

    >>> parts(10, 6, 3), parts(5, 6, 3)
    ([(0, 6), (3, 9), (6, 10)], [(0, 5)])
    """
    starts = range(0, max(count - room, 0) + stride, stride)
    return [(start, min(start + room, count)) for start in starts]


def _columns(question: Question, offsets: np.ndarray, start: int, stop: int) -> tuple[int, int] | None:
    """The first and the last token of the first answer, counted from `start`; None where one is not in the
    window, or where no token has the answer's characters.
    """
    if not question.answers:
        return None
    answer = question.answers[0]
    # A character of several tokens, as bytes are, has the same offsets in each of them.
    first = int(np.searchsorted(offsets[:, 1], answer.start, "right"))
    last = int(np.searchsorted(offsets[:, 0], answer.start + len(answer.text), "left")) - 1
    return (first - start, last - start) if start <= first <= last < stop else None


class Windows:
    """Windows given out as padded batches of at most `seq_len` columns. `typed`: the context's tokens have
    the type 1.
    """

    def __init__(
        self,
        windows: Sequence[Window],
        questions: Sequence[Question],
        seq_len: int,
        *,
        pad: int = 0,
        typed: bool = False,
    ):
        self.windows, self.questions, self.seq_len = tuple(windows), tuple(questions), seq_len
        self.lengths = np.asarray([len(window.ids) for window in self.windows], np.int64)
        self._pad, self._typed = pad, typed

    def __len__(self) -> int:
        return len(self.windows)

    def size(self, indices: np.ndarray) -> int:
        """How wide a batch of these is; -1 is none."""
        chosen = indices[indices >= 0]
        return padded_width(int(self.lengths[chosen].max(initial=1)), self.seq_len)

    def batch(self, indices: np.ndarray, size: int | None = None) -> dict[str, np.ndarray]:
        """One window a row; -1 is none, whose row counts nothing. `size`: of the whole batch, where these are
        a part of it.
        """
        width, rows = self.size(indices) if size is None else size, len(indices)
        ids = np.full((rows, width), self._pad, np.int32)
        shown, types = np.zeros((2, rows, width), np.int32)
        # A row without any token would have a softmax over nothing.
        shown[:, 0] = 1
        labels, counted = np.zeros((rows, 2), np.int32), np.zeros((rows, 1), np.float32)
        for row, index in enumerate(indices):
            if index < 0:
                continue
            window = self.windows[index]
            length = len(window.ids)
            ids[row, :length], shown[row, :length], counted[row] = window.ids, 1, 1
            types[row, window.first : length], labels[row] = 1, window.span
        found = {"input_ids": ids, "attention_mask": shown, "labels": labels, "mask": counted}
        return found | ({"token_type_ids": types} if self._typed else {})

    def fingerprint(self) -> str:
        """Changes with any token, type or answer, and with the length."""
        digest = hashlib.sha256(f"windows {self.seq_len} {self._pad} {self._typed}".encode())
        for window in self.windows:
            digest.update(window.ids.tobytes() + repr((window.first, window.span)).encode())
        return digest.hexdigest()[:32]
