"""Which examples make which step: a pure function of (seed, step), so that a resumed run sees what an
uninterrupted one sees.

Each epoch is its own permutation, drawn from (seed, epoch) by a counter-based generator; nothing of the past
has to be replayed. When the batch does not divide the data, the last batch of an epoch is filled with further
draws, as the authors' loader does, so that every epoch has ceil(N / batch) full batches.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np


def batches_per_epoch(examples: int, batch: int) -> int:
    return -(-examples // batch)


def epoch_and_position(step: int, examples: int, batch: int) -> tuple[int, int]:
    """The epoch that `step` (counted from 0) belongs to, and its batch within that epoch."""
    return divmod(step, batches_per_epoch(examples, batch))


# The two most recent epochs of each seed are enough: steps only go forward, and a sweep has several seeds.
@functools.lru_cache(maxsize=32)
def _epoch_order(seed: int, epoch: int, examples: int, batch: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=[seed % 2**64, epoch]))
    order = generator.permutation(examples)
    missing = batches_per_epoch(examples, batch) * batch - examples
    return np.concatenate([order, generator.integers(examples, size=missing)])


def indices(seed: int, step: int, examples: int, batch: int) -> np.ndarray:
    """The examples of one step, shape (batch,)."""
    epoch, position = epoch_and_position(step, examples, batch)
    return _epoch_order(seed, epoch, examples, batch)[position * batch : (position + 1) * batch]


def of_run(seed: int, train: Any, examples: Any) -> Callable[[int], np.ndarray]:
    """The examples of each step as a config's `train` says: drawn, or of like length."""
    if train.buckets is None:
        return drawn(seed, len(examples), train.batch)
    return by_length(seed, examples.lengths, train.batch, train.buckets)


def drawn(seed: int, examples: int, batch: int) -> Callable[[int], np.ndarray]:
    """`indices` of a step, (batch,)."""
    return lambda step: indices(seed, step, examples, batch)


def by_length(seed: int, lengths: np.ndarray, batch: int, buckets: int) -> Callable[[int], np.ndarray]:
    """The same, with examples of like length in a batch: the epoch's order is cut into pieces of `buckets`
    batches, each piece is sorted, and the epoch's batches are drawn in another order.

    >>> batches = by_length(0, np.array([9, 1, 8, 2]), batch=2, buckets=2)
    >>> sorted(sorted(batches(step).tolist()) for step in range(2))
    [[0, 2], [1, 3]]
    """
    examples = len(lengths)

    @functools.lru_cache(maxsize=2)
    def of_epoch(epoch: int) -> np.ndarray:
        order, piece = _epoch_order(seed, epoch, examples, batch), batch * buckets
        pieces = (order[start : start + piece] for start in range(0, len(order), piece))
        order = np.concatenate([each[np.argsort(lengths[each], kind="stable")] for each in pieces])
        # Another stream than that of the epoch's order.
        generator = np.random.Generator(np.random.Philox(key=[seed % 2**64, epoch + 2**63]))
        return generator.permutation(order.reshape(-1, batch))

    def of_step(step: int) -> np.ndarray:
        epoch, position = epoch_and_position(step, examples, batch)
        return of_epoch(epoch)[position]

    return of_step
