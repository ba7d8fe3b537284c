"""From the two logits of each token to answers: the best spans of a question's windows, and none.

The score of a span is the logit of its first token as a start plus that of its last as an end. That of no
answer is the same of a window's first token, the smallest over the windows. Every span of the context of at
most so many tokens is compared, where the authors of BERT compare those of the best starts and ends.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.tasks.squad_files import Question
from experiments.tasks.windows import Window


class Span(NamedTuple):
    """`text` is empty for no answer."""

    text: str
    start_logit: float
    end_logit: float

    @property
    def score(self) -> float:
        return self.start_logit + self.end_logit


class Prediction(NamedTuple):
    """`text`: what is answered. `best`: the best span, whether it is answered or not. `odds`: how much higher
    no answer scores than that; None where every question has one. `n_best`: the best first.
    """

    text: str
    best: str
    odds: float | None
    n_best: tuple[Span, ...]

    def probabilities(self) -> list[float]:
        """A softmax over the scores of `n_best`."""
        highest = max(span.score for span in self.n_best)
        each = [math.exp(span.score - highest) for span in self.n_best]
        return [value / sum(each) for value in each]


def best_spans(logits: np.ndarray, window: Window, context: str, *, most: int, longest: int) -> list[Span]:
    """The best `most` spans of the context's tokens in a window, the best first.

    Args:
      logits: (columns, 2), or more columns, which are padding.
      longest: the tokens that a span may have.
    """
    count = len(window.offsets)
    start, end = logits[window.first : window.first + count].T
    # Row i has the ends from token i on; past the last token there is none.
    ends = np.concatenate([end, np.full(longest - 1, -np.inf, end.dtype)])
    sums = (start[:, None] + np.lib.stride_tricks.sliding_window_view(ends, longest)).ravel()
    places = np.argpartition(-sums, most - 1)[:most] if most < len(sums) else np.arange(len(sums))
    found = []
    for place in sorted(places.tolist(), key=lambda place: (-sums[place], place)):
        first, more = divmod(place, longest)
        if first + more >= count:
            continue
        text = context[window.offsets[first, 0] : window.offsets[first + more, 1]].strip()
        if text:
            found.append(Span(text, float(start[first]), float(end[first + more])))
    return found


def predicted(
    logits: Sequence[np.ndarray],
    windows: Sequence[Window],
    question: Question,
    section: Any,
    *,
    nullable: bool,
) -> Prediction:
    """The answer to a question by the logits of its windows. Of spans of one text the best is kept.

    `nullable`: no answer is one of them. It is given where its score is above the best span's by more than
    `section.null_threshold`.
    """
    most, longest = section.n_best_size, section.max_answer_length
    every = [
        span
        for each, window in zip(logits, windows, strict=True)
        for span in best_spans(each, window, question.context, most=most, longest=longest)
    ]
    distinct: dict[str, Span] = {}
    for span in sorted(every, key=lambda span: -span.score):
        distinct.setdefault(span.text, span)
    n_best = list(distinct.values())[:most]
    nothing = min(
        (Span("", float(each[0, 0]), float(each[0, 1])) for each in logits), key=lambda span: span.score
    )
    if not n_best:  # a context of blanks
        return Prediction("", "", math.inf if nullable else None, (nothing,))
    best = n_best[0]
    if not nullable:
        return Prediction(best.text, best.text, None, tuple(n_best))
    odds = nothing.score - best.score
    n_best = sorted([*n_best, nothing], key=lambda span: -span.score)
    return Prediction("" if odds > section.null_threshold else best.text, best.text, odds, tuple(n_best))
