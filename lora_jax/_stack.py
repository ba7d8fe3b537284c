"""Many adapters of one base: `stack` makes one tree of them, `take` picks from it by index."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._paths import named_leaves
from ._tree.method import Spec
from ._tree.nodes import Adapter, is_node, resolved, Shared


def stack(deltas: Sequence[Any]) -> Any:
    """One delta with a leading axis for the adapters, padded to the largest rank, with the scales folded into
    B.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((8, 8))}
    >>> small, large = (lora_jax.lorafy(params, "kernel", method=lora_jax.LoRA(rank=rank)) for rank in (2, 4))
    >>> stacked = lora_jax.stack([small.delta, large.delta])
    >>> stacked["kernel"].arrays["a"].shape
    (2, 8, 4)

    What a method keeps in `frozen` (LoRA-FA's A, the start of PiSSA and Delta-LoRA) is not stacked: such
    adapters must come from one `frozen`, trained apart. Others first become LoRA: `arithmetic.as_lora`.

    One adapter for each example of a batch, with W unbatched and contracted once:
    `jax.vmap(lambda delta, x: forward(combine(frozen, delta), x))(take(stacked, ids), xs)`.

    Raises:
      ValueError: no delta, or deltas that target different leaves or differ in axes, dropout, blocks or
        dtype.
    """
    deltas = list(deltas)
    if not deltas:
        raise ValueError("`deltas` is empty; pass at least one delta.")
    treedef: Any
    leaves, treedef = jax.tree.flatten(deltas[0], is_leaf=is_node)
    paths = [path for path, _ in named_leaves(deltas[0], is_leaf=is_node)]
    others = []
    for number, delta in enumerate(deltas[1:], 1):
        found, structure = jax.tree.flatten(delta, is_leaf=is_node)
        if structure != treedef:
            raise ValueError(
                f"`deltas[{number}]` does not have the containers of `deltas[0]`; stack adapters of one base."
            )
        others.append(found)
    rows = [leaves, *others]
    groups = zip(paths, zip(*rows, strict=True), zip(*map(resolved, rows), strict=True), strict=True)
    return jax.tree.unflatten(treedef, [_stacked(path, group, whole) for path, group, whole in groups])


def _stacked(path: str, group: tuple, whole: tuple) -> Any:
    adapters = [leaf for leaf in group if isinstance(leaf, Adapter)]
    if not adapters:
        return _stacked_arrays(path, group)
    methods: list[Any] = [leaf.spec.method for leaf in adapters]
    rank = max(method.rank for method in methods)
    group, whole = (tuple(_filled(path, leaf, leaves) for leaf in leaves) for leaves in (group, whole))
    padded = [leaf.spec.method.at_rank(leaf.arrays, leaf.spec, rank) for leaf in whole]
    shared = [
        {name: array for name, array in leaf.arrays.items() if isinstance(array, Shared)} for leaf in group
    ]
    specs = [
        dataclasses.replace(leaf.spec, method=method) for leaf, (method, _) in zip(group, padded, strict=True)
    ]
    if len({getattr(spec.method, "dropout", 0.0) for spec in specs}) > 1:
        # Which matters in training alone: one function cannot drop out at several rates.
        specs = [dataclasses.replace(spec, method=_without_dropout(spec.method)) for spec in specs]
    for number, spec in enumerate(specs):
        if spec != specs[0]:
            raise ValueError(
                f"`deltas[{number}]` differs from `deltas[0]` at {path!r} in {_differences(spec, specs[0])}: "
                "such adapters are different functions. Make plain ones of them first, "
                "`lora_jax.arithmetic.as_lora(frozen, delta)`, or adapt alike."
            )
        if shared[number] != shared[0]:
            raise ValueError(
                f"`deltas[{number}]` differs from `deltas[0]` at {path!r} in what it shares with other "
                f"leaves: {shared[number]} and {shared[0]}."
            )
    arrays = jax.tree.map(lambda *parts: jnp.stack(parts), *(arrays for _, arrays in padded))
    return Adapter(arrays | shared[0], specs[0])


def _stacked_arrays(path: str, group: tuple) -> Any:
    """Leaves that train themselves, which all deltas must have, since the others' values are those of the
    base.
    """
    if all(leaf is None for leaf in group):
        return None
    if any(leaf is None for leaf in group):
        absent = next(number for number, leaf in enumerate(group) if leaf is None)
        raise ValueError(
            f"`deltas[{absent}]` has nothing at {path!r}, where others train the leaf itself (`Full`): its "
            "value is "
            "that of the base, which is not here. Adapt alike, or put the base's leaf there."
        )
    shapes = [tuple(leaf.shape) for leaf in group]
    if len(set(shapes)) > 1:
        raise ValueError(f"`deltas` have arrays of different shapes at {path!r}: {shapes}.")
    return jnp.stack(group)


def _filled(path: str, leaf: Any, leaves: tuple) -> Adapter:
    """`leaf`, or where a delta has no adapter one that adds nothing: the first other one, with zeros."""
    if isinstance(leaf, Adapter):
        return leaf
    other = next(node for node in leaves if isinstance(node, Adapter))
    if leaf is not None or not other.spec.method.proportional:
        kinds = [_kind(node) for node in leaves]
        raise ValueError(
            f"`deltas` do not target the same leaves: at {path!r} they have {', '.join(kinds)}, and a "
            f"{other.spec.method.name} adapter of zeros is not the same as none. Adapt alike."
        )
    return Adapter(jax.tree.map(jnp.zeros_like, other.arrays), other.spec)


def _kind(leaf: Any) -> str:
    if leaf is None:
        return "nothing"
    return "an adapter" if isinstance(leaf, Adapter) else f"an array of shape {tuple(leaf.shape)}"


def _without_dropout(method: Any) -> Any:
    return dataclasses.replace(method, dropout=0.0)


def _differences(spec: Spec, other: Spec) -> str:
    pairs = [("method", spec.method.name, other.method.name)]
    if type(spec.method) is type(other.method):
        names = list(vars(spec.method))
        pairs = [(name, getattr(spec.method, name), getattr(other.method, name)) for name in names]
    pairs += [(name, getattr(spec, name), getattr(other, name)) for name in ("shape", "axes", "group")]
    return ", ".join(f"`{name}` ({one!r} and {two!r})" for name, one, two in pairs if one != two)


def take(stacked: Any, ids: Any) -> Any:
    """The adapters at `ids` (an integer, or an array of them) of a stacked delta.

    >>> import jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((8, 8))}
    >>> stacked = lora_jax.stack([lora_jax.lorafy(params, "kernel").delta] * 3)
    >>> lora_jax.take(stacked, jnp.array([2, 0])).get("kernel").arrays["a"].shape
    (2, 8, 8)

    With an array, the result has a leading axis to `vmap` over. Negative ids count from the end. Ids out of
    range are clamped under `jit`, as JAX's indexing does; a concrete id out of range raises.

    Raises:
      ValueError: a concrete id out of range, or a delta that is not stacked.
    """
    for leaf in jax.tree.leaves(stacked, is_leaf=is_node):
        if isinstance(leaf, Adapter) and any(
            leaf.arrays[name].ndim == len(axes) for name, axes in leaf.array_axes().items()
        ):
            raise ValueError(
                f"`stacked` holds a single adapter at {leaf.spec.path!r}; pass what `stack(deltas)` returns."
            )
    leaves = jax.tree.leaves(stacked)
    number = leaves[0].shape[0] if leaves else 0
    ids = jnp.asarray(ids)
    if not isinstance(ids, jax.core.Tracer) and ids.size:
        low, high = int(jnp.min(ids)), int(jnp.max(ids))
        if low < -number or high >= number:
            raise ValueError(f"`ids` reaches from {low} to {high}, but `stacked` holds {number} adapters.")
    ids = jnp.where(ids < 0, ids + number, ids)  # `clip` below would make them 0
    return jax.tree.map(lambda array: jnp.take(array, ids, axis=0, mode="clip"), stacked)
