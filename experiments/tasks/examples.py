"""Token sequences of which a part is counted in the loss, and how they become batches of one shape.

Stored end to end in one array: 42,061 sequences of E2E take 10 MB instead of the 86 MB that padding to 512
would. A batch holds `input_ids`, `labels` (the inputs one to the left) and `mask`, which starts at
len(context) - 1, where the first token of the completion is predicted, and is 1 for each token of the
completion.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


# The narrowest batch that is worth a compiled program of its own.
NARROWEST = 16


def padded_width(longest: int, most: int) -> int:
    """How wide a batch is: a power of two, so that a data set needs few programs and short sequences do
    not pay for long ones.
    """
    width = NARROWEST
    while width < longest:
        width *= 2
    return min(width, most)


class Examples:
    """`len(context) + len(completion)` tokens each, given out as padded batches of at most `seq_len`
    positions.
    """

    def __init__(self, pairs: Iterable[tuple[list[int], list[int]]], seq_len: int):
        contexts, lengths, tokens = [], [], []
        for context, completion in pairs:
            contexts.append(len(context))
            lengths.append(len(context) + len(completion))
            tokens.extend(context)
            tokens.extend(completion)
        self.seq_len = seq_len
        self._tokens = np.asarray(tokens, np.int32)
        self._contexts = np.asarray(contexts, np.int64)
        self._lengths = np.asarray(lengths, np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._lengths)])

    def __len__(self) -> int:
        return len(self._contexts)

    def ids(self, index: int) -> np.ndarray:
        """The unpadded tokens of one example."""
        return self._tokens[self._starts[index] : self._starts[index + 1]]

    def width(self, indices: np.ndarray) -> int:
        """How wide a batch of these is."""
        return padded_width(int(self._lengths[np.asarray(indices)].max()), self.seq_len)

    def batch(self, indices: np.ndarray, width: int | None = None) -> dict[str, np.ndarray]:
        """Right-padded with 0; what is longer than `seq_len` loses its end, from the inputs and from the
        mask.

        `width`: of the whole batch, where these are a part of it."""
        width = self.width(indices) if width is None else width
        inputs, labels = np.zeros((2, len(indices), width), np.int32)
        mask = np.zeros((len(indices), width), np.float32)
        for row, index in enumerate(indices):
            ids, context = self.ids(index), self._contexts[index]
            shown, shifted = ids[: self.seq_len], ids[1 : self.seq_len + 1]
            inputs[row, : len(shown)] = shown
            labels[row, : len(shifted)] = shifted
            mask[row, context - 1 : context - 1 + max(len(shown) - context, 0)] = 1
        return {"input_ids": inputs, "labels": labels, "mask": mask}

    def fingerprint(self) -> str:
        """Changes with any token, boundary or length."""
        digest = hashlib.sha256(str(self.seq_len).encode())
        for array in (self._tokens, self._contexts, self._lengths):
            digest.update(array.tobytes())
        return digest.hexdigest()[:32]


class Blocks:
    """One long row of tokens cut into blocks, every token of which is predicted once from those before it
    in its block.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int):
        self.seq_len = seq_len
        self._tokens = np.asarray(tokens, np.int32)

    def __len__(self) -> int:
        return max(len(self._tokens) - 1, 0) // self.seq_len

    def width(self, indices: np.ndarray) -> int:
        return self.seq_len

    def batch(self, indices: np.ndarray, width: int | None = None) -> dict[str, np.ndarray]:
        positions = np.asarray(indices)[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        block = self._tokens[positions]
        return {
            "input_ids": block[:, :-1],
            "labels": block[:, 1:],
            "mask": np.ones(block[:, 1:].shape, np.float32),
        }

    def fingerprint(self) -> str:
        return hashlib.sha256(str(self.seq_len).encode() + self._tokens.tobytes()).hexdigest()[:32]


@dataclass(frozen=True)
class Prompt:
    """One test input: its text, its tokens as in training, and the wordings people gave it."""

    text: str
    ids: tuple[int, ...]
    references: tuple[str, ...]


@dataclass(frozen=True)
class Splits:
    train: Examples | Blocks
    valid: Examples | Blocks
    prompts: tuple[Prompt, ...] = ()
