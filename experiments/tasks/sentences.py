"""Sentences, or pairs of them, with the one label that each has, and how they become batches of one shape.

A batch holds `input_ids`, `attention_mask` and, where the tokenizer tells a pair's texts apart,
`token_type_ids`, each (B, T); `labels`, (B, 1), a class's number or a score; and `mask`, (B, 1), which is the
weight of the class, and 0 for a row that only fills the batch. Where an example is a question with K
candidates that are compared, these are its rows, and the first three are (B * K, T). Apart from `examples`,
whose rows are texts to be continued.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.tasks.examples import padded_width
from experiments.tasks.splits import Prompt


@dataclass(frozen=True)
class Sentence(Prompt):
    """An input of a classifier. `types`: of its tokens; `index`: its name in its file."""

    types: tuple[int, ...] | None = None
    index: str = ""


@dataclass(frozen=True)
class Asked(Prompt):
    """A question with its candidates, each an input of the classifier. `names`: what an answer calls them;
    `each`: whether every candidate is right or wrong by itself, or the likeliest is the answer; `index`: its
    name in its file.
    """

    candidates: tuple[Sentence, ...] = ()
    names: tuple[str, ...] = ()
    each: bool = False
    index: str = ""

    def chosen(self, odds: Sequence[float]) -> tuple[bool, ...]:
        """Of each candidate, whether it is chosen; `odds`: the logarithms of how likely it is right."""
        if self.each:
            return tuple(one > 0 for one in odds)
        best = max(range(len(odds)), key=odds.__getitem__)
        return tuple(number == best for number in range(len(odds)))

    def answer(self, odds: Sequence[float]) -> str:
        """The name of the candidate that is chosen; with `each`, a 1 or a 0 for every candidate.

        >>> Asked("Who?", (), (), names=("the mill", "the pub")).answer([-2.0, -1.0])
        'the pub'
        >>> Asked("Which?", (), (), each=True).answer([-2.0, 1.0, 0.5])
        '0 1 1'
        """
        chosen = self.chosen(odds)
        return " ".join(str(int(one)) for one in chosen) if self.each else self.names[chosen.index(True)]


class Sentences:
    """Encoded inputs and targets, each the number of one of the `labels` or a score, given out as padded
    batches: an input a target, or as many as the candidates that a question's target counts. `weights`: of
    each class. `asked`: the questions whose candidates the inputs are.
    """

    def __init__(
        self,
        inputs: Sequence[Sentence],
        targets: Sequence[int] | Sequence[float],
        seq_len: int,
        *,
        labels: Sequence[str] = (),
        pad: int = 0,
        weights: Sequence[float] | None = None,
        asked: Sequence[Asked] = (),
    ):
        self.inputs, self.labels, self.asked = tuple(inputs), tuple(labels), tuple(asked)
        self.seq_len, self._pad = seq_len, pad
        self.targets = np.asarray(targets)
        self.rows_each = len(self.inputs) // len(self.targets) if len(self.targets) else 1
        lengths = np.asarray([len(each.ids) for each in self.inputs], np.int64)
        self.lengths = lengths.reshape(-1, self.rows_each).max(1)
        counted = np.ones(len(self.targets)) if weights is None else np.asarray(weights)[self.targets]
        self._counted = counted.astype(np.float32)
        self._typed = bool(self.inputs) and self.inputs[0].types is not None

    def __len__(self) -> int:
        return len(self.targets)

    def size(self, indices: np.ndarray) -> int:
        """How wide a batch of these is; -1 is none."""
        chosen = indices[indices >= 0]
        return padded_width(int(self.lengths[chosen].max(initial=1)), self.seq_len)

    def batch(self, indices: np.ndarray, size: int | None = None) -> dict[str, np.ndarray]:
        """The rows of each example; -1 is none, whose rows count nothing. `size`: of the whole batch, where
        these are a part of it.
        """
        width, count = self.size(indices) if size is None else size, self.rows_each
        ids = np.full((len(indices) * count, width), self._pad, np.int32)
        mask, types = np.zeros((2, *ids.shape), np.int32)
        # A row without any token would have a softmax over nothing.
        mask[:, 0] = 1
        counted = np.zeros((len(indices), 1), np.float32)
        numbers = np.issubdtype(self.targets.dtype, np.integer)
        labels = np.zeros(counted.shape, np.int32 if numbers else np.float32)
        for place, index in enumerate(indices):
            if index < 0:
                continue
            labels[place], counted[place] = self.targets[index], self._counted[index]
            for row, each in enumerate(self.inputs[index * count : (index + 1) * count], place * count):
                ids[row, : len(each.ids)], mask[row, : len(each.ids)] = each.ids, 1
                if each.types is not None:
                    types[row, : len(each.types)] = each.types
        found = {"input_ids": ids, "attention_mask": mask, "labels": labels, "mask": counted}
        return found | ({"token_type_ids": types} if self._typed else {})

    def fingerprint(self) -> str:
        """Changes with any token, type, target, weight or length."""
        digest = hashlib.sha256(f"sentences {self.seq_len} {self._pad}".encode())
        for each in self.inputs:
            digest.update(repr((each.ids, each.types)).encode())
        for array in (self.targets, self._counted):
            digest.update(array.tobytes())
        return digest.hexdigest()[:32]
