"""`merge` folds adapters into plain weights, `unmerge` takes them out again, `merge_report` says what
rounding costs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ._lowrank.labels import widened
from ._packed.lazy import value_of
from ._packed.packed import Packed
from ._paths import is_shape, named_leaves
from ._table import table
from ._tree.canonical import factored
from ._tree.nodes import Adapted, Adapter, Fixed, is_node, Trained, weight_of
from ._tree.pairs import paired


_BASES = ("dequantized", "original")
# Not None, which is the delta of a leaf without an adapter.
_MISSING: Any = object()


def merge(frozen: Any, delta: Any = _MISSING, *, base: str = "dequantized") -> Any:
    """Plain parameters `(W + A·B) ⊙ m`, with the treedef, shapes, dtypes and shardings of the original.

    >>> import jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((4, 4), jnp.bfloat16)}
    >>> merged = lora_jax.merge(*lora_jax.lorafy(params, "kernel", method=lora_jax.LoRA(rank=1)))
    >>> merged["kernel"].dtype, bool((merged["kernel"] == params["kernel"]).all())
    (dtype(bfloat16), True)

    Computed in float32, or in the weight's dtype if that is wider, and cast once; `merge_report` says what
    the cast loses. `frozen` is not changed; leaves without an adapter are the same arrays as in `frozen`.

    Args:
      frozen, delta: the two trees of `lorafy`, or later states of them.
      base: which base a quantised weight is merged into. `"dequantized"`: the one that the adapter was
        trained beside, with the values it was quantised to, so that the merged model computes what the
        adapted one did. `"original"`: the one from before; pass the `frozen` of `lorafy` then, since a
        quantised leaf does not hold it. Plain weights do not care.

    Raises:
      ValueError: the trees do not belong together; `base` is unknown, or `"original"` with quantised leaves.
      TypeError: `delta` is missing.
    """
    if delta is _MISSING:
        combined = any(
            isinstance(leaf, Adapted | Trained) for leaf in jax.tree.leaves(frozen, is_leaf=is_node)
        )
        raise TypeError(
            "`delta` is missing: "
            + (
                "the first argument is a combined tree. Take it apart: `merge(*partition(tree))`."
                if combined
                else "pass the two trees of `lorafy`, `merge(frozen, delta)`."
            )
        )
    if base not in _BASES:
        raise ValueError(f"`base` is {base!r}; pass one of {', '.join(map(repr, _BASES))}.")
    if base == "original":
        packed = [
            path
            for path, leaf in named_leaves(frozen, is_leaf=is_node)
            if isinstance(weight_of(leaf), Packed)
        ]
        if packed:
            raise ValueError(
                f"`base` is 'original', but `frozen` is quantised (at {packed[0]!r} and {len(packed) - 1} "
                "more): its original values are gone. "
                "Pass the `frozen` that `lorafy` returned, from before `quantize`."
            )
    return paired(_merged, frozen, delta)


def _merged(frozen: Any, delta: Any) -> Any:
    if delta is not None and not isinstance(delta, Adapter):
        return delta
    weight = weight_of(frozen) if delta is None else mergeable(frozen, delta).weight
    if any(map(is_shape, jax.tree.leaves(weight))):
        return jax.ShapeDtypeStruct(weight.shape, weight.dtype) if isinstance(weight, Packed) else weight
    if delta is None:
        return value_of(weight)
    node = mergeable(frozen, delta)
    return _placed(_dense(node), node.weight)


def mergeable(weight: Any, delta: Adapter) -> Adapted:
    """The two as one node without a path, so that leaves of equal shape share one compilation."""
    node, spec = Adapted(weight, delta), delta.spec
    if tuple(node.weight.shape) != spec.shape:
        raise ValueError(
            f"`delta` was made for a leaf {spec.path!r} of shape {spec.shape}, and here it has the shape "
            f"{tuple(node.weight.shape)}: "
            "this is another base, or a stack of bases, which `jax.vmap` maps over."
        )
    for name, axes in delta.array_axes().items():
        if delta.arrays[name].ndim != len(axes):
            raise ValueError(
                f"`delta` holds {name} of shape {delta.arrays[name].shape} at {spec.path!r}, with "
                f"{len(axes)} axes expected: "
                "of stacked adapters, pick one with `take(stacked, 0)`."
            )
    spec = dataclasses.replace(spec, path="")
    weight = dataclasses.replace(weight, spec=spec) if isinstance(weight, Fixed) else weight
    return Adapted(weight, dataclasses.replace(delta, spec=spec))


@jax.jit
def _dense(node: Adapted) -> jax.Array:
    return factored(node).dense()


def _placed(merged: jax.Array, weight: Any) -> jax.Array:
    traced = isinstance(merged, jax.core.Tracer) or not isinstance(weight, jax.Array)
    return merged if traced else jax.device_put(merged, weight.sharding)


def unmerge(params: Any, delta: Any, *, frozen: Any = None) -> Any:
    """Takes `delta` out of merged parameters: the plain weights, to the rounding of their dtype.

    >>> import jax.numpy as jnp, lora_jax
    >>> frozen, delta = lora_jax.lorafy({"kernel": jnp.ones((4, 4))}, "kernel", method=lora_jax.LoRA(rank=1))
    >>> bool(jnp.allclose(lora_jax.unmerge(lora_jax.merge(frozen, delta), delta)["kernel"], 1.0))
    True

    Keep the original parameters instead where you can: a base in bfloat16 does not come back exactly.

    Args:
      params: merged parameters.
      delta: what was merged into them.
      frozen: the other tree of `lorafy`, for methods that keep a part of the adapter there (DoRA, VeRA,
        LoRA-FA, PiSSA, Delta-LoRA).

    Raises:
      ValueError: a leaf trains itself (`Full`), and its old value is gone; the base was quantised, and the
        weights from before are gone; a method needs `frozen`.
    """
    full = [
        path
        for path, leaf in named_leaves(delta, is_leaf=is_node)
        if leaf is not None and not isinstance(leaf, Adapter)
    ]
    if full:
        raise ValueError(
            f"`delta` holds leaves that trained themselves (`Full`): {', '.join(map(repr, full[:8]))}. "
            "Their values before training are "
            "not in it: keep the original parameters to go back."
        )
    beside = jax.tree.map(lambda _: None, params) if frozen is None else frozen
    nodes: list[Any] = []
    paired(lambda leaf, other: nodes.append(None if other is None else Adapted(leaf, other)), beside, delta)
    leaves, treedef = jax.tree.flatten(params, is_leaf=is_node)
    return jax.tree.unflatten(
        treedef, [_unmerged(leaf, node) for leaf, node in zip(leaves, nodes, strict=True)]
    )


def _unmerged(merged: Any, node: Adapted | None) -> Any:
    if node is None:
        return merged
    spec = node.adapter.spec
    if isinstance(node.weight, Packed):
        raise ValueError(
            f"`frozen` is quantised at {spec.path!r}: the weight from before is gone. Keep the original "
            "parameters to go back."
        )
    missing = spec.method.array_axes(spec).keys() - node.adapter.arrays.keys()
    if missing and node.frozen is None:
        raise ValueError(
            f"`unmerge` of the {type(spec.method).__name__} adapter of {spec.path!r} needs "
            f"{', '.join(sorted(missing))}, which the method keeps in "
            "`frozen`: pass `frozen=`, the other tree of `lorafy`."
        )
    return _placed(
        _without(mergeable(merged if node.frozen is None else node.frozen, node.adapter), merged), merged
    )


@jax.jit
def _without(node: Adapted, merged: jax.Array) -> jax.Array:
    return factored(node).removed_from(merged)


@dataclasses.dataclass(frozen=True)
class MergedLeaf:
    """What merging one leaf does: norms are Frobenius norms, `lost` is the part of ΔW that the cast
    rounds away.
    """

    path: str
    dtype: str
    weight_norm: float
    update_norm: float
    lost: float


class MergeReport(list[MergedLeaf]):
    """One `MergedLeaf` a merged leaf. Prints as a table."""

    def __str__(self) -> str:
        rows = [
            (
                leaf.path,
                leaf.dtype,
                f"{leaf.weight_norm:.4g}",
                f"{leaf.update_norm:.4g}",
                f"{leaf.lost:.2%}",
            )
            for leaf in self
        ]
        return table(("leaf", "dtype", "|W|", "|ΔW|", "ΔW lost"), rows, right=(2, 3, 4))

    __repr__ = __str__


def merge_report(frozen: Any, delta: Any) -> MergeReport:
    """How much of each ΔW = W' − W the base's dtype rounds away when it is merged.

    >>> import jax.numpy as jnp, lora_jax
    >>> frozen, delta = lora_jax.lorafy({"kernel": jnp.ones((4, 4))}, "kernel", method=lora_jax.LoRA(rank=1))
    >>> lora_jax.merge_report(frozen, delta)[0].lost
    0.0

    `lost` is |round(W + ΔW) − (W + ΔW)| / |ΔW|: about 0 in float32; in bfloat16 it grows as ΔW shrinks, until
    small updates vanish. Then serve in float32, or keep the adapter apart.
    """
    found: list[MergedLeaf] = []
    paired(
        lambda leaf, other: found.append(_leaf_report(leaf, other)) if isinstance(other, Adapter) else None,
        frozen,
        delta,
    )
    return MergeReport(found)


def _leaf_report(frozen: Any, delta: Adapter) -> MergedLeaf:
    node = mergeable(frozen, delta)
    weight_norm, update_norm, lost_norm = map(float, _norms(node, _dense(node)))
    lost = lost_norm / update_norm if update_norm else 0.0
    return MergedLeaf(delta.spec.path, str(node.weight.dtype), weight_norm, update_norm, lost)


@jax.jit
def _norms(node: Adapted, merged: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    # `merged` is an argument, because XLA leaves out a cast to a narrow dtype and back within one program.
    whole = factored(node)
    wide = widened(whole.dtype)
    exact, before = whole.dense(wide), value_of(whole.weight).astype(wide)
    norm = lambda array: jnp.sqrt(jnp.sum(array * array))
    return norm(before), norm(exact - before), norm(merged.astype(wide) - exact)
