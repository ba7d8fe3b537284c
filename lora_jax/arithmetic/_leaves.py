"""What the operations have in common: plain LoRA leaves as matrices and back, and the errors for others."""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._lowrank.labels import widened
from .._paths import is_shape
from .._tree.method import Spec
from .._tree.nodes import Adapter, method_of, Shared
from ..methods import LoRA


product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def lora_leaf(spec: Spec, a: jax.Array, b: jax.Array, *, scale: float = 1.0, dropout: float = 0.0) -> Adapter:
    rank = a.shape[-1]
    method = LoRA(rank=rank, alpha=scale * rank, dropout=dropout, dtype=b.dtype)
    return Adapter({"a": a, "b": b}, dataclasses.replace(spec, method=method, group=None))


def common_dtype(leaves: list[Adapter]) -> Any:
    return functools.reduce(
        jnp.promote_types, [array.dtype for leaf in leaves for array in leaf.arrays.values()]
    )


def common_dropout(leaves: list[Adapter]) -> float:
    found = {method_of(leaf, LoRA).dropout for leaf in leaves}
    return found.pop() if len(found) == 1 else 0.0


def is_plain(leaf: Adapter) -> bool:
    shared = any(isinstance(array, Shared) for array in leaf.arrays.values())
    return type(leaf.spec.method) is LoRA and leaf.spec.method.blocks is None and not shared


def check_plain(path: str, leaf: Adapter) -> None:
    if not is_plain(leaf):
        method, more = leaf.spec.method, ""
        if isinstance(method, LoRA):
            more = " with `blocks`" if method.blocks else " that shares its arrays with another leaf"
        raise ValueError(
            f"the adapter of {path!r} is {method.name}{more}, and only plain LoRA adapters have an A and a B "
            "to compute with. "
            "Make plain ones first: `frozen, delta = lora_jax.arithmetic.as_lora(frozen, delta)`."
        )
    check_single(path, leaf)


def check_single(path: str, leaf: Adapter) -> None:
    if any(leaf.arrays[name].ndim != len(axes) for name, axes in leaf.array_axes().items()):
        raise ValueError(
            f"the adapter of {path!r} is a stack of several. Pick one with `take(stacked, 0)`, or "
            "`jax.vmap` this over them."
        )


def check_rank(rank: Any) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"`rank` is {rank!r}; it must be a positive integer.")


def check_arrays(call: str, **trees: Any) -> None:
    if any(map(is_shape, jax.tree.leaves(trees))):
        names = ", ".join(trees)
        raise TypeError(
            f"`{call}` computes with arrays, and was given shapes (`jax.ShapeDtypeStruct`). For the shapes "
            f"of its result: `jax.eval_shape(lambda {names}: {call}, {names})`."
        )


def decomposed(a: jax.Array, b: jax.Array, scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`s·A·B = U · diag(values) · V`, largest value first. What is decomposed is the product of two
    triangular factors, which is r by r.
    """
    wide = widened(a.dtype)
    left, upper = jnp.linalg.qr(a.astype(wide))
    right, lower = jnp.linalg.qr(b.astype(wide).T)
    u, values, v = jnp.linalg.svd(product(upper, lower.T) * scale, full_matrices=False)
    return product(left, u), values, product(v, right.T)


def balanced(u: jax.Array, values: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    root = jnp.sqrt(values)
    return u * root[None, :], root[:, None] * v


def by_layer(function: Callable, layers: int, *arrays: Any) -> Any:
    """`function` of each layer, one after the other: what one takes is gone before the next."""
    for _ in range(layers):
        function = partial(lambda inner, *rows: lax.map(lambda row: inner(*row), rows), function)
    return function(*arrays)


def matrices_of(leaf: Adapter) -> tuple[jax.Array, jax.Array]:
    """A and B with one in and one out axis."""
    a, b, layers = leaf.arrays["a"], leaf.arrays["b"], leaf.spec.sizes("layer")
    return a.reshape(*layers, -1, a.shape[-1]), b.reshape(*layers, a.shape[-1], -1)


def shaped_like(a: jax.Array, b: jax.Array, leaf: Adapter) -> tuple[jax.Array, jax.Array]:
    layers, ins, outs = (leaf.spec.sizes(word) for word in ("layer", "in", "out"))
    rank = a.shape[-1]
    return a.reshape(*layers, *ins, rank), b.reshape(*layers, rank, *outs)
