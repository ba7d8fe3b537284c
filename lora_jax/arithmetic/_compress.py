"""`compress` and `singular_values`: lower ranks, and what they lose."""

from functools import partial
from typing import Any

import jax

from .._paths import named_leaves
from .._tree.nodes import Adapter, is_node, method_of
from ..methods import LoRA
from ._leaves import (
    balanced,
    by_layer,
    check_arrays,
    check_plain,
    check_rank,
    decomposed,
    lora_leaf,
    matrices_of,
    shaped_like,
)


def compress(delta: Any, rank: int) -> Any:
    """The best approximation of every ΔW at a lower rank: its truncated singular value decomposition (Eckart
    and Young, 1936).

    >>> import jax.numpy as jnp, lora_jax
    >>> delta = lora_jax.lorafy({"kernel": jnp.ones((64, 32))}, "kernel", method=lora_jax.LoRA(rank=8)).delta
    >>> {name: array.shape for name, array in lora_jax.arithmetic.compress(delta, 2)["kernel"].arrays.items()}
    {'a': (64, 2), 'b': (2, 32)}

    ΔW is not formed: the decomposition is that of the product of two triangular factors, which is r by r. A
    and B share the singular values, `A = U·√S` and `B = √S·V`, and alpha = rank. Adapters of this rank or
    lower are left as they are, like leaves that train themselves. What is lost is in `singular_values`.

    Args:
      delta: of plain LoRA adapters.
      rank: of the result, for every leaf.

    Raises:
      ValueError: `rank` is not positive; an adapter that is not plain LoRA, or stacked.
      TypeError: `delta` holds shapes.
    """
    check_arrays("compress(delta, rank)", delta=delta)
    check_rank(rank)

    def of_leaf(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, Adapter):
            return leaf
        check_plain(path, leaf)
        method = method_of(leaf, LoRA)
        if method.rank <= rank:
            return leaf
        a, b = _compressed(*matrices_of(leaf), method.scale, rank)
        return lora_leaf(leaf.spec, *shaped_like(a, b, leaf), dropout=method.dropout)

    leaves = [of_leaf(path, leaf) for path, leaf in named_leaves(delta, is_leaf=is_node)]
    return jax.tree.unflatten(jax.tree.structure(delta, is_leaf=is_node), leaves)


def singular_values(delta: Any) -> dict[str, jax.Array]:
    """The singular values of every ΔW by path, largest first: (min(rank, in, out),), layer axes first.

    >>> import jax.numpy as jnp, lora_jax
    >>> delta = lora_jax.lorafy({"kernel": jnp.ones((64, 32))}, "kernel", method=lora_jax.LoRA(rank=8)).delta
    >>> values = lora_jax.arithmetic.singular_values(delta)["kernel"]
    >>> values.shape
    (8,)

    For the choice of a rank: `compress` to r loses `norm(values[r:])` of `norm(values)`, in Frobenius norms.

    Raises:
      ValueError: an adapter that is not plain LoRA, or stacked.
      TypeError: `delta` holds shapes.
    """
    check_arrays("singular_values(delta)", delta=delta)
    found = {}
    for path, leaf in named_leaves(delta, is_leaf=is_node):
        if isinstance(leaf, Adapter):
            check_plain(path, leaf)
            found[path] = _spectrum(*matrices_of(leaf), method_of(leaf, LoRA).scale)
    return found


@partial(jax.jit, static_argnums=(2, 3))
def _compressed(a: jax.Array, b: jax.Array, scale: float, rank: int) -> tuple[jax.Array, jax.Array]:
    def of_layer(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        u, values, v = decomposed(a, b, scale)
        new_a, new_b = balanced(u[:, :rank], values[:rank], v[:rank])
        return new_a.astype(a.dtype), new_b.astype(b.dtype)

    return by_layer(of_layer, a.ndim - 2, a, b)


@partial(jax.jit, static_argnums=2)
def _spectrum(a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    return by_layer(lambda a, b: decomposed(a, b, scale)[1], a.ndim - 2, a, b)
