"""Contractions with a factored weight: `x W' = ((x W) + (x A) B) ⊙ m`, with any dimension numbers.

Each rule, here as in `convolution.py` and `lookup.py`, takes the operation's own result on the plain weight
as a function (`base`), so that the model's equation stays as it is, and adds the low-rank terms beside it.
Factors are cast to the dtype of the contraction they join. `NotAView` means that no low-rank form exists for
this use.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._kept import named
from .._mesh import moved, sharding_like
from .._packed.lazy import used
from .dropout import dropped_out
from .factored import Base, Factored, NEW, NotAView, Term
from .labels import aligned, dot_labels, RANK, scaled_by
from .pending import Pending
from .product import times, with_factor


def dot_general(
    base: Base,
    x: jax.Array,
    weight: Factored,
    numbers: Any,
    weight_on_left: bool,
    precision: Any,
    reduce: Any = None,
) -> "Pending | jax.Array":
    """`lax.dot_general`: any dimension numbers, the weight on either side. `reduce`: see `with_factor`."""
    (left_summed, right_summed), (left_batch, right_batch) = numbers
    own, other = (left_summed, right_summed) if weight_on_left else (right_summed, left_summed)
    own_batch, other_batch = (left_batch, right_batch) if weight_on_left else (right_batch, left_batch)
    x_labels: list[Any] = [f"x{position}" for position in range(x.ndim)]
    for position, label in zip((*other, *other_batch), (*own, *own_batch), strict=True):
        x_labels[position] = label
    w_free = [label for label in range(len(weight.axes)) if label not in (*own, *own_batch)]
    x_free = [label for label in x_labels if isinstance(label, str)]
    out_labels = (*own_batch, *w_free, *x_free) if weight_on_left else (*own_batch, *x_free, *w_free)

    after, x = _magnitude_side(weight, x, x_labels, out_labels)
    y = used(base, x, weight.weight)
    weight = weight.unwindowed(own_batch)
    x, weight = dropped_out(x, weight)
    # The factors do not vary along new axes: contracting with one is summing over it.
    flat = [position for position, label in enumerate(x_labels) if label in own and weight.axes[label] == NEW]
    x = jnp.sum(x, axis=flat, dtype=x.dtype) if flat else x
    x_labels = [label for position, label in enumerate(x_labels) if position not in flat]

    # Start with the factor that the contraction touches, so that everything in between is as narrow as the
    # rank.
    touched = {weight.axes[label].tag for label in own}
    first, second = ("b", "a") if "out" in touched and "in" not in touched else ("a", "b")

    def product(term: Term) -> jax.Array:
        inner = x
        if weight.windowed in own and term.window is not None:
            inner = lax.slice_in_dim(x, *term.window, axis=x_labels.index(weight.windowed))
        if first == "b":
            inner = times(inner, x_labels, term.outer, weight.labels("outer"))
        h, labels = contracted(
            inner, tuple(x_labels), term, first, (x, x_labels), keep=(*out_labels, *weight.labels(second))
        )
        h = times(named(scaled_by(h, term.scale)), labels, term.inner, weight.labels("inner"))
        # The piece lies as the result does. A part of an axis need not divide as the whole axis does.
        whole = [label if term.window is None or label != weight.windowed else None for label in out_labels]
        h, labels = contracted(h, labels, term, second, (y, whole), keep=out_labels)
        if first == "a":
            h = times(h, labels, term.outer, weight.labels("outer"))
        h = term.tapped(h, labels, weight.labels("tap"))
        shape = list(y.shape)
        if term.window is not None and weight.windowed in out_labels:
            shape[out_labels.index(weight.windowed)] = term.window[1] - term.window[0]
        return aligned(h, labels, out_labels, shape)

    def contracted(
        h: jax.Array, labels: tuple, term: Term, name: str, like: tuple, keep: tuple
    ) -> tuple[jax.Array, tuple]:
        own = weight.labels(name)
        found = dot_labels(own, labels, keep) if weight_on_left else dot_labels(labels, own, keep)
        return with_factor(
            h.astype(x.dtype),
            labels,
            getattr(term, name),
            own,
            keep,
            reduce=reduce,
            factor_on_left=weight_on_left,
            precision=precision,
            preferred_element_type=y.dtype,
            out_sharding=sharding_like(like[0], like[1], found),
        )

    axis = out_labels.index(weight.windowed) if weight.windowed in out_labels else None

    def zeros() -> jax.Array:
        labels = weight.labels(second)
        row = lax.index_in_dim(
            getattr(weight.terms[0], second), 0, axis=labels.index(RANK), keepdims=False
        ).astype(y.dtype)
        labels = tuple(label for label in labels if label != RANK)
        row = moved(lax.stop_gradient(row) * jnp.zeros((), y.dtype), sharding_like(y, out_labels, labels))
        return aligned(row, labels, out_labels, y.shape)

    along = weight.windowed is None and weight.terms and set(weight.labels(second)) <= {RANK, *out_labels}
    pieces = tuple((product(term), term.window) for term in weight.terms)
    total = Pending(y, pieces, axis, zeros if along else None)
    return total if after is None else times(total.value(), out_labels, after, weight.labels("magnitude"))


def _magnitude_side(weight: Factored, x: jax.Array, x_labels: Sequence, out_labels: Sequence) -> tuple:
    """Multiplies by m before the contraction if that sums over the out axes, else returns it for
    afterwards.
    """
    if weight.magnitude is None:
        return None, x
    labels = weight.labels("magnitude")
    if all(label in out_labels for label in labels):
        return weight.magnitude, x
    if all(label in x_labels for label in labels):
        return None, times(x, x_labels, weight.magnitude, labels)
    raise NotAView


def ragged_dot(base: Base, x: jax.Array, weight: Factored, group_sizes: jax.Array, params: dict) -> jax.Array:
    """`lax.ragged_dot`: rows of `x` in runs, each run with the weight of its group; the group axis is a
    `layer`.
    """
    numbers = params["ragged_dot_dimension_numbers"]
    (x_summed, w_summed), (x_batch, w_batch) = numbers.dot_dimension_numbers
    (group,) = numbers.rhs_group_dimensions
    kinds = {weight.axes[label].tag for label in w_summed}
    ragged_rows = all(position not in x_summed for position in numbers.lhs_ragged_dimensions)
    if (
        not ragged_rows
        or x_batch
        or w_batch
        or weight.tagged("layer") != (group,)
        or kinds not in ({"in"}, {"out"})
        or x.ndim != 2
        or len(weight.axes) != 3
    ):
        raise NotAView
    if weight.magnitude is not None or any(term.tap is not None for term in weight.terms):
        raise NotAView
    y = used(base, x, weight.weight)
    weight = weight.plain().unwindowed()
    h0, weight = dropped_out(x, weight)
    order = ("a", "b") if kinds == {"in"} else ("b", "a")
    for term in weight.terms:
        h, summed, rows = h0, x_summed, numbers.lhs_ragged_dimensions
        for name, label in zip(order, (w_summed[0], RANK), strict=True):
            labels = weight.labels(name)
            step = lax.RaggedDotDimensionNumbers(
                dot_dimension_numbers=((tuple(summed), (labels.index(label),)), ((), ())),
                lhs_ragged_dimensions=rows,
                rhs_group_dimensions=[labels.index(group)],
            )
            h = lax.ragged_dot_general(
                *(h.astype(x.dtype), getattr(term, name).astype(x.dtype), group_sizes),
                ragged_dot_dimension_numbers=step,
                precision=params["precision"],
                preferred_element_type=y.dtype,
                group_offset=params["group_offset"],
            )
            h = scaled_by(h, term.scale) if name == order[0] else h
            summed, rows = (1,), [0]
        y = y + h
    return y
