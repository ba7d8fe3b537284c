"""Checkpoints of a training run, with Orbax: adapter, optimiser state, step, data position and random key.

The base is not stored, nor what a method keeps beside it in `frozen`: the same `lorafy`, with the same key,
makes that again. A fingerprint tells whether the base is the same. `identity` holds a short text for whatever
must not change between two starts of a run, and a checkpoint of another identity is refused, by name. Arrays
are stored under their paths, not by the shape of a pytree class, so that a checkpoint outlives changes of the
classes around them. A checksum tells whether a checkpoint is damaged. Left out: where and how often to save,
which the trainer decides.
"""

from ._checkpoints import Checkpoints as Checkpoints, NoneIntact as NoneIntact, State as State
from ._checksum import fingerprint as fingerprint
