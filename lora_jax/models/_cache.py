"""Keys and values that decoding keeps between its steps: a pytree that the model takes and returns.

It is no linen collection, because decoding loops carry and extend it, and `scan` over the layers maps over it
as over any other array.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp


_SLOTS = (-1, -2)  # the axis of slots, of keys and of values


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far, in slots that all rows of a batch fill together.

    >>> from lora_jax.models import GPT2, GPT2Config
    >>> model = GPT2(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2))
    >>> cache = model.init_cache(batch=3, slots=6)
    >>> len(cache.layers), cache.layers[0][0].shape, cache.mask.shape
    (2, (3, 2, 4, 6), (3, 6))

    A padding token takes a slot too, with false in `mask`. So shapes and the next slot are the same for every
    row, and a step compiles once.
    """

    # (keys, values), of shapes (B, H, K, S) and (B, H, S, K): one pair a layer, or one pair with a leading
    # layer axis (`scan`). This is how the two products of attention take them, so that a step transposes no
    # slot that was written before.
    layers: tuple
    mask: jax.Array  # (B, S) bool: true where a slot holds a real token
    positions: jax.Array  # (B, S) int32: of these tokens
    length: jax.Array  # () int32: slots filled

    def extended(self, slots: int) -> "Cache":
        """The same cache with `slots` more, which are empty. It may have more slots than the model has
        positions, where beams share a row.
        """

        def padded(x, axis):
            return jnp.pad(x, [(0, slots if each == axis % x.ndim else 0) for each in range(x.ndim)])

        def of(pair):
            return tuple(padded(x, axis) for x, axis in zip(pair, _SLOTS, strict=True))

        scanned = not isinstance(self.layers[0], tuple)
        layers = of(self.layers) if scanned else tuple(map(of, self.layers))
        return Cache(layers, padded(self.mask, -1), padded(self.positions, -1), self.length)


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
    """The keys and values in all slots, as `Cache` has them, after those of the new tokens, each
    (B, T, H, K), are written.
    """
    if slots[0].dtype != new[0].dtype:
        raise TypeError(
            f"`cache` holds {slots[0].dtype} and the model computes in {new[0].dtype}; make it with "
            f"`model.init_cache(batch, slots, dtype=jnp.{new[0].dtype})`."
        )
    keys_BxTxHxK, values_BxTxHxK = new
    placed = (keys_BxTxHxK.transpose(0, 2, 3, 1), values_BxTxHxK.transpose(0, 2, 1, 3))
    return tuple(
        jax.lax.dynamic_update_slice_in_dim(old, x, start, axis=axis)
        for old, x, axis in zip(slots, placed, _SLOTS, strict=True)
    )
