"""The views through which a weight reaches its use: `lax` operations on a `Factored`, with a `Factored` as
the result.

Each is the operation on W and, restricted to the axes that they have, on its parts. `NotAView` where no
factors exist.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._packed.lazy import Lazy, on_weight
from .factored import Axis, Factored, NEW, NotAView, PARTS
from .labels import RANK


def transposed(weight: Factored, permutation: Sequence[int]) -> Factored:
    position_of = {old: new for new, old in enumerate(permutation)}
    windowed = None if weight.windowed is None else position_of[weight.windowed]
    return weight.viewed(
        lambda array, labels: (array, tuple(position_of.get(label, label) for label in labels)),
        [weight.axes[old] for old in permutation],
        windowed=windowed,
    )


def squeezed(weight: Factored, dimensions: Sequence[int]) -> Factored:
    """Without these axes, all of size 1."""
    weight = weight.unwindowed(dimensions)
    kept = [index for index in range(len(weight.axes)) if index not in dimensions]
    position_of = {old: new for new, old in enumerate(kept)} | {RANK: RANK}

    def view(array: jax.Array, labels: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
        gone = [position for position, label in enumerate(labels) if label in dimensions]
        return lax.squeeze(array, gone), tuple(
            position_of[label] for label in labels if label not in dimensions
        )

    windowed = None if weight.windowed is None else position_of[weight.windowed]
    array = on_stack(weight.weight, dimensions, lambda array: lax.squeeze(array, dimensions))
    return weight.viewed(view, [weight.axes[index] for index in kept], weight=array, windowed=windowed)


def broadcast(weight: Factored, shape: Sequence[int], dimensions: Sequence[int]) -> Factored:
    """`lax.broadcast_in_dim`. Axes that appear or grow are `new`: the factors do not vary along them."""
    grown = [index for index, new in enumerate(dimensions) if shape[new] != weight.shape[index]]
    kept = [index for index in range(len(weight.axes)) if index not in grown]
    axes = [NEW] * len(shape)
    for index in kept:
        axes[dimensions[index]] = weight.axes[index]
    narrow = squeezed(weight, grown)
    position_of = {narrowed: dimensions[index] for narrowed, index in enumerate(kept)} | {RANK: RANK}
    return narrow.viewed(
        lambda array, labels: (array, tuple(position_of[label] for label in labels)),
        axes,
        weight=on_weight(lambda array: lax.broadcast_in_dim(array, shape, dimensions), weight.weight),
        windowed=None if narrow.windowed is None else position_of[narrow.windowed],
    )


def reshaped(weight: Factored, shape: Sequence[int]) -> Factored:
    """Splits and merges axes. Axes of different kinds cannot be merged: then no factors exist."""
    groups = _reshape_groups(weight.shape, shape)
    axes = [NEW] * len(shape)
    dropped: list[int] = []
    for old, new in groups:
        real = [index for index in old if weight.shape[index] > 1]
        if len({weight.axes[index].tag for index in real}) > 1:
            raise NotAView
        if not real and len(old) == len(new) == 1:
            axes[new[0]] = weight.axes[old[0]]
            continue
        dropped.extend(index for index in old if weight.shape[index] == 1)
        origin = tuple(sorted({stored for index in real for stored in weight.axes[index].origin}))
        for index in new:
            if real and shape[index] > 1:
                axes[index] = Axis(weight.axes[real[0]].tag, origin)
    weight, windowed, windows = _reshape_windows(weight, groups, shape)

    def view(array: jax.Array, labels: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
        sizes, result = [], []
        for label in labels:
            if label == RANK:
                sizes.append(array.shape[labels.index(RANK)])
                result.append(RANK)
            for old, new in groups:
                real = [index for index in old if index not in dropped]
                if real and real[0] == label:
                    members = [index for index in new if axes[index] is not NEW]
                    narrow = math.prod(array.shape[labels.index(index)] for index in real)
                    inner = [shape[index] for index in members[1:]]
                    sizes.extend([narrow // math.prod(inner), *inner][: len(members)])
                    result.extend(members)
        return lax.reshape(array, sizes), tuple(result)

    result = weight.viewed(
        view,
        axes,
        weight=on_weight(lambda array: lax.reshape(array, shape), weight.weight),
        windowed=windowed,
    )
    terms = tuple(term.replace(window=window) for term, window in zip(result.terms, windows, strict=True))
    return result.replace(terms=terms)


def _reshape_windows(
    weight: Factored, groups: list, shape: Sequence[int]
) -> tuple[Factored, int | None, list]:
    """Windows survive where their axis is split so that each covers whole rows of the first new axis."""
    windows = [term.window for term in weight.terms]
    if weight.windowed is None:
        return weight, None, windows
    old, new = next(group for group in groups if weight.windowed in group[0])
    real = [index for index in new if shape[index] > 1]
    row = math.prod(shape[index] for index in real[1:])
    whole = len([index for index in old if weight.shape[index] > 1]) == 1 and real
    if not whole or any(edge % row for window in windows if window for edge in window):
        return weight.unwindowed(), None, [None] * len(windows)
    return weight, real[0], [window and (window[0] // row, window[1] // row) for window in windows]


def sliced(
    weight: Factored, starts: Sequence[int], stops: Sequence[int], strides: Sequence[int] | None
) -> Factored:
    strides = strides or (1,) * len(weight.axes)
    axis = weight.windowed
    if axis is not None and (starts[axis], stops[axis], strides[axis]) != (0, weight.shape[axis], 1):
        if strides[axis] != 1:
            return sliced(weight.unwindowed(), starts, stops, strides)
        return _sliced_apart(
            _sliced_windows(weight, axis, starts[axis], stops[axis]), starts, stops, strides, axis
        )
    return _sliced_apart(weight, starts, stops, strides, axis)


def _sliced_apart(
    weight: Factored, starts: Sequence, stops: Sequence, strides: Sequence, windowed: int | None
) -> Factored:
    """Slices every axis; parts along the windowed axis have been narrowed already."""

    def view(array: jax.Array, labels: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
        narrowed = [label == RANK or label == windowed for label in labels]
        limits = [
            (0, array.shape[position], 1) if skip else (starts[label], stops[label], strides[label])
            for position, (label, skip) in enumerate(zip(labels, narrowed, strict=True))
        ]
        return lax.slice(array, *zip(*limits, strict=True)) if limits else array, labels

    cut = [
        axis
        for axis, size in enumerate(weight.shape)
        if (starts[axis], stops[axis], strides[axis]) != (0, size, 1)
    ]

    def of_weight(array: jax.Array) -> jax.Array:
        limits = [
            (starts[axis], stops[axis], strides[axis]) if axis in cut else (0, size, 1)
            for axis, size in enumerate(array.shape)
        ]
        return lax.slice(array, *zip(*limits, strict=True))

    array = on_stack(weight.weight, cut, of_weight)
    if weight.magnitude is None or windowed is None:
        return weight.viewed(view, weight.axes, weight=array)
    limits = [[ends[label] for label in weight.labels("magnitude")] for ends in (starts, stops, strides)]
    magnitude = lax.slice(weight.magnitude, *limits)
    return weight.replace(magnitude=None).viewed(view, weight.axes, weight=array).replace(magnitude=magnitude)


def _sliced_windows(weight: Factored, axis: int, start: int, stop: int) -> Factored:
    terms = []
    for term in weight.terms:
        first, last = term.window or (0, weight.shape[axis])
        low, high = max(first, start), min(last, stop)
        if low < high:
            parts = {
                name: lax.slice_in_dim(getattr(term, name), low - first, high - first, axis=position)
                for name, position in weight.windowed_parts(term)
            }
            terms.append(term.replace(window=(low - start, high - start), **parts))
    return weight.replace(terms=tuple(terms))


def dynamic_sliced(weight: Factored, starts: Sequence[Any], sizes: Sequence[int]) -> Factored:
    moved = [index for index, size in enumerate(sizes) if size != weight.shape[index]]
    weight = weight.unwindowed(moved)

    def view(array: jax.Array, labels: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
        for position, label in enumerate(labels):
            if label in moved:
                array = lax.dynamic_slice_in_dim(array, starts[label], sizes[label], position)
        return array, labels

    array = on_stack(
        weight.weight, moved, lambda array, *_: view(array, tuple(range(array.ndim)))[0], *starts
    )
    rows = [index for index in moved if sizes[index] == 1 and weight.axes[index].tag == "?"]
    looked_up = (stored for index in rows for stored in weight.axes[index].origin)
    return weight.viewed(view, weight.axes, weight=array, looked_up=(*weight.looked_up, *looked_up))


def flipped(weight: Factored, dimensions: Sequence[int]) -> Factored:
    weight = weight.unwindowed(dimensions)
    return weight.viewed(
        lambda array, labels: (
            lax.rev(array, [p for p, label in enumerate(labels) if label in dimensions]),
            labels,
        ),
        weight.axes,
    )


def unstacked(weight: Factored) -> tuple[list[Any], Callable[[list[Any]], Factored]]:
    """What `scan` over the first axis must slice, and how to make the weight of one step from the slices."""
    weight = weight.unwindowed([0])
    base = weight.weight
    if isinstance(base, Lazy):
        base = base.packed.arrays if base.leads([0]) else base.value()
    named = [
        ("magnitude", weight.magnitude),
        ("key", weight.key),
        *((name, getattr(term, name)) for term in weight.terms for name in PARTS),
    ]
    positions = {
        name: weight.labels(name).index(0)
        for name in (*PARTS, "magnitude", "key")
        if 0 in weight.labels(name)
    }
    scanned = [index for index, (name, array) in enumerate(named) if array is not None and name in positions]

    def rebuild(slices: list[Any]) -> Factored:
        base, *rest = slices
        arrays = [array for _, array in named]
        for index, array in zip(scanned, rest, strict=True):
            arrays[index] = array
        magnitude, key, *parts = arrays
        count = len(PARTS)
        terms = tuple(
            term.replace(**dict(zip(PARTS, parts[i * count : (i + 1) * count], strict=True)))
            for i, term in enumerate(weight.terms)
        )
        if isinstance(base, dict):
            base = Lazy.of(dataclasses.replace(weight.weight.packed, arrays=base), weight.weight.operations)
        windowed = None if weight.windowed is None else weight.windowed - 1
        return weight.replace(
            weight=base, terms=terms, magnitude=magnitude, key=key, axes=weight.axes[1:], windowed=windowed
        )

    return [
        base,
        *(jnp.moveaxis(named[index][1], positions[named[index][0]], 0) for index in scanned),
    ], rebuild


def padded(weight: Factored, array: jax.Array, config: Sequence[tuple[int, int, int]]) -> Factored:
    """`lax.pad`, of which `array` is the result on W. What is padded on has no low-rank part."""
    moved = [index for index, widths in enumerate(config) if tuple(widths) != (0, 0, 0)]
    if any(
        weight.axes[index].tag == "new" or (weight.axes[index].tag == "layer" and weight.key is not None)
        for index in moved
    ):
        raise NotAView
    weight = weight.unwindowed(moved)

    def part(array: jax.Array, name: str) -> jax.Array:
        widths = [config[label] if label in moved else (0, 0, 0) for label in weight.labels(name)]
        fill = jnp.asarray(1.0 if name == "magnitude" else 0.0, array.dtype)
        return lax.pad(array, fill, widths) if any(map(any, widths)) else array

    magnitude = None if weight.magnitude is None else part(weight.magnitude, "magnitude")
    return weight.map_terms(part).replace(weight=array, magnitude=magnitude)


def rescaled(weight: Factored, array: jax.Array, factor: jax.Array, operation: Callable) -> Factored:
    """`W' ⊙ c`, where `array` is `W ⊙ c` and `c` has the axes of W, of size 1 along those on which it does
    not depend.

    A factor that varies along in axes multiplies A, any other B. One that varies along both is no view: a
    mask.
    """
    varying = [index for index, size in enumerate(factor.shape) if size > 1]
    tags = {weight.axes[index].tag for index in varying}
    if (
        "?" in tags
    ):  # In and out are not known yet. What has no other axis is a scale or a bias, and no weight.
        if all(index in varying for index, size in enumerate(weight.shape) if size > 1):
            raise NotAView
        return weight.replace(weight=array)
    if "new" in tags or {"in", "out"} <= tags:
        raise NotAView
    name = "a" if "in" in tags else "b"
    weight = weight.unwindowed(varying)
    labels = weight.labels(name)

    def scaled(part: jax.Array) -> jax.Array:
        own = lax.squeeze(factor, [index for index in range(factor.ndim) if index not in varying])
        order = sorted(range(len(varying)), key=lambda index: labels.index(varying[index]))
        own = lax.broadcast_in_dim(
            lax.transpose(own, order), part.shape, [labels.index(varying[index]) for index in order]
        )
        return operation(part, own.astype(part.dtype))

    return weight.replace(
        weight=array,
        terms=tuple(term.replace(**{name: scaled(getattr(term, name))}) for term in weight.terms),
    )


def along(
    weight: Factored, array: jax.Array, axis: int, operation: Callable[[jax.Array, int], jax.Array]
) -> Factored:
    """A view that changes one axis, given as `operation(part, position of the axis)`: of the parts that
    have it.
    """
    weight = weight.unwindowed([axis])
    if weight.key is not None and axis in weight.labels("key"):
        raise NotAView

    def part(array: jax.Array, name: str) -> jax.Array:
        labels = weight.labels(name)
        return operation(array, labels.index(axis)) if axis in labels else array

    magnitude = None if weight.magnitude is None else part(weight.magnitude, "magnitude")
    return weight.map_terms(part).replace(weight=array, magnitude=magnitude)


def on_stack(weight: Any, axes: Sequence[int], operation: Callable[..., jax.Array], *others: Any) -> Any:
    """A view that changes these axes alone, and depends on `others`. If a packed weight is stacked along
    them, so are the packed arrays: they are cut, and only what is left is unpacked."""
    if isinstance(weight, Lazy) and axes and weight.leads(axes):
        return weight.along_stack(lambda array: operation(array, *others))
    return on_weight(operation, weight, *others)


def _reshape_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The finest pairs of runs of axes, old and new, with equal products."""
    groups, i, j = [], 0, 0
    while i < len(old) and j < len(new):
        first, second, left, right = [i], [j], old[i], new[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                first.append(i)
                left, i = left * old[i], i + 1
            else:
                second.append(j)
                right, j = right * new[j], j + 1
        groups.append((first, second))
    rest = (list(range(i, len(old))), list(range(j, len(new))))
    return [*groups, rest] if rest[0] or rest[1] else groups
