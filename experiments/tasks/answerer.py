"""The predictor of tasks of candidates: a classifier's outputs of each, and one answer a question."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from experiments.tasks.classifier import Classifier
from experiments.tasks.questions import odds
from experiments.tasks.sentences import Asked
from experiments.tasks.task import Task


@dataclass(frozen=True)
class Answerer:
    """The questions of a run and what answers them, whatever the weights."""

    classifier: Classifier
    prompts: tuple[Asked, ...]

    @classmethod
    def create(cls, config: Any, model: Any, tokenizer: Any, prompts: Sequence[Asked]) -> "Answerer":
        return cls(Classifier.create(config, model, tokenizer, ()), tuple(prompts[: config.decode.prompts]))

    @property
    def task(self) -> Task:
        return self.classifier.task

    @property
    def section(self) -> Any:
        return self.classifier.section

    @property
    def labels(self) -> tuple[str, ...]:
        """Of the head's outputs; one compares candidates."""
        return self.classifier.labels

    def texts(
        self, params: Any, count: int | None = None, *, tell: Callable[[int], None] = lambda done: None
    ) -> list[str]:
        """The answer of each of the first `count` questions."""
        asked = self.prompts[:count]
        found = self.odds(params, asked, tell=tell)
        return [question.answer(numbers) for question, numbers in zip(asked, found, strict=True)]

    def odds(
        self,
        params: Any,
        asked: Sequence[Asked],
        *,
        tell: Callable[[int], None] = lambda done: None,
    ) -> list[list[float]]:
        """How likely each candidate of each question is right (`questions.odds`)."""
        inputs = [candidate for question in asked for candidate in question.candidates]
        outputs = self.classifier.outputs(
            params, inputs, tell=lambda done: tell(done * len(asked) // len(inputs))
        )
        found = iter(odds(outputs))
        return [list(islice(found, len(question.candidates))) for question in asked]
