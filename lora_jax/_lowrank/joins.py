"""Weights that are joined to one.

Models join weights at run time (the gates of an LSTM, query, key and value) and stack those of equal layers
to scan over them. Along an `in` or `out` axis the joined weight has the terms of all, each in its window;
along a stacked axis their factors are stacked as the weights are.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._packed.lazy import value_of
from .factored import Axis, Factored, NotAView, PARTS, Term
from .labels import aligned, RANK
from .views import broadcast


def concatenated(operands: Sequence[Any], dimension: int) -> Factored:
    """`lax.concatenate` of weights, or of weights and arrays, which are weights without terms."""
    weights = [operand for operand in operands if isinstance(operand, Factored)]
    first, tag = weights[0], weights[0].axes[dimension].tag
    # While axes are being read, all must also run along the same stored axes: there is one record for the
    # joined weight.
    kinds = {weight.axes if tag == "?" else tuple(axis.tag for axis in weight.axes) for weight in weights}
    if len(kinds) > 1 or any(weight.looked_up for weight in weights):
        raise NotAView
    if (
        len({weight.leaf.dropout for weight in weights if weight.key is not None}) > 1
        or len({weight.key is None for weight in weights}) > 1
    ):
        raise NotAView  # one input has one dropout
    arrays = [value_of(operand.weight) if isinstance(operand, Factored) else operand for operand in operands]
    paths = dict.fromkeys(path for weight in weights for path in weight.leaf.paths)
    joined = first.replace(
        weight=lax.concatenate(arrays, dimension), leaf=dataclasses.replace(first.leaf, paths=tuple(paths))
    )
    if tag in ("in", "out"):
        return _in_windows(joined, operands, dimension)
    if tag == "?":
        return joined
    if len(weights) != len(operands):
        raise NotAView
    return _stacked(joined, [weight.unwindowed() for weight in weights], dimension)


def stacked(operands: Sequence[Any], dimension: int) -> Factored:
    """`jnp.stack` of weights."""
    if not all(isinstance(operand, Factored) for operand in operands):
        raise NotAView
    shape = list(operands[0].shape)
    shape.insert(dimension, 1)
    kept = [index for index in range(len(shape)) if index != dimension]
    return concatenated([broadcast(weight, shape, kept) for weight in operands], dimension)


def _in_windows(joined: Factored, operands: Sequence[Any], dimension: int) -> Factored:
    start, terms, magnitudes = 0, [], []
    for operand in operands:
        size = operand.shape[dimension]
        if isinstance(operand, Factored):
            operand = operand if operand.windowed == dimension else operand.unwindowed()
            for term in operand.terms:
                low, high = term.window or (0, size)
                terms.append(term.replace(window=(start + low, start + high)))
        magnitudes.append(getattr(operand, "magnitude", None))
        start += size
    if all(magnitude is None for magnitude in magnitudes):
        return joined.replace(terms=tuple(terms), windowed=dimension)
    if joined.axes[dimension].tag == "in":
        raise NotAView  # each part of a sum would need an m of its own
    labels, dtype = joined.labels("magnitude"), next(m.dtype for m in magnitudes if m is not None)
    ones = lambda operand: jnp.ones([operand.shape[label] for label in labels], dtype)
    filled = [
        ones(operand) if m is None else m.astype(dtype)
        for m, operand in zip(magnitudes, operands, strict=True)
    ]
    return joined.replace(
        terms=tuple(terms), windowed=dimension, magnitude=lax.concatenate(filled, labels.index(dimension))
    )


def _stacked(joined: Factored, weights: Sequence[Factored], dimension: int) -> Factored:
    """Along a `layer` axis, or along a `new` one, which becomes a `layer` axis: every index has its own
    factors.
    """
    weights = [weight.plain() for weight in weights]
    if len({tuple(term.scale for term in weight.terms) for weight in weights}) > 1:
        weights = [
            weight.replace(terms=tuple(term.unscaled() for term in weight.terms)) for weight in weights
        ]
    first = weights[0]
    axes = tuple(Axis("layer") if index == dimension else axis for index, axis in enumerate(first.axes))
    joined = joined.replace(axes=axes, windowed=None)
    if (
        len({len(weight.terms) for weight in weights}) > 1
        or len({weight.magnitude is None for weight in weights}) > 1
    ):
        raise NotAView

    def part(name: str, pick: Callable[[Factored], jax.Array | None]) -> Any:
        arrays = [array for weight in weights if (array := pick(weight)) is not None]
        if not arrays:
            return None
        if len(arrays) < len(weights):
            raise NotAView
        before, after = first.labels(name), joined.labels(name)
        if RANK in before:  # of several ranks the largest: zeros change no product
            position = before.index(RANK)
            rank = max(array.shape[position] for array in arrays)
            arrays = [_padded_to(array, position, rank) for array in arrays]
        if dimension not in before:
            sizes = lambda weight, array: [
                weight.shape[dimension] if label == dimension else array.shape[before.index(label)]
                for label in after
            ]
            arrays = [
                aligned(array, before, after, sizes(weight, array))
                for weight, array in zip(weights, arrays, strict=True)
            ]
        return jnp.concatenate(arrays, after.index(dimension))

    def term(index: int) -> Term:
        parts = {name: part(name, lambda weight: getattr(weight.terms[index], name)) for name in PARTS}
        return Term(**parts, scale=first.terms[index].scale)

    return joined.replace(
        terms=tuple(map(term, range(len(first.terms)))),
        magnitude=part("magnitude", lambda weight: weight.magnitude),
        key=part("key", lambda weight: weight.key),
    )


def _padded_to(array: jax.Array, axis: int, size: int) -> jax.Array:
    if array.shape[axis] == size:
        return array
    return lax.pad(
        array,
        jnp.zeros((), array.dtype),
        [(0, size - array.shape[axis] if index == axis else 0, 0) for index in range(array.ndim)],
    )
