"""The canonical form of every adapted weight, `W' = (W + A·B) ⊙ m`, and the views through which it reaches its use.

A model rarely uses a weight as it was stored: it casts, transposes, reshapes, slices and indexes it first. A
`Factored` weight goes through such views without being formed, because each axis of W belongs to A, to B or to both:

    axis of W      in A   in B   in m   in the dropout key
    `layer`         x      x      x      x       stacked: each index has factors of its own
    `in`            x
    `out`                  x      x
    `new`                                        made by a view: every index has the same factors

so that a view of W is the same view of its parts, restricted to the axes they have. The last axis of A and the first
axis of B after the layers is the rank. The rules that *use* a weight are in `_contract.py`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

RANK = -1  # the label of the rank axis, beside the indices of W's own axes


class Axis(NamedTuple):
    """The word for one axis of a view (`layer`, `in`, `out`, `new`, or `?` while axes are being read), and the axes
    of the stored weight that it runs along."""

    tag: str
    origin: tuple[int, ...] = ()


NEW = Axis("new")


@partial(jax.tree_util.register_dataclass, data_fields=["a", "b"], meta_fields=["window"])
@dataclasses.dataclass(frozen=True)
class Term:
    """One low-rank summand. With a `window`, it covers only that range of the weight's windowed axis."""

    a: jax.Array  # (layers…, in…, rank)
    b: jax.Array  # (layers…, rank, out…)
    window: tuple[int, int] | None = None


class Canonical(NamedTuple):
    """What a method makes of its arrays: the terms whose products are summed, m, and the dropout on their input.

    Windows count along the weight's only out axis.
    """

    terms: tuple[Term, ...]
    magnitude: jax.Array | None = None
    dropout: float = 0.0


@dataclasses.dataclass(frozen=True)
class Leaf:
    """The parameter that a factored weight is a view of, or those that were joined to one."""

    paths: tuple[str, ...]
    dropout: float = 0.0


class NotAView(Exception):
    """This operation cannot keep the weight in factors; the caller decides whether it may be formed."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "terms", "magnitude", "key"],
    meta_fields=["axes", "leaf", "windowed", "looked_up"],
)
@dataclasses.dataclass(frozen=True)
class Factored:
    """A weight `(W + Σ A·B) ⊙ m` that is never formed."""

    weight: jax.Array
    terms: tuple[Term, ...]
    magnitude: jax.Array | None
    key: jax.Array | None
    axes: tuple[Axis, ...]
    leaf: Leaf
    windowed: int | None = None  # the axis along which terms have windows
    looked_up: tuple[int, ...] = ()  # stored axes that an array of indices has picked from

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    def tagged(self, tag: str) -> tuple[int, ...]:
        return tuple(index for index, axis in enumerate(self.axes) if axis.tag == tag)

    def labels(self, part: str) -> tuple[int, ...]:
        """The axes of W, and RANK, that the axes of a part run along, in the order in which it is stored."""
        layers, ins, outs = self.tagged("layer"), self.tagged("in"), self.tagged("out")
        return {"a": (*layers, *ins, RANK), "b": (*layers, RANK, *outs), "magnitude": (*layers, *outs), "key": layers}[part]

    def replace(self, **changes: Any) -> "Factored":
        return dataclasses.replace(self, **changes)

    # --- forming the weight -----------------------------------------------------------------------------------------

    def dense(self, dtype: Any = None) -> jax.Array:
        """W' itself, computed in float32 or in W's dtype if that is wider, and cast once."""
        wide = widened(self.dtype)
        total = self.weight.astype(wide)
        whole = self.unwindowed()
        everything = tuple(range(len(self.axes)))
        for term in whole.terms:
            product = dot(
                *(term.a.astype(wide), whole.labels("a")),
                *(term.b.astype(wide), whole.labels("b")),
                keep=self.tagged("layer"),
                precision=lax.Precision.HIGHEST,
            )
            total = total + place(*product, everything, self.shape)
        if self.magnitude is not None:
            total = total * place(self.magnitude.astype(wide), self.labels("magnitude"), everything, self.shape)
        return total.astype(self.dtype if dtype is None else dtype)

    # --- views ------------------------------------------------------------------------------------------------------

    def _viewed(
        self,
        view: Callable[[jax.Array, tuple[int, ...]], tuple[jax.Array, tuple[int, ...]]],
        axes: Sequence[Axis],
        weight: jax.Array | None = None,
        **changes: Any,
    ) -> "Factored":
        """The view of W and of every part. `view` maps an array and its labels to the same of the result."""
        if weight is None:
            weight, labels = view(self.weight, tuple(range(len(self.axes))))
            weight = lax.transpose(weight, _order(labels, range(len(axes))))
        result = self.replace(weight=weight, axes=tuple(axes), **changes)

        def part(array: jax.Array | None, name: str) -> jax.Array | None:
            if array is None:
                return None
            array, labels = view(array, self.labels(name))
            order = _order(labels, result.labels(name))
            return array if order == tuple(range(len(order))) else lax.transpose(array, order)

        return result.replace(
            terms=tuple(Term(part(term.a, "a"), part(term.b, "b"), term.window) for term in self.terms),
            magnitude=part(self.magnitude, "magnitude"),
            key=part(self.key, "key"),
        )

    def map_weight(self, operation: Callable[[jax.Array], jax.Array]) -> "Factored":
        return self.replace(weight=operation(self.weight))

    def map_parts(self, operation: Callable[[jax.Array], jax.Array]) -> "Factored":
        """The same elementwise operation on W and on every floating part."""
        parts = jax.tree.map(operation, (self.weight, self.terms, self.magnitude))
        return self.replace(weight=parts[0], terms=parts[1], magnitude=parts[2])

    def scaled(self, operation: Callable[[jax.Array], jax.Array]) -> "Factored":
        """`c·W' = (c·W + A·(c·B)) ⊙ m`, where `operation` multiplies by the scalar."""
        terms = tuple(dataclasses.replace(term, b=operation(term.b)) for term in self.terms)
        return self.replace(weight=operation(self.weight), terms=terms)

    def unwindowed(self, axes: Sequence[int] | None = None) -> "Factored":
        """The same weight with its factors padded with zeros, if the windowed axis is among `axes`."""
        if self.windowed is None or (axes is not None and self.windowed not in axes):
            return self
        (name, position), size = self._windowed_part(), self.shape[self.windowed]

        def padded(term: Term) -> Term:
            if term.window is None:
                return term
            factor = getattr(term, name)
            widths = [(0, 0, 0)] * factor.ndim
            widths[position] = (term.window[0], size - term.window[1], 0)
            return dataclasses.replace(term, window=None, **{name: lax.pad(factor, jnp.zeros((), factor.dtype), widths)})

        return self.replace(terms=tuple(map(padded, self.terms)), windowed=None)

    def _windowed_part(self) -> tuple[str, int]:
        """The factor that the windows cut, and the position of their axis in it."""
        name = "a" if self.axes[self.windowed].tag == "in" else "b"
        return name, self.labels(name).index(self.windowed)

    def transposed(self, permutation: Sequence[int]) -> "Factored":
        place_of = {old: new for new, old in enumerate(permutation)}
        windowed = None if self.windowed is None else place_of[self.windowed]
        return self._viewed(
            lambda array, labels: (array, tuple(place_of.get(label, label) for label in labels)),
            [self.axes[old] for old in permutation],
            windowed=windowed,
        )

    def squeezed(self, dimensions: Sequence[int]) -> "Factored":
        """Without these axes, all of size 1."""
        self = self.unwindowed(dimensions)
        kept = [index for index in range(len(self.axes)) if index not in dimensions]
        place_of = {old: new for new, old in enumerate(kept)} | {RANK: RANK}

        def view(array: jax.Array, labels: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
            gone = [position for position, label in enumerate(labels) if label in dimensions]
            return lax.squeeze(array, gone), tuple(place_of[label] for label in labels if label not in dimensions)

        windowed = None if self.windowed is None else place_of[self.windowed]
        return self._viewed(view, [self.axes[index] for index in kept], windowed=windowed)

    def broadcast(self, shape: Sequence[int], dimensions: Sequence[int]) -> "Factored":
        """`lax.broadcast_in_dim`. Axes that appear or grow are `new`: the factors do not vary along them."""
        grown = [index for index, new in enumerate(dimensions) if shape[new] != self.shape[index]]
        kept = [index for index in range(len(self.axes)) if index not in grown]
        axes = [NEW] * len(shape)
        for index in kept:
            axes[dimensions[index]] = self.axes[index]
        narrow = self.squeezed(grown)
        place_of = {narrowed: dimensions[index] for narrowed, index in enumerate(kept)} | {RANK: RANK}
        return narrow._viewed(
            lambda array, labels: (array, tuple(place_of[label] for label in labels)),
            axes,
            weight=lax.broadcast_in_dim(self.weight, shape, dimensions),
            windowed=None if narrow.windowed is None else place_of[narrow.windowed],
        )

    def reshaped(self, shape: Sequence[int]) -> "Factored":
        """Splits and merges axes. Axes of different kinds cannot be merged: then no factors exist."""
        groups = _reshape_groups(self.shape, shape)
        axes = [NEW] * len(shape)
        dropped: list[int] = []
        for old, new in groups:
            real = [index for index in old if self.shape[index] > 1]
            if len({self.axes[index].tag for index in real}) > 1:
                raise NotAView
            if not real and len(old) == len(new) == 1:
                axes[new[0]] = self.axes[old[0]]
                continue
            dropped.extend(index for index in old if self.shape[index] == 1)
            origin = tuple(sorted({stored for index in real for stored in self.axes[index].origin}))
            for index in new:
                if real and shape[index] > 1:
                    axes[index] = Axis(self.axes[real[0]].tag, origin)
        self, windowed, windows = self._reshape_windows(groups, shape)

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

        result = self._viewed(view, axes, weight=lax.reshape(self.weight, shape), windowed=windowed)
        terms = tuple(dataclasses.replace(term, window=window) for term, window in zip(result.terms, windows, strict=True))
        return result.replace(terms=terms)

    def _reshape_windows(self, groups: list, shape: Sequence[int]) -> tuple["Factored", int | None, list]:
        """Windows survive where their axis is split so that each covers whole rows of the first new axis."""
        windows = [term.window for term in self.terms]
        if self.windowed is None:
            return self, None, windows
        old, new = next(group for group in groups if self.windowed in group[0])
        real = [index for index in new if shape[index] > 1]
        row = math.prod(shape[index] for index in real[1:])
        whole = len([index for index in old if self.shape[index] > 1]) == 1 and real
        if not whole or any(edge % row for window in windows if window for edge in window):
            return self.unwindowed(), None, [None] * len(windows)
        return self, real[0], [window and (window[0] // row, window[1] // row) for window in windows]

    def sliced(self, starts: Sequence[int], stops: Sequence[int], strides: Sequence[int] | None) -> "Factored":
        strides = strides or (1,) * len(self.axes)
        axis = self.windowed
        if axis is not None and (starts[axis], stops[axis]) != (0, self.shape[axis]):
            if strides[axis] != 1:
                return self.unwindowed().sliced(starts, stops, strides)
            return self._sliced_windows(starts[axis], stops[axis])._sliced_apart(starts, stops, strides, axis)
        return self._sliced_apart(starts, stops, strides, axis)

    def _sliced_apart(self, starts: Sequence, stops: Sequence, strides: Sequence, windowed: int | None) -> "Factored":
        """Slices every axis; parts along the windowed axis have been narrowed already."""

        def view(array: jax.Array, labels: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
            narrowed = [label == RANK or label == windowed for label in labels]
            limits = [
                (0, array.shape[position], 1) if skip else (starts[label], stops[label], strides[label])
                for position, (label, skip) in enumerate(zip(labels, narrowed, strict=True))
            ]
            return lax.slice(array, *zip(*limits, strict=True)) if limits else array, labels

        weight = lax.slice(self.weight, starts, stops, strides)
        if self.magnitude is None or windowed is None:
            return self._viewed(view, self.axes, weight=weight)
        magnitude, _ = _slice_labelled(self.magnitude, self.labels("magnitude"), starts, stops, strides)
        return self.replace(magnitude=None)._viewed(view, self.axes, weight=weight).replace(magnitude=magnitude)

    def _sliced_windows(self, start: int, stop: int) -> "Factored":
        (name, position), terms = self._windowed_part(), []
        for term in self.terms:
            first, last = term.window or (0, self.shape[self.windowed])
            low, high = max(first, start), min(last, stop)
            if low < high:
                factor = lax.slice_in_dim(getattr(term, name), low - first, high - first, axis=position)
                terms.append(dataclasses.replace(term, window=(low - start, high - start), **{name: factor}))
        return self.replace(terms=tuple(terms))

    def dynamic_sliced(self, starts: Sequence[Any], sizes: Sequence[int]) -> "Factored":
        moved = [index for index, size in enumerate(sizes) if size != self.shape[index]]
        self = self.unwindowed(moved)

        def view(array: jax.Array, labels: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
            for position, label in enumerate(labels):
                if label in moved:
                    array = lax.dynamic_slice_in_dim(array, starts[label], sizes[label], position)
            return array, labels

        return self._viewed(view, self.axes)

    def reversed(self, dimensions: Sequence[int]) -> "Factored":
        self = self.unwindowed(dimensions)
        return self._viewed(
            lambda array, labels: (lax.rev(array, [p for p, label in enumerate(labels) if label in dimensions]), labels),
            self.axes,
        )

    def unstacked(self) -> tuple[list[jax.Array], Callable[[list[jax.Array]], "Factored"]]:
        """What `scan` over the first axis must slice, and how to make the weight of one step from the slices."""
        self = self.unwindowed([0])
        positions = {name: self.labels(name).index(0) for name in ("a", "b", "magnitude", "key") if 0 in self.labels(name)}
        leaves = [("weight", self.weight)]
        leaves += [(name, getattr(term, name)) for term in self.terms for name in ("a", "b")]
        leaves += [("magnitude", self.magnitude), ("key", self.key)]
        positions["weight"] = 0
        scanned = [index for index, (name, array) in enumerate(leaves) if array is not None and name in positions]

        def rebuild(slices: list[jax.Array]) -> "Factored":
            arrays = [array for _, array in leaves]
            for index, array in zip(scanned, slices, strict=True):
                arrays[index] = array
            weight, *factors, magnitude, key = arrays
            terms = tuple(Term(a, b, term.window) for a, b, term in zip(factors[::2], factors[1::2], self.terms, strict=True))
            windowed = None if self.windowed is None else self.windowed - 1
            return self.replace(weight=weight, terms=terms, magnitude=magnitude, key=key, axes=self.axes[1:], windowed=windowed)

        return [jnp.moveaxis(leaves[index][1], positions[leaves[index][0]], 0) for index in scanned], rebuild

    def folded(self, number: Any) -> "Factored":
        """The same weight with other dropout, for one of several uses."""
        if self.key is None:
            return self
        fold = jax.random.fold_in
        for _ in self.key.shape:
            fold = jax.vmap(fold, (0, None))
        return self.replace(key=fold(self.key, number))

    def partition_specs(self, spec: Sequence[Any]) -> "Factored":
        """A tree like this one of partition specs: those of the parts are W's, restricted to their axes."""
        entries = [*spec, *[None] * (len(self.axes) - len(spec))]

        def restricted(name: str) -> jax.sharding.PartitionSpec:
            return jax.sharding.PartitionSpec(*[None if label == RANK else entries[label] for label in self.labels(name)])

        return self.replace(
            weight=jax.sharding.PartitionSpec(*entries),
            terms=tuple(Term(restricted("a"), restricted("b"), term.window) for term in self.terms),
            magnitude=None if self.magnitude is None else restricted("magnitude"),
            key=None if self.key is None else restricted("key"),
        )


def widened(dtype: Any) -> Any:
    """The dtype in which updates are computed: float32, or float64 for float64 weights."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


# --- arrays with labelled axes --------------------------------------------------------------------------------------


def dot(x: jax.Array, x_labels: Sequence, y: jax.Array, y_labels: Sequence, keep: Sequence = (), **options: Any) -> tuple[jax.Array, tuple]:
    """Contracts the labels that both have and that are not in `keep`; those in `keep` are batch axes.

    Returns the product and its labels: batch, free of x, free of y.
    """
    shared = [label for label in x_labels if label in y_labels]
    batch = [label for label in shared if label in keep]
    summed = [label for label in shared if label not in keep]
    free = [label for label in (*x_labels, *y_labels) if label not in shared]
    numbers = tuple(
        tuple([labels.index(label) for label in group] for labels in (tuple(x_labels), tuple(y_labels))) for group in (summed, batch)
    )
    return lax.dot_general(x, y, numbers, **options), (*batch, *free)


def place(x: jax.Array, labels: Sequence, wanted: Sequence, shape: Sequence[int]) -> jax.Array:
    """`x` with its axes in the wanted order, and size 1 along the wanted axes that it lacks: ready to be broadcast."""
    order = tuple(labels.index(label) for label in wanted if label in labels)
    if order != tuple(range(len(order))):
        x = lax.transpose(x, order)
    if len(order) == len(wanted):
        return x
    return lax.broadcast_in_dim(x, shape, [position for position, label in enumerate(wanted) if label in labels])


def _order(labels: Sequence, wanted: Sequence) -> tuple[int, ...]:
    return tuple(list(labels).index(label) for label in wanted)


def _slice_labelled(array: jax.Array, labels: tuple, starts: Sequence, stops: Sequence, strides: Sequence) -> tuple:
    picked = [[limits[label] for label in labels] for limits in (starts, stops, strides)]
    return lax.slice(array, *picked), labels


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
