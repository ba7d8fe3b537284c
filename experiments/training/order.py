"""Which examples make which step: a pure function of (seed, step), so that a resumed run sees what an
uninterrupted one sees.

Each epoch is its own permutation, drawn from (seed, epoch) by a counter-based generator; nothing of the past
has to be replayed. When the batch does not divide the data, the last batch of an epoch is filled with further
draws, as the authors' loader does, so that every epoch has ceil(N / batch) full batches.
"""

import functools

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
