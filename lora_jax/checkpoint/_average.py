"""The running mean of arrays, a leaf at a time, wherever each is."""

from typing import Any

import jax
import jax.numpy as jnp

from .._paths import is_floating


def begin(tree: Any) -> Any:
    """The first sum, for `add` and `mean`: floating leaves are wide enough to be summed."""
    return jax.tree.map(_wide, tree)


def add(total: Any, tree: Any) -> Any:
    return jax.tree.map(_plus, total, tree)


def mean(total: Any, count: int, newest: Any) -> Any:
    """`total / count` with the dtypes and shardings of `newest`, and its leaves that are not floating."""

    def of_leaf(summed: jax.Array, leaf: jax.Array) -> jax.Array:
        return (
            jax.device_put(_divided(summed, count, str(leaf.dtype)), leaf.sharding)
            if is_floating(leaf)
            else leaf
        )

    return jax.tree.map(of_leaf, total, newest)


def _wide(leaf: jax.Array) -> jax.Array:
    return (
        leaf.astype(jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32) if is_floating(leaf) else leaf
    )


@jax.jit
def _plus(total: jax.Array, leaf: jax.Array) -> jax.Array:
    return total + _wide(leaf) if is_floating(leaf) else total


@jax.jit(static_argnums=(1, 2))
def _divided(total: jax.Array, count: int, dtype: str) -> jax.Array:
    return (total / count).astype(dtype)
