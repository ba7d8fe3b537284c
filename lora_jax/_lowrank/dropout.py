"""Dropout on the input of the low-rank path: which entries are kept, at the price of few random bits."""

import jax
import jax.numpy as jnp

from .._mesh import moved, sharding_like
from .factored import Factored


def dropped_out(x: jax.Array, weight: Factored) -> tuple[jax.Array, Factored]:
    """The input of the low-rank path and the weight for it: if the weight carries a key, `x` with dropout,
    and 1 / (1 - rate) in the scale of every term.
    """
    if weight.key is None or weight.leaf.dropout == 0.0:
        return x, weight
    keep = 1.0 - weight.leaf.dropout
    mask = _kept(weight.key.reshape(-1)[0], keep, x)
    terms = tuple(term.replace(scale=term.scale / keep) for term in weight.terms)
    return jnp.where(mask, x, jnp.zeros((), x.dtype)), weight.replace(terms=terms)


def _kept(key: jax.Array, keep: float, x: jax.Array) -> jax.Array:
    """True with the probability `keep`, to 2^-32, for every entry of `x`.

    Random bits are most of what dropout costs, so that four neighbours along the last axis share a word of
    32. Each compares the word, turned by one byte more, to the threshold. Its own byte decides then, unless
    that is the threshold's, once in 256 times. Two of the four are both kept with a probability within 1/1024
    of keep^2; entries of different words are independent.
    """
    labels = range(x.ndim)
    # The words of a row may be too few to be split as the row is.
    where = sharding_like(x, labels, (*labels[:-1], "words"))
    options = {} if where is None else {"out_sharding": where}
    words = jax.random.bits(key, (*x.shape[:-1], -(-x.shape[-1] // 4)), jnp.uint32, **options)
    threshold = jnp.uint32(min(round(keep * 2**32), 2**32 - 1))
    turned = [words, *((words << by) | (words >> (32 - by)) for by in (8, 16, 24))]
    # Stacked, not compared all at once: the mask is then one array for XLA, which otherwise keeps the words
    # too.
    kept = jnp.stack([word < threshold for word in turned], axis=-1)
    kept = kept.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
    return moved(kept, sharding_like(x, labels, labels))
