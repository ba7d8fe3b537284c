"""Token sequences of which a part is counted in the loss, and how they become batches of one shape.

Stored end to end in one array: 42,061 sequences of E2E take 10 MB instead of the 86 MB that padding to 512
would. A batch holds `input_ids`, (B, T), and what is counted of each row: `columns`, (B, N), after which
`labels`, (B, N), come next. They start at len(context) - 1, where the first token of the completion is
predicted, and are as many as the completion has tokens. `mask`, (B, N), is 1 for these and 0 for the columns
that fill up the row, each of which is column 0. Where every position is counted there are no `columns`, and N
is T. A row may hold several examples. `segment_ids`, (B, T), then number them 1, 2, 3, ..., with 0 at
padding.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

from experiments.tasks.splits import Prompt as Prompt, Splits as Splits


# The smallest difference in width that is worth a compiled program of its own.
NARROWEST = 16
# Of what a batch holds and how wide it is. Random draws depend on both, so that a run of another layout
# cannot be resumed bit for bit.
_LAYOUT = "columns, widths in quarters"


def padded_width(longest: int, most: int) -> int:
    """How wide a batch is: 16, 32, 48, ... up to 128, and from there four widths for each power of two.

    >>> [padded_width(longest, 512) for longest in (5, 53, 80, 129, 300)]
    [16, 64, 80, 160, 320]

    So a data set needs few programs, and short sequences pay little for long ones. Of batches of eight of
    E2E, with GPT-2's tokens, 55% is padding in widths that are powers of two, 34% in these, and 27% in
    widths of their own. The programs are 12 in an epoch, with what `columns` need.
    """
    step = max(NARROWEST, 2 ** (longest - 1).bit_length() // 8)
    return min(-(-max(longest, 1) // step) * step, most)


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

    def packed(self, indices: np.ndarray, rows: int) -> np.ndarray:
        """These examples in so many rows, as `batch` takes them: (rows, most of a row), filled up with -1.

        The longest first, each into the row that is emptiest then, so that the rows are about equally long.
        """
        lengths = np.minimum(self._lengths[indices], self.seq_len)
        filled: list[list[int]] = [[] for _ in range(rows)]
        tokens = [0] * rows
        for place in np.argsort(-lengths, kind="stable"):
            row = tokens.index(min(tokens))
            filled[row].append(int(indices[place]))
            tokens[row] += int(lengths[place])
        most = max(map(len, filled))
        return np.asarray([row + [-1] * (most - len(row)) for row in filled])

    def size(self, indices: np.ndarray) -> tuple[int, int]:
        """T and N of a batch of these."""
        rows = _in_rows(indices)
        lengths = np.where(rows >= 0, np.minimum(self._lengths[rows], self.seq_len), 0)
        counts = np.maximum(lengths - self._contexts[rows], 0)
        width, most = (
            padded_width(int(each.sum(-1).max()), rows.shape[1] * self.seq_len) for each in (lengths, counts)
        )
        return width, most

    def batch(self, indices: np.ndarray, size: tuple[int, int] | None = None) -> dict[str, np.ndarray]:
        """One example a row, or with `indices` of two axes the examples of each row; -1 is none.

        Right-padded with 0; what is longer than `seq_len` loses its end, from the inputs and from what is
        counted. `size`: of the whole batch, where these are a part of it.
        """
        width, most = self.size(indices) if size is None else size
        rows = _in_rows(indices)
        inputs, segments = np.zeros((2, len(rows), width), np.int32)
        columns, labels = np.zeros((2, len(rows), most), np.int32)
        mask = np.zeros((len(rows), most), np.float32)
        for row, several in enumerate(rows):
            start = first = 0  # of the example's columns, and of what is counted of it
            for number, index in enumerate(several[several >= 0], 1):
                ids, context = self.ids(index), self._contexts[index]
                shown = ids[: self.seq_len]
                count = max(len(shown) - context, 0)
                inputs[row, start : start + len(shown)] = shown
                segments[row, start : start + len(shown)] = number
                columns[row, first : first + count] = start + context - 1 + np.arange(count)
                labels[row, first : first + count] = ids[context : context + count]
                mask[row, first : first + count] = 1
                start, first = start + len(shown), first + count
        found = {"input_ids": inputs, "columns": columns, "labels": labels, "mask": mask}
        return found if np.ndim(indices) == 1 else found | {"segment_ids": segments}

    def fingerprint(self) -> str:
        """Changes with any token, boundary or length, and with the layout of batches."""
        digest = hashlib.sha256(f"{_LAYOUT} {self.seq_len}".encode())
        for array in (self._tokens, self._contexts, self._lengths):
            digest.update(array.tobytes())
        return digest.hexdigest()[:32]


def _in_rows(indices: np.ndarray) -> np.ndarray:
    return np.asarray(indices)[:, None] if np.ndim(indices) == 1 else np.asarray(indices)


class Blocks:
    """One long row of tokens cut into blocks, every token of which is predicted once from those before it
    in its block.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int):
        self.seq_len = seq_len
        self._tokens = np.asarray(tokens, np.int32)

    def __len__(self) -> int:
        return max(len(self._tokens) - 1, 0) // self.seq_len

    def size(self, indices: np.ndarray) -> tuple[int, int]:
        return self.seq_len, self.seq_len

    def batch(self, indices: np.ndarray, size: tuple[int, int] | None = None) -> dict[str, np.ndarray]:
        """One block a row; of -1, which is none, nothing is counted."""
        positions = np.asarray(indices)[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        block = self._tokens[positions]
        return {
            "input_ids": block[:, :-1],
            "labels": block[:, 1:],
            "mask": np.ones(block[:, 1:].shape, np.float32) * (np.asarray(indices)[:, None] >= 0),
        }

    def fingerprint(self) -> str:
        return hashlib.sha256(str(self.seq_len).encode() + self._tokens.tobytes()).hexdigest()[:32]
