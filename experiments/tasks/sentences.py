"""Sentences, or pairs of them, with the one label that each has, and how they become batches of one shape.

A batch holds `input_ids`, `attention_mask` and, where the tokenizer tells a pair's texts apart,
`token_type_ids`, each (B, T); `labels`, (B, 1), a class's number or a score; and `mask`, (B, 1), which is the
weight of the class, and 0 for a row that only fills the batch. Apart from `examples`, whose rows are texts to
be continued.
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


class Sentences:
    """Encoded inputs, each with its target, the number of one of the `labels` or a score, given out as padded
    batches. `weights`: of each class.
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
    ):
        self.inputs, self.labels = tuple(inputs), tuple(labels)
        self.seq_len, self._pad = seq_len, pad
        self.targets = np.asarray(targets)
        self.lengths = np.asarray([len(each.ids) for each in self.inputs], np.int64)
        counted = np.ones(len(self.inputs)) if weights is None else np.asarray(weights)[self.targets]
        self._counted = counted.astype(np.float32)
        self._typed = bool(self.inputs) and self.inputs[0].types is not None

    def __len__(self) -> int:
        return len(self.inputs)

    def size(self, indices: np.ndarray) -> int:
        """How wide a batch of these is; -1 is none."""
        chosen = indices[indices >= 0]
        return padded_width(int(self.lengths[chosen].max(initial=1)), self.seq_len)

    def batch(self, indices: np.ndarray, size: int | None = None) -> dict[str, np.ndarray]:
        """One input a row; -1 is none, whose row counts nothing. `size`: of the whole batch, where these are
        a part of it.
        """
        width, rows = self.size(indices) if size is None else size, len(indices)
        ids = np.full((rows, width), self._pad, np.int32)
        mask, types = np.zeros((2, rows, width), np.int32)
        # A row without any token would have a softmax over nothing.
        mask[:, 0] = 1
        counted = np.zeros((rows, 1), np.float32)
        numbers = np.issubdtype(self.targets.dtype, np.integer)
        labels = np.zeros((rows, 1), np.int32 if numbers else np.float32)
        for row, index in enumerate(indices):
            if index < 0:
                continue
            each = self.inputs[index]
            ids[row, : len(each.ids)], mask[row, : len(each.ids)] = each.ids, 1
            if each.types is not None:
                types[row, : len(each.types)] = each.types
            labels[row], counted[row] = self.targets[index], self._counted[index]
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
