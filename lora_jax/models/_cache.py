"""Keys and values that decoding keeps between its steps: a pytree that the model takes and returns.

It is no linen collection, because decoding loops carry and extend it, and `scan` over the layers maps over it
as over any other array.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far, in slots that all rows of a batch fill together.

    A padding token takes a slot too, with false in `mask`. So shapes and the next slot are the same for every
    row, and a step compiles once.
    """

    # (keys, values), each (B, S, H, K): one pair a layer, or one pair with a leading layer axis (`scan`).
    layers: tuple
    mask: jax.Array  # (B, S) bool: true where a slot holds a real token
    positions: jax.Array  # (B, S) int32: of these tokens
    length: jax.Array  # () int32: slots filled

    def extended(self, slots: int) -> "Cache":
        """The same cache with `slots` more, which are empty. It may have more slots than the model has
        positions, where beams share a row.
        """
        layers = jax.tree.map(
            lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, slots), (0, 0), (0, 0)]), self.layers
        )
        mask, positions = (jnp.pad(x, [(0, 0), (0, slots)]) for x in (self.mask, self.positions))
        return Cache(layers, mask, positions, self.length)


def advance(cache: Cache, mask_BxT, shape: tuple[int, int], position_ids=None, *, limit: int):
    """The slots that the new tokens attend to, (B, 1, T, S), their positions (B, T), and the cache that
    counts them. `shape` is that of the tokens. Positions default to the number of real tokens before, and to
    `limit`, which no token has, where the cache is full.
    """
    batch, tokens = shape
    slots = cache.mask.shape[1]
    mask_BxT = jnp.ones(shape, bool) if mask_BxT is None else mask_BxT
    if position_ids is None:
        before_Bx1 = cache.mask.sum(-1, keepdims=True, dtype=jnp.int32)
        position_BxT = jnp.maximum(before_Bx1 + jnp.cumsum(mask_BxT, -1, dtype=jnp.int32) - 1, 0)
        # A write into a full cache would overwrite it in silence. `limit` makes the logits NaN.
        position_BxT = jnp.where(cache.length + tokens <= slots, position_BxT, limit)
    else:
        position_BxT = jnp.broadcast_to(jnp.asarray(position_ids, jnp.int32), shape)
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=cache.length, axis=1)
    mask_BxS, position_BxS = put(cache.mask, mask_BxT), put(cache.positions, position_BxT)
    past_TxS = jnp.arange(slots)[None, :] <= cache.length + jnp.arange(tokens)[:, None]
    mask_Bx1xTxS = mask_BxS[:, None, None, :] & past_TxS[None, None]
    chex.assert_shape(mask_Bx1xTxS, (batch, 1, tokens, slots))
    return mask_Bx1xTxS, position_BxT, Cache(cache.layers, mask_BxS, position_BxS, cache.length + tokens)


def write(slots, new, start):
    """The keys and values in all slots, each (B, S, H, K), after those of the new tokens are written."""
    if slots[0].dtype != new[0].dtype:
        raise TypeError(
            f"`cache` holds {slots[0].dtype} and the model computes in {new[0].dtype}; make it with "
            f"`model.init_cache(batch, slots, dtype=jnp.{new[0].dtype})`."
        )
    return tuple(
        jax.lax.dynamic_update_slice_in_dim(old, x, start, axis=1) for old, x in zip(slots, new, strict=True)
    )
