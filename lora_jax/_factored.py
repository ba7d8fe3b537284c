"""The canonical form of every adapted weight, `W' = (W + A·B) ⊙ m`, and how its parts follow a view of it.

A model rarely uses a weight as it was stored: it casts, transposes, reshapes, slices and indexes it first. A
`Factored` weight goes through such views without being formed, because each axis of W belongs to A, to B or to both:

    axis of W      in A   in B   in m   in the dropout key
    `layer`         x      x      x      x       stacked: each index has factors of its own
    `in`            x
    `out`                  x      x
    `new`                                        made by a view: every index has the same factors

so that a view of W is the same view of its parts, restricted to the axes they have. The last axis of A and the first
axis of B after the layers is the rank. The views are in `_views.py` and `_joins.py`, the
rules that *use* a weight in `_contract.py`.
"""

import dataclasses
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


@partial(jax.tree_util.register_dataclass, data_fields=["a", "b"], meta_fields=["window", "scale"])
@dataclasses.dataclass(frozen=True)
class Term:
    """One low-rank summand s·A·B. With a `window`, it covers only that range of the weight's windowed axis.

    The scale waits for the narrowest array on the way, x·A: in B it would be a second copy of B, of every layer of a
    stack at once, that lives from the forward to the backward pass.
    """

    a: jax.Array  # (layers…, in…, rank)
    b: jax.Array  # (layers…, rank, out…)
    window: tuple[int, int] | None = None
    scale: float = 1.0

    def replace(self, **changes: Any) -> "Term":
        return dataclasses.replace(self, **changes)

    def times_scale(self, array: jax.Array) -> jax.Array:
        """In float32 at least: a scale rounded to bfloat16 would be wrong in the same direction everywhere."""
        return array if self.scale == 1.0 else (array.astype(widened(array.dtype)) * self.scale).astype(array.dtype)

    def unscaled(self) -> "Term":
        """The same with the scale in B, for what joins terms of different scales."""
        return self.replace(b=self.times_scale(self.b), scale=1.0)


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
            total = total + term.times_scale(place(*product, everything, self.shape))
        if self.magnitude is not None:
            total = total * place(self.magnitude.astype(wide), self.labels("magnitude"), everything, self.shape)
        return total.astype(self.dtype if dtype is None else dtype)

    # --- views ------------------------------------------------------------------------------------------------------

    def viewed(
        self,
        view: Callable[[jax.Array, tuple[int, ...]], tuple[jax.Array, tuple[int, ...]]],
        axes: Sequence[Axis],
        weight: jax.Array | None = None,
        **changes: Any,
    ) -> "Factored":
        """A view of W and of every part. `view` maps an array and its labels to the same of the result."""
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
            terms=tuple(term.replace(a=part(term.a, "a"), b=part(term.b, "b")) for term in self.terms),
            magnitude=part(self.magnitude, "magnitude"),
            key=part(self.key, "key"),
        )

    def map_weight(self, operation: Callable[[jax.Array], jax.Array]) -> "Factored":
        return self.replace(weight=operation(self.weight))

    def map_parts(self, operation: Callable[[jax.Array], jax.Array]) -> "Factored":
        """The same elementwise operation on W and on every floating part."""
        parts = jax.tree.map(operation, (self.weight, self.terms, self.magnitude))
        return self.replace(weight=parts[0], terms=parts[1], magnitude=parts[2])

    def unwindowed(self, axes: Sequence[int] | None = None) -> "Factored":
        """The same weight with its factors padded with zeros, if the windowed axis is among `axes`."""
        if self.windowed is None or (axes is not None and self.windowed not in axes):
            return self
        (name, position), size = self.windowed_part(), self.shape[self.windowed]

        def padded(term: Term) -> Term:
            if term.window is None:
                return term
            factor = getattr(term, name)
            widths = [(0, 0, 0)] * factor.ndim
            widths[position] = (term.window[0], size - term.window[1], 0)
            return term.replace(window=None, **{name: lax.pad(factor, jnp.zeros((), factor.dtype), widths)})

        return self.replace(terms=tuple(map(padded, self.terms)), windowed=None)

    def windowed_part(self) -> tuple[str, int]:
        """The factor that the windows cut, and the position of their axis in it."""
        name = "a" if self.axes[self.windowed].tag == "in" else "b"
        return name, self.labels(name).index(self.windowed)

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
            terms=tuple(term.replace(a=restricted("a"), b=restricted("b")) for term in self.terms),
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
