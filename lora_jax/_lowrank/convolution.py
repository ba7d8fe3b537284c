"""A convolution with a factored weight: `A` is a convolution to or from `rank` channels, and `B` a 1×1 one.

`base` is the operation's own result on the plain weight, as in `contraction.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._packed.lazy import used
from .dropout import dropped_out
from .factored import Base, Factored, NotAView, Term
from .labels import aligned, dot, RANK, scaled_by
from .pending import added
from .product import times


def conv_general_dilated(base: Base, x: jax.Array, weight: Factored, params: dict) -> jax.Array:
    """A convolution: A is the window, to or from `rank` channels, and B a 1×1 convolution behind or before
    it.

    The second form, from out channels to in channels, is what the gradient of the first with respect to its
    input is.
    """
    kernel_spec = params["dimension_numbers"][1]
    tags = [
        weight.axes[axis].tag for axis in kernel_spec
    ]  # of the output channels, the input channels, the window
    if params["batch_group_count"] != 1 or weight.magnitude is not None and tags[0] != "out":
        raise NotAView
    if tags[0] == "out" and set(tags[1:]) == {"in"}:
        return _conv_to_out(base, x, weight, params)
    if tags[:2] == ["in", "out"] and set(tags[2:]) <= {"in"} and params["feature_group_count"] == 1:
        return _conv_to_in(base, x, weight, params)
    raise NotAView


def _window(
    x: jax.Array, weight: Factored, window: jax.Array, first: int, second: int, params: dict, dtype: Any
) -> jax.Array:
    """The convolution with A, whose axes `first` and `second` are the output and the input channels."""
    lhs_spec, kernel_spec, out_spec = params["dimension_numbers"]
    labels = weight.labels("a")
    positions = tuple(labels.index(axis) for axis in (first, second, *kernel_spec[2:]))
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "feature_group_count", "precision")
    return lax.conv_general_dilated(
        *(x, window.astype(x.dtype)),
        **{name: params[name] for name in names},
        dimension_numbers=lax.ConvDimensionNumbers(lhs_spec, positions, out_spec),
        preferred_element_type=dtype,
    )


def _conv_to_out(base: Base, x: jax.Array, weight: Factored, params: dict) -> jax.Array:
    _, kernel_spec, out_spec = params["dimension_numbers"]
    feature, groups = out_spec[1], params["feature_group_count"]
    y = used(base, x, weight.weight)
    weight = weight.plain().unwindowed() if groups > 1 else weight.plain().unwindowed(weight.tagged("in"))
    x, weight = dropped_out(x, weight)

    def product(term: Term) -> jax.Array:
        rank, out = term.b.shape
        # Every group of input channels has the same A: one copy of it each.
        h = _window(
            x, weight, jnp.concatenate([term.a] * groups, axis=-1), RANK, kernel_spec[1], params, y.dtype
        )
        h = scaled_by(h, term.scale).astype(x.dtype)
        h = lax.reshape(h, (*h.shape[:feature], groups, rank, *h.shape[feature + 1 :]))
        b = lax.reshape(term.b.astype(x.dtype), (rank, groups, out // groups))
        before, behind = (
            tuple(f"x{position}" for position in part)
            for part in (range(feature), range(feature + 1, y.ndim))
        )
        options = {"keep": ("group",), "precision": params["precision"], "preferred_element_type": y.dtype}
        grouped = dot(h, (*before, "group", RANK, *behind), b, (RANK, "group", "out"), **options)
        placed = aligned(*grouped, (*before, "group", "out", *behind), ())
        return term.tapped(lax.reshape(placed, (*y.shape[:feature], out, *y.shape[feature + 1 :])), (), ())

    y = added(
        y,
        [(product(term), term.window) for term in weight.terms],
        None if weight.windowed is None else feature,
    )
    return times(
        y,
        ["out" if position == feature else f"x{position}" for position in range(y.ndim)],
        weight.magnitude,
        ("out",),
    )


def _conv_to_in(base: Base, x: jax.Array, weight: Factored, params: dict) -> jax.Array:
    lhs_spec, kernel_spec, _ = params["dimension_numbers"]
    y, feature = used(base, x, weight.weight), lhs_spec[1]
    weight = weight.plain().unwindowed()
    x, weight = dropped_out(x, weight)
    labels = tuple("out" if position == feature else f"x{position}" for position in range(x.ndim))
    narrow = tuple(RANK if label == "out" else label for label in labels)
    for term in weight.terms:
        h = dot(
            x,
            labels,
            term.b.astype(x.dtype),
            (RANK, "out"),
            precision=params["precision"],
            preferred_element_type=y.dtype,
        )
        summand = _window(
            scaled_by(aligned(*h, narrow, ()), term.scale).astype(x.dtype),
            weight,
            term.a,
            kernel_spec[0],
            RANK,
            params,
            y.dtype,
        )
        y = y + term.tapped(summand, (), ())
    return y
