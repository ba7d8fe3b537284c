"""The predictor of tasks of labels: inputs of like length together, in batches of few shapes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments import tasks
from experiments.tasks import Task
from experiments.tasks.classes import text_of
from experiments.tasks.outputs import outputs_of
from experiments.tasks.sentences import Sentence, Sentences


@dataclass(frozen=True)
class Classifier:
    """The test inputs of a run and what labels them, whatever the weights. `labels`: of the head's outputs;
    one is a score. `section`: the config's `decode`, for its `batch`.
    """

    model: Any
    labels: tuple[str, ...]
    section: Any
    prompts: tuple[Sentence, ...]
    task: Task
    pad: int

    @classmethod
    def create(cls, config: Any, model: Any, tokenizer: Any, prompts: Sequence[Sentence]) -> "Classifier":
        pad = getattr(tokenizer, "pad_token_id", None) or 0
        chosen = tuple(prompts[: config.decode.prompts])
        return cls(model, model.config.labels, config.decode, chosen, tasks.of(config.data), pad)

    def texts(
        self, params: Any, count: int | None = None, *, tell: Callable[[int], None] = lambda done: None
    ) -> list[str]:
        """The label of each of the first `count` inputs, or the score as text."""
        found = self.outputs(params, self.prompts[:count], tell=tell)
        return [text_of(row, self.labels) for row in found.tolist()]

    def probabilities(self, params: Any, inputs: Sequence[Sentence]) -> np.ndarray:
        """Of each label, (inputs, labels); a score is as it is."""
        found = self.outputs(params, inputs)
        if len(self.labels) == 1:
            return found
        found = np.exp(found - found.max(-1, keepdims=True))
        return found / found.sum(-1, keepdims=True)

    def outputs(
        self,
        params: Any,
        inputs: Sequence[Sentence],
        *,
        tell: Callable[[int], None] = lambda done: None,
    ) -> np.ndarray:
        """The head's outputs, (inputs, labels) in float32, in the order of `inputs`."""
        longest = max((len(each.ids) for each in inputs), default=1)
        examples = Sentences(inputs, np.zeros(len(inputs), np.int32), longest, pad=self.pad)
        found = np.zeros((len(inputs), len(self.labels)), np.float32)
        done = 0
        for rows, outputs in outputs_of(self.model, params, examples, self.section.batch):
            found[rows] = outputs
            done += len(rows)
            tell(done)
        return found
