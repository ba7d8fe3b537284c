"""`scaled` and `weighted`: products with numbers, and exact sums."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._lowrank.labels import scaled_by, widened
from .._paths import named_leaves
from .._tree.nodes import Adapter, is_node, method_of, Shared
from ..methods import LoRA
from ._leaves import check_arrays, check_plain, common_dropout, common_dtype, lora_leaf


_FULL = "what it adds is its value less that of the base, which is not here."


def scaled(delta: Any, factor: Any) -> Any:
    """The adapters that add `factor` times as much to the weights; −1 negates them.

    >>> import jax.numpy as jnp, lora_jax
    >>> delta = lora_jax.lorafy({"kernel": jnp.ones((8, 8))}, "kernel", method=lora_jax.AdaLoRA(rank=2)).delta
    >>> half = lora_jax.arithmetic.scaled(delta, 0.5)

    B is multiplied, so that no other factor compiles anything anew. LoRA, LoRA-FA, AdaLoRA, DyLoRA and VeRA
    adapters, stacked or not, stay what they are, with the same `frozen`.

    Args:
      factor: a number of either sign, or a scalar array, which may be traced.

    Raises:
      ValueError: `factor` is no scalar; a leaf trains itself (`Full`): what it adds is its value less that of
        the base, which is not here; an adapter whose ΔW is not proportional to what it trains (PiSSA,
        Delta-LoRA: use `as_lora` first; DoRA).
      TypeError: `delta` holds shapes.
    """
    check_arrays("scaled(delta, factor)", delta=delta)
    if np.ndim(factor) != 0:
        raise ValueError(
            f"`factor` has the shape {np.shape(factor)}; pass one number. For one each of stacked adapters, "
            "`jax.vmap` this."
        )

    def of_leaf(path: str, leaf: Any) -> Any:
        if leaf is None:
            return None
        if not isinstance(leaf, Adapter):
            raise ValueError(
                f"`delta` holds a leaf that trained itself (`Full`) at {path!r}: {_FULL} Take it out of "
                "`delta` first."
            )
        if not leaf.spec.method.proportional:
            raise ValueError(
                f"what the {leaf.spec.method.name} adapter of {path!r} adds is not proportional "
                "to the arrays in `delta`. Make a plain one "
                "of it first, if it has an additive form (DoRA has none): `frozen, delta = "
                "lora_jax.arithmetic.as_lora(frozen, delta)`."
            )
        b = leaf.arrays["b"]
        return (
            leaf
            if isinstance(b, Shared)
            else dataclasses.replace(leaf, arrays={**leaf.arrays, "b": scaled_by(b, factor)})
        )

    leaves = [of_leaf(path, leaf) for path, leaf in named_leaves(delta, is_leaf=is_node)]
    return jax.tree.unflatten(jax.tree.structure(delta, is_leaf=is_node), leaves)


def weighted(deltas: Sequence[Any], weights: Any) -> Any:
    """One adapter that adds `Σ weight·ΔW`, exactly: the factors side by side, so that ranks add up. PEFT's
    `cat`.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((64, 32))}
    >>> adapter = lambda rank: lora_jax.lorafy(params, "kernel", method=lora_jax.LoRA(rank=rank)).delta
    >>> one, two = adapter(2), adapter(4)
    >>> lora_jax.arithmetic.weighted([one, two], [0.7, -0.3])["kernel"].spec.method.rank
    6
    >>> total = lora_jax.arithmetic.weighted([one, two], [0.7, -0.3])
    >>> lora_jax.arithmetic.compress(total, 4)["kernel"].spec.method.rank  # PEFT's `svd`
    4

    A delta without an adapter at some leaf adds nothing there. The result has alpha = rank, and the dropout
    of the given ones if they have the same, else none. Leaves that train themselves (`Full`) are averaged:
    exact too where the weights sum to 1, because the base then counts once.

    Args:
      deltas: of one base, from different runs of `lorafy`.
      weights: as many numbers, of either sign; an array of them may be traced.

    Raises:
      ValueError: no deltas, or not as many weights; deltas of different bases; adapters that are not plain
        LoRA, or stacked; leaves that train themselves with weights that do not sum to 1, or in some of the
        deltas only.
      TypeError: `deltas` hold shapes.
    """

    def summed(path: str, leaves: list[Adapter], weights: Any) -> Adapter:
        spec, dtype = leaves[0].spec, common_dtype(leaves)
        a = jnp.concatenate([leaf.arrays["a"].astype(dtype) for leaf in leaves], axis=-1)
        b = [
            scaled_by(leaf.arrays["b"].astype(dtype), weight * method_of(leaf, LoRA).scale)
            for weight, leaf in zip(weights, leaves, strict=True)
        ]
        return lora_leaf(
            spec, a, jnp.concatenate(b, axis=len(spec.sizes("layer"))), dropout=common_dropout(leaves)
        )

    return combined(deltas, weights, summed, call="weighted(deltas, weights)", linear=True)


def combined(deltas: Sequence[Any], weights: Any, combine: Callable, *, call: str, linear: bool) -> Any:
    """`combine(path, adapters, weights)` at every leaf, of those deltas that have an adapter there."""
    deltas = list(deltas)
    check_arrays(call, deltas=deltas)
    if not deltas:
        raise ValueError("`deltas` is empty; pass at least one delta.")
    traced = any(isinstance(weight, jax.core.Tracer) for weight in jax.tree.leaves(weights))
    weights = (
        jnp.asarray(weights, jax.dtypes.canonicalize_dtype(float)) if traced else np.asarray(weights, float)
    )
    if weights.shape != (len(deltas),):
        raise ValueError(
            f"`weights` has the shape {weights.shape} for {len(deltas)} deltas; pass one number for each."
        )
    treedef: Any = jax.tree.structure(deltas[0], is_leaf=is_node)
    for number, delta in enumerate(deltas):
        if jax.tree.structure(delta, is_leaf=is_node) != treedef:
            raise ValueError(
                f"`deltas[{number}]` does not have the containers of `deltas[0]`; combine adapters of one "
                "base."
            )
    paths = [path for path, _ in named_leaves(deltas[0], is_leaf=is_node)]
    columns = zip(*(jax.tree.leaves(delta, is_leaf=is_node) for delta in deltas), strict=True)

    def of_leaf(path: str, column: tuple) -> Any:
        here = [index for index, leaf in enumerate(column) if leaf is not None]
        found = [column[index] for index in here]
        if not found:
            return None
        if not any(isinstance(leaf, Adapter) for leaf in found):
            return _averaged(path, column, weights, linear)
        for index, leaf in zip(here, found, strict=True):
            if not isinstance(leaf, Adapter):
                raise ValueError(
                    f"`deltas[{index}]` has a leaf that trained itself (`Full`) at {path!r}, where others "
                    "have an adapter."
                )
            check_plain(path, leaf)
            first = found[0].spec  # an adapter, or this loop would have ended at once
            if (leaf.spec.shape, leaf.spec.axes) != (first.shape, first.axes):
                raise ValueError(
                    f"`deltas[{index}]` is of another base: at {path!r} its weight is {leaf.spec.shape} "
                    f"with axes {' '.join(leaf.spec.axes)!r}, "
                    f"and that of `deltas[{here[0]}]` {first.shape} with {' '.join(first.axes)!r}."
                )
        return combine(path, found, weights[np.array(here)])

    return jax.tree.unflatten(
        treedef, [of_leaf(path, column) for path, column in zip(paths, columns, strict=True)]
    )


def _averaged(path: str, column: tuple, weights: Any, linear: bool) -> jax.Array:
    known = not isinstance(weights, jax.core.Tracer) and not any(leaf is None for leaf in column)
    if not linear or not known or not math.isclose(float(np.sum(weights)), 1.0, abs_tol=1e-6):
        raise ValueError(
            f"`deltas` hold a leaf that trained itself (`Full`) at {path!r}: {_FULL} Only with `weighted`, "
            "where all deltas have it, and for "
            "(concrete) weights that sum to 1 does the base not matter. Take the leaf out of the deltas "
            "first, and combine its values yourself."
        )
    wide = widened(column[0].dtype)
    total = sum(
        jnp.asarray(weight, wide) * leaf.astype(wide) for weight, leaf in zip(weights, column, strict=True)
    )
    return total.astype(column[0].dtype)
