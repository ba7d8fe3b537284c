"""Checkpoints of a training run, with Orbax: adapter, optimiser state, step, data position and random key.

The base is never stored, nor what a method keeps beside it in `frozen`: that is made again by the same
`lorafy`, with the same key. It is known by a fingerprint, and so is whatever else must not change between the
two halves of a run: `identity` holds a short text for each, and a checkpoint of another identity is refused,
by name. Arrays are stored under their paths, not by the shape of a pytree class, so that a checkpoint
outlives changes of the classes around them. Each carries a checksum, by which a damaged one is known. Left
out: where and how often to save, which is the trainer's business.
"""

from ._checkpoints import Checkpoints as Checkpoints, NoneIntact as NoneIntact, State as State
from ._checksum import fingerprint as fingerprint
