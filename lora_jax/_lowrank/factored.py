"""The canonical form of every adapted weight, `W' = (W + A·B) ⊙ m`, and how its parts follow a view of it.

A model rarely uses a weight as it was stored: it casts, transposes, reshapes, slices and indexes it first. A
`Factored` weight goes through such views without being formed, because each axis of W belongs to A, to B or
to both:

    axis of W      in A   in B, outer, m   in inner   in the dropout key
    `layer`         x      x                x          x       stacked: each index has factors of its own
    `in`            x
    `out`                  x
    `new`                                                     made by a view: every index has the same factors

so that a view of W is the same view of its parts, restricted to the axes they have. The last axis of A, the
first axis of B after the layers, and the last of inner is the rank. The views are in `views.py` and
`joins.py`, the rules that *use* a weight in `contraction.py`, `convolution.py` and `lookup.py`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._packed.lazy import Lazy, on_weight, value_of
from .labels import aligned, dot, RANK, scaled_by, widened


class Axis(NamedTuple):
    """The word for one axis of a view (`layer`, `in`, `out`, `new`, `plain` of a weight without an adapter,
    or `?` while axes are being read), and the axes of the stored weight that it runs along."""

    tag: str
    origin: tuple[int, ...] = ()


NEW = Axis("new")
PLAIN = "plain"


# An operation on plain arrays: what it is used on, and the weight.
Base = Callable[[jax.Array, jax.Array], jax.Array]
PARTS = ("a", "b", "inner", "outer", "tap")  # of a term, by name


@partial(jax.tree_util.register_dataclass, data_fields=list(PARTS), meta_fields=["window", "scale"])
@dataclasses.dataclass(frozen=True)
class Term:
    """One low-rank summand s·A·diag(inner)·B·diag(outer). With a `window`, it covers only that range of the
    weight's windowed axis.

    The scale and the diagonals wait for the narrow arrays on the way, x·A and the result: in A or B they
    would be second copies of these, of every layer of a stack at once, that live from the forward to the
    backward pass, and their gradients would cost a contraction as large as that of A or B.

    `tap` is a zero whose derivative, whatever is differentiated, is the sum of squares of what the term adds
    (`tapped`).
    """

    a: jax.Array  # (layers…, in…, rank)
    b: jax.Array  # (layers…, rank, out…)
    inner: jax.Array | None = None  # (layers…, rank)
    outer: jax.Array | None = None  # (layers…, out…)
    tap: jax.Array | None = None  # (layers…)
    window: tuple[int, int] | None = None
    scale: float = 1.0

    def replace(self, **changes: Any) -> "Term":
        return dataclasses.replace(self, **changes)

    def unscaled(self) -> "Term":
        """The same with the scale in B, for what joins terms of different scales."""
        return self.replace(b=scaled_by(self.b, self.scale), scale=1.0)

    def tapped(self, summand: jax.Array, labels: Sequence, layers: Sequence) -> jax.Array:
        """`summand`, with its sum of squares for every layer as the derivative with respect to the tap."""
        if self.tap is None:
            return summand
        own = [label for label in layers if label in labels]  # the tap of a vmapped or sliced stack has fewer
        return _tapped(tuple(labels.index(label) for label in own), summand, self.tap)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tapped(layers: tuple[int, ...], summand: jax.Array, tap: jax.Array) -> jax.Array:
    return summand


def _tapped_forward(layers: tuple[int, ...], summand: jax.Array, tap: jax.Array) -> tuple:
    return summand, (summand, tap)


def _tapped_backward(layers: tuple[int, ...], residuals: tuple, cotangent: jax.Array) -> tuple:
    summand, tap = residuals
    rest = [axis for axis in range(summand.ndim) if axis not in layers]
    squares = jnp.sum(jnp.square(summand.astype(tap.dtype)), axis=rest)
    return cotangent, lax.transpose(squares, [sorted(layers).index(axis) for axis in layers])


_tapped.defvjp(_tapped_forward, _tapped_backward)


class Canonical(NamedTuple):
    """What a method makes of its arrays: the terms whose products are summed, m, and the dropout on their
    input.

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

    weight: Any  # an array, or a `Lazy` that will be one where it is used
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
    def ndim(self) -> int:
        return len(self.axes)

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    @property
    def is_plain(self) -> bool:
        """Whether it is W alone, packed: then it may be unpacked anywhere."""
        return not self.terms and self.magnitude is None and isinstance(self.weight, Lazy)

    def tagged(self, tag: str) -> tuple[int, ...]:
        return tuple(index for index, axis in enumerate(self.axes) if axis.tag == tag)

    def labels(self, part: str) -> tuple[int, ...]:
        """The axes of W, and RANK, that the axes of a part run along, in the order in which it is stored."""
        layers, ins, outs = self.tagged("layer"), self.tagged("in"), self.tagged("out")
        if part in ("key", "tap"):
            return layers
        if part in ("magnitude", "outer"):
            return (*layers, *outs)
        return {"a": (*layers, *ins, RANK), "b": (*layers, RANK, *outs), "inner": (*layers, RANK)}[part]

    def replace(self, **changes: Any) -> "Factored":
        return dataclasses.replace(self, **changes)

    # --- forming the weight ---------------------------------------------------------------------------------

    def dense(self, dtype: Any = None) -> jax.Array:
        """W' itself, computed in float32 or in W's dtype if that is wider, and cast once."""
        wide = widened(self.dtype)
        total = value_of(self.weight).astype(wide) + self._update(wide)
        if self.magnitude is not None:
            total = total * self._placed(self.magnitude, wide)
        return total.astype(self.dtype if dtype is None else dtype)

    def removed_from(self, merged: jax.Array) -> jax.Array:
        """W again, from W'."""
        wide = widened(merged.dtype)
        total = merged.astype(wide)
        if self.magnitude is not None:
            total = total / self._placed(self.magnitude, wide)
        return (total - self._update(wide)).astype(merged.dtype)

    def _placed(self, magnitude: jax.Array, dtype: Any) -> jax.Array:
        return aligned(magnitude.astype(dtype), self.labels("magnitude"), range(len(self.axes)), self.shape)

    def _update(self, wide: Any) -> jax.Array:
        """Σ A·B."""
        whole = self.plain().unwindowed()
        everything, total = tuple(range(len(self.axes))), jnp.zeros(self.shape, wide)
        for term in whole.terms:
            product = dot(
                *(term.a.astype(wide), whole.labels("a")),
                *(term.b.astype(wide), whole.labels("b")),
                keep=self.tagged("layer"),
                precision=lax.Precision.HIGHEST,
            )
            total = total + scaled_by(aligned(*product, everything, self.shape), term.scale)
        return total

    # --- views ----------------------------------------------------------------------------------------------

    def viewed(
        self,
        view: Callable[[jax.Array, tuple[int, ...]], tuple[jax.Array, tuple[int, ...]]],
        axes: Sequence[Axis],
        weight: jax.Array | None = None,
        **changes: Any,
    ) -> "Factored":
        """A view of W and of every part. `view` maps an array and its labels to the same of the result."""
        if weight is None:

            def of_weight(array: jax.Array) -> jax.Array:
                array, labels = view(array, tuple(range(len(self.axes))))
                return lax.transpose(array, _order(labels, range(len(axes))))

            weight = on_weight(of_weight, self.weight)
        result = self.replace(weight=weight, axes=tuple(axes), **changes)

        def part(array: jax.Array | None, name: str) -> jax.Array | None:
            if array is None:
                return None
            array, labels = view(array, self.labels(name))
            order = _order(labels, result.labels(name))
            return array if order == tuple(range(len(order))) else lax.transpose(array, order)

        return result.map_terms(part).replace(
            magnitude=part(self.magnitude, "magnitude"), key=part(self.key, "key")
        )

    def map_terms(self, part: Callable[[jax.Array, str], Any]) -> "Factored":
        """`part(array, name)` in place of every part of every term."""
        changed = lambda term: {
            name: part(array, name) for name in PARTS if (array := getattr(term, name)) is not None
        }
        return self.replace(terms=tuple(term.replace(**changed(term)) for term in self.terms))

    def map_weight(self, operation: Callable[[jax.Array], jax.Array]) -> "Factored":
        return self.replace(weight=on_weight(operation, self.weight))

    def map_parts(self, operation: Callable[[jax.Array], jax.Array]) -> "Factored":
        """The same elementwise operation on W and on every floating part."""
        terms, magnitude = jax.tree.map(operation, (self.terms, self.magnitude))
        return self.map_weight(operation).replace(terms=terms, magnitude=magnitude)

    def plain(self) -> "Factored":
        """The same weight with the diagonals of its terms in B, for uses that have no better place for
        them.
        """

        def folded(term: Term) -> Term:
            b, wide = term.b, widened(term.b.dtype)
            for name in ("inner", "outer"):
                if (diagonal := getattr(term, name)) is not None:
                    b = b.astype(wide) * aligned(
                        diagonal.astype(wide), self.labels(name), self.labels("b"), b.shape
                    )
            return term.replace(b=b.astype(term.b.dtype), inner=None, outer=None)

        return self.replace(terms=tuple(map(folded, self.terms)))

    def unwindowed(self, axes: Sequence[int] | None = None) -> "Factored":
        """The same weight with its factors padded with zeros, if the windowed axis is among `axes`."""
        if self.windowed is None or (axes is not None and self.windowed not in axes):
            return self
        size = self.shape[self.windowed]

        def padded(term: Term) -> Term:
            if term.window is None:
                return term
            parts = {}
            for part, position in self.windowed_parts(term):
                array = getattr(term, part)
                widths = [(0, 0, 0)] * array.ndim
                widths[position] = (term.window[0], size - term.window[1], 0)
                parts[part] = lax.pad(array, jnp.zeros((), array.dtype), widths)
            return term.replace(window=None, **parts)

        return self.replace(terms=tuple(map(padded, self.terms)), windowed=None)

    def windowed_parts(self, term: Term) -> list[tuple[str, int]]:
        """The parts of a term that its window cuts, and the position of the windowed axis in each."""
        return [
            (name, self.labels(name).index(self.windowed))
            for name in PARTS
            if getattr(term, name) is not None and self.windowed in self.labels(name)
        ]

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
            return jax.sharding.PartitionSpec(
                *[None if label == RANK else entries[label] for label in self.labels(name)]
            )

        return self.map_terms(lambda _, name: restricted(name)).replace(
            weight=jax.sharding.PartitionSpec()
            if isinstance(self.weight, Lazy)
            else jax.sharding.PartitionSpec(*entries),
            magnitude=None if self.magnitude is None else restricted("magnitude"),
            key=None if self.key is None else restricted("key"),
        )


def _order(labels: Sequence, wanted: Sequence) -> tuple[int, ...]:
    return tuple(list(labels).index(label) for label in wanted)
