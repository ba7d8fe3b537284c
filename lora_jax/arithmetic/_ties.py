"""`ties` and `dare`: merging rules that leave entries out, so that adapters disturb each other less."""

import numbers
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._lowrank.labels import widened
from .._paths import is_array, path_seed
from .._tree.nodes import Adapter, method_of
from ..methods import LoRA
from ._leaves import (
    balanced,
    by_layer,
    check_rank,
    common_dropout,
    common_dtype,
    lora_leaf,
    matrices_of,
    product,
    shaped_like,
)
from ._sums import combined


def ties(
    deltas: Sequence[Any],
    weights: Any,
    *,
    density: float,
    majority: str | None = "total",
    rank: int | None = None,
) -> Any:
    """Trims every adapter to its largest entries, elects a sign for every entry, and averages the weighted
    entries that have it (TIES-Merging, Yadav et al., NeurIPS 2023, arXiv 2306.01708, section 3).

    >>> import jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((64, 32))}
    >>> one, two = (lora_jax.lorafy(params, "kernel", method=lora_jax.LoRA(rank=4)).delta for _ in range(2))
    >>> merged = lora_jax.arithmetic.ties([one, two], [1.0, 1.0], density=0.2, rank=4)

    With a `rank`, on every ΔW, as the paper does: it is formed, one layer at a time, and the result
    compressed. Without, on A and on B, each by itself, which forms nothing: an approximation with no more to
    it than that adapters from one start may have a basis in common. PEFT's `ties_svd` and `ties`, and without
    `majority` `magnitude_prune_svd` and `magnitude_prune`.

    Args:
      deltas, weights: as in `weighted`. As in PEFT, the weights do not take part in the election, and on A
        and B are split in two roots, the sign to A's.
      density: which part of the entries of each matrix is kept, in (0, 1]; the paper suggests 0.2.
      majority: who is elected: the sign of the sum of the entries (`"total"`), the more frequent sign
        (`"frequency"`), or nobody (None): then the weighted entries are summed.
      rank: of the result.

    Raises:
      ValueError: as in `weighted`; an option out of range; adapters of different ranks without `rank`; a leaf
        trains itself.
      TypeError: `deltas` hold shapes.
    """
    return _thinned(deltas, weights, None, density, majority, rank, "ties(deltas, weights, ...)")


def dare(
    deltas: Sequence[Any],
    weights: Any,
    *,
    density: float,
    key: jax.Array,
    majority: str | None = None,
    rank: int | None = None,
) -> Any:
    """Drops entries of every adapter at random and divides those it keeps by `density`, which leaves the
    expectation as it was; then sums, or goes on as TIES (DARE, Yu et al., ICML 2024, arXiv 2311.03099,
    section 3).

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((64, 32))}
    >>> one, two = (lora_jax.lorafy(params, "kernel", method=lora_jax.LoRA(rank=4)).delta for _ in range(2))
    >>> merged = lora_jax.arithmetic.dare([one, two], [0.5, 0.5], density=0.5, key=jax.random.key(0), rank=4)

    PEFT's `dare_linear_svd` (with a `rank`) and `dare_linear`, and with `majority` `dare_ties_svd` and
    `dare_ties`. Without a `rank` and a `majority`, A and B are summed apart, with the cross terms of PEFT's
    `linear`.

    Args:
      deltas, weights, majority, rank: as in `ties`.
      density: the probability that an entry is kept, in (0, 1].
      key: for the choice; folded with each leaf's path.

    Raises:
      ValueError, TypeError: as in `ties`; `key` is no key.
    """
    if not is_array(key):
        raise TypeError(f"`key` is {key!r}; pass a random key, for example `jax.random.key(0)`.")
    return _thinned(deltas, weights, key, density, majority, rank, "dare(deltas, weights, ...)")


def _thinned(
    deltas: Sequence[Any],
    weights: Any,
    key: Any,
    density: float,
    majority: str | None,
    rank: int | None,
    call: str,
) -> Any:
    if isinstance(density, bool) or not isinstance(density, numbers.Real) or not 0.0 < density <= 1.0:
        raise ValueError(
            f"`density` is {density!r}; it is the part of the entries that is kept: above 0, at most 1, for "
            "example 0.2."
        )
    if majority not in ("total", "frequency", None):
        raise ValueError(f"`majority` is {majority!r}; pass 'total', 'frequency' or None.")
    if rank is not None:
        check_rank(rank)

    def of_leaf(path: str, leaves: list[Adapter], weights: Any) -> Adapter:
        ranks = [method_of(leaf, LoRA).rank for leaf in leaves]
        if rank is None and len(set(ranks)) > 1:
            raise ValueError(
                f"`deltas` have the ranks {', '.join(map(str, ranks))} at {path!r}, and A and B of "
                "different ranks have no entries in common. "
                f"Pass `rank=`, for example {max(ranks)}, which works on ΔW."
            )
        own = None if key is None else jax.random.fold_in(key, path_seed(path))
        number = jax.dtypes.canonicalize_dtype(float)
        weights, scales = (
            jnp.asarray(weights, number),
            jnp.asarray([method_of(leaf, LoRA).scale for leaf in leaves], number),
        )
        dtype = common_dtype(leaves)
        pairs = [tuple(matrix.astype(widened(dtype)) for matrix in matrices_of(leaf)) for leaf in leaves]
        a, b = _thinned_leaf(pairs, scales, weights, own, float(density), majority, rank)
        return lora_leaf(
            leaves[0].spec,
            *shaped_like(a.astype(dtype), b.astype(dtype), leaves[0]),
            dropout=common_dropout(leaves),
        )

    return combined(deltas, weights, of_leaf, call=call, linear=False)


@partial(jax.jit, static_argnums=(4, 5, 6))
def _thinned_leaf(
    pairs: list,
    scales: jax.Array,
    weights: jax.Array,
    key: Any,
    density: float,
    majority: str | None,
    rank: int | None,
) -> tuple:
    layers = pairs[0][0].shape[:-2]

    def merged(matrices: Sequence[jax.Array], weights: jax.Array, key: Any) -> jax.Array:
        keys = [None] * len(matrices) if key is None else jax.random.split(key, len(matrices))
        kept = jnp.stack([_kept(matrix, density, own) for matrix, own in zip(matrices, keys, strict=True)])
        return _elected(kept, weights.astype(kept.dtype), majority)

    def of_layer(pairs: list, key: Any) -> tuple[jax.Array, jax.Array]:
        if rank is not None:
            dense = [
                product(a, b) * scale.astype(a.dtype) for (a, b), scale in zip(pairs, scales, strict=True)
            ]
            u, values, v = jnp.linalg.svd(merged(dense, weights, key), full_matrices=False)
            return balanced(u[:, :rank], values[:rank], v[:rank])
        keys = (None, None) if key is None else jax.random.split(key)
        roots = jnp.sqrt(jnp.abs(weights * scales))
        signs = jnp.where(weights * scales >= 0, 1, -1).astype(roots.dtype)
        return merged([a for a, _ in pairs], signs * roots, keys[0]), merged(
            [b for _, b in pairs], roots, keys[1]
        )

    keys = key if key is None or not layers else jax.random.split(key, layers)
    return by_layer(of_layer, len(layers), pairs, keys)


def _kept(matrix: jax.Array, density: float, key: Any) -> jax.Array:
    """The largest entries; or with a key random ones, for a sum that is as large on average."""
    if key is not None:
        return jnp.where(jax.random.bernoulli(key, density, matrix.shape), matrix / density, 0.0)
    _, largest = lax.top_k(jnp.abs(matrix).reshape(-1), int(density * matrix.size))
    kept = jnp.zeros(matrix.size, bool).at[largest].set(True).reshape(matrix.shape)
    return jnp.where(kept, matrix, 0.0)


def _elected(tensors: jax.Array, weights: jax.Array, majority: str | None) -> jax.Array:
    if majority is None:
        return jnp.tensordot(weights, tensors, 1, precision=lax.Precision.HIGHEST)
    signs = jnp.sign(tensors)
    votes = jnp.sum(tensors if majority == "total" else signs, axis=0)
    agrees = (signs == jnp.where(votes >= 0, 1.0, -1.0).astype(signs.dtype)[None]).astype(tensors.dtype)
    total = jnp.tensordot(weights, tensors * agrees, 1, precision=lax.Precision.HIGHEST)
    return total / jnp.maximum(jnp.sum(agrees, axis=0), 1.0)
