"""The predictor of questions about contexts: windows of like length together, in batches of few shapes, and
the answers that their outputs give.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from experiments import tasks
from experiments.tasks import Task
from experiments.tasks.outputs import outputs_of
from experiments.tasks.spans import predicted, Prediction
from experiments.tasks.squad_files import has_impossible
from experiments.tasks.windows import Asked, Frame, Windows


@dataclass(frozen=True, eq=False)
class Reader:
    """The questions of a run and what answers them, whatever the weights. `section`: the config's `decode`,
    for its `batch`; `data`: its `data`; `nullable`: questions may have no answer. `known`: the answers of the
    latest weights, since texts, scores and files ask for them one after the other.
    """

    model: Any
    section: Any
    data: Any
    prompts: tuple[Asked, ...]
    task: Task
    nullable: bool
    pad: int
    typed: bool
    known: list[tuple[Any, list[Prediction]]] = field(default_factory=list)

    @classmethod
    def create(cls, config: Any, model: Any, tokenizer: Any, prompts: Sequence[Asked]) -> "Reader":
        return cls(
            model,
            config.decode,
            config.data,
            tuple(prompts[: config.decode.prompts]),
            tasks.of(config.data),
            has_impossible([prompt.question for prompt in prompts]),
            getattr(tokenizer, "pad_token_id", None) or 0,
            Frame.of(tokenizer).typed,
        )

    @property
    def labels(self) -> tuple[str, ...]:
        return self.model.config.labels

    def texts(
        self, params: Any, count: int | None = None, *, tell: Callable[[int], None] = lambda done: None
    ) -> list[str]:
        """The answer to each of the first `count` questions; "" is none."""
        return [found.text for found in self.predictions(params, count, tell=tell)]

    def predictions(
        self, params: Any, count: int | None = None, *, tell: Callable[[int], None] = lambda done: None
    ) -> list[Prediction]:
        """The same with what else could be answered."""
        known = next((answers for weights, answers in self.known if weights is params), None)
        if known is not None:
            return known[:count]
        asked = self.prompts[:count]
        windows = [window for prompt in asked for window in prompt.windows]
        longest = max((len(window.ids) for window in windows), default=1)
        examples = Windows(windows, (), longest, pad=self.pad, typed=self.typed)
        logits: list[np.ndarray] = [np.empty(0)] * len(windows)
        done = 0
        for rows, outputs in outputs_of(self.model, params, examples, self.section.batch):
            for row, output in zip(rows, outputs, strict=True):
                logits[row] = output[: len(windows[row].ids)]
            done += len(rows)
            tell(done * len(asked) // len(windows))
        found, start = [], 0
        for prompt in asked:
            stop = start + len(prompt.windows)
            own = logits[start:stop]
            found.append(predicted(own, prompt.windows, prompt.question, self.data, nullable=self.nullable))
            start = stop
        if len(found) == len(self.prompts):
            self.known[:] = [*self.known[-1:], (params, found)]
        return found
