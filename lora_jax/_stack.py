"""Many adapters of one base: `stack` makes one tree of them, `take` picks from it by index."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._nodes import Adapter, is_node


def stack(deltas: Sequence[Any]) -> Any:
    """One delta with a leading axis for the adapters, padded to the largest rank, with the scales folded into B.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((8, 8))}
    >>> small, large = (lora_jax.lorafy(params, "kernel", method=lora_jax.LoRA(rank=rank)) for rank in (2, 4))
    >>> stacked = lora_jax.stack([small.delta, large.delta])
    >>> stacked["kernel"].arrays["a"].shape
    (2, 8, 4)

    One adapter for each example of a batch, with W unbatched and contracted once:
    `jax.vmap(lambda delta, x: forward(combine(frozen, delta), x))(take(stacked, ids), xs)`.

    Raises:
      ValueError: no delta, or deltas that target different leaves, differ in dropout or blocks.
    """
    deltas = list(deltas)
    if not deltas:
        raise ValueError("`deltas` is empty; pass at least one delta.")
    leaves, treedef = jax.tree.flatten(deltas[0], is_leaf=is_node)
    others = []
    for number, delta in enumerate(deltas[1:], 1):
        found, structure = jax.tree.flatten(delta, is_leaf=is_node)
        if structure != treedef:
            raise ValueError(f"`deltas[{number}]` does not have the containers of `deltas[0]`; stack adapters of one base.")
        others.append(found)
    return jax.tree.unflatten(treedef, [_stacked(group) for group in zip(leaves, *others, strict=True)])


def _stacked(group: tuple) -> Any:
    first = group[0]
    if first is None and all(leaf is None for leaf in group):
        return None
    paths = {leaf.spec.path if isinstance(leaf, Adapter) else type(leaf).__name__ for leaf in group}
    if len(paths) != 1:
        raise ValueError(f"`deltas` do not target the same leaves: one has {first!r} where another has {next(leaf for leaf in group if type(leaf) is not type(first))!r}.")
    if not isinstance(first, Adapter):
        return jnp.stack(group)
    rank = max(leaf.spec.method.rank for leaf in group)
    padded = [leaf.spec.method.at_rank(leaf.arrays, leaf.spec, rank) for leaf in group]
    methods = {method for method, _ in padded}
    if len(methods) != 1:
        raise ValueError(f"`deltas` differ at {first.spec.path!r} in more than rank and scale: {' and '.join(map(str, methods))}.")
    arrays = jax.tree.map(lambda *parts: jnp.stack(parts), *(arrays for _, arrays in padded))
    return Adapter(arrays, _with_method(first.spec, methods.pop()))


def _with_method(spec: Any, method: Any) -> Any:
    import dataclasses

    return dataclasses.replace(spec, method=method)


def take(stacked: Any, ids: Any) -> Any:
    """The adapters at `ids` (an integer, or an array of them) of a stacked delta.

    >>> import jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((8, 8))}
    >>> stacked = lora_jax.stack([lora_jax.lorafy(params, "kernel").delta] * 3)
    >>> lora_jax.take(stacked, jnp.array([2, 0])).get("kernel").arrays["a"].shape
    (2, 8, 8)

    With an array, the result has a leading axis to `vmap` over. Ids out of range are clamped to the last adapter under
    `jit`, as JAX's indexing does; a concrete id out of range raises.

    Raises:
      ValueError: a concrete id out of range.
    """
    leaves = jax.tree.leaves(stacked)
    number = leaves[0].shape[0] if leaves else 0
    if not isinstance(ids, jax.core.Tracer):
        low, high = int(jnp.min(jnp.asarray(ids))), int(jnp.max(jnp.asarray(ids)))
        if low < -number or high >= number:
            raise ValueError(f"`ids` reaches from {low} to {high}, but `stacked` holds {number} adapters.")
    return jax.tree.map(lambda array: jnp.take(array, ids, axis=0, mode="clip"), stacked)
