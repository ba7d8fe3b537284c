"""The canonical form of an adapted leaf: what its method makes of its arrays, ready for views and uses."""

import dataclasses
from typing import Any

import jax

from .._lowrank.factored import Axis, Factored, Leaf, PLAIN
from .._packed.lazy import Lazy
from .._packed.packed import Packed
from .._paths import path_seed
from .nodes import Adapted


def factored(node: Adapted) -> Factored:
    """The canonical form of an adapted leaf, with its dropout key folded with its path and split per
    layer.
    """
    spec, weight = node.adapter.spec, node.weight
    sliced = len(spec.shape) - weight.ndim
    if sliced > 0 and set(spec.axes[:sliced]) == {"layer"}:
        # The user's own loop over the combined tree has cut these axes off.
        spec = dataclasses.replace(spec, shape=spec.shape[sliced:], axes=spec.axes[sliced:])
    if tuple(weight.shape) != spec.shape and spec.method.needs_whole_weight:
        raise ValueError(
            f"the {type(spec.method).__name__} adapter of {spec.path!r} needs the whole weight, of shape "
            f"{spec.shape}, and has a part of it, {tuple(weight.shape)}: "
            "a `shard_map` that splits weights belongs inside of the adapted function, "
            "`adapt(shard_map(fn))`."
        )
    terms, magnitude, dropout = spec.method.canonical(weight, node.fixed, node.adapter.arrays, spec, node.key)
    key = None
    if node.key is not None and dropout > 0.0:
        key = jax.random.fold_in(node.key, path_seed(spec.path))
        if spec.sizes("layer"):
            key = jax.random.split(key, spec.sizes("layer"))
    windows = any(term.window is not None for term in terms)
    return Factored(
        weight=Lazy.of(weight) if isinstance(weight, Packed) else weight,
        terms=terms,
        magnitude=magnitude,
        key=key,
        axes=tuple(Axis(word, (index,)) for index, word in enumerate(spec.axes)),
        leaf=Leaf((spec.path,), dropout),
        windowed=spec.axis_indices("out")[0] if windows else None,
    )


def weight_in(leaf: Any) -> Factored | None:
    """The weight of a leaf that the interpreter follows: an adapted one, or a packed one, which is unpacked
    where it is used; None of any other leaf.
    """
    if isinstance(leaf, Adapted):
        return factored(leaf)
    if isinstance(leaf, Packed):
        axes = tuple(Axis(PLAIN, (index,)) for index in range(leaf.ndim))
        return Factored(Lazy.of(leaf), (), None, None, axes, Leaf(("a packed leaf",)))
    return None
