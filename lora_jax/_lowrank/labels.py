"""Arrays whose axes have labels: products and broadcasts by label, and the dtype in which they are summed.

A label is the index of an axis of W, RANK, or a name for an axis of the data.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._mesh import one_device


RANK = -1  # the label of the rank axis, beside the indices of W's own axes


def widened(dtype: Any) -> Any:
    """The dtype in which updates are computed: float32, or float64 for float64 weights."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def dot(
    x: jax.Array, x_labels: Sequence, y: jax.Array, y_labels: Sequence, keep: Sequence = (), **options: Any
) -> tuple[jax.Array, tuple]:
    """Contracts the labels that both have and that are not in `keep`; those in `keep` are batch axes.

    Returns the product and its labels: batch, free of x, free of y.
    """
    found = dot_labels(x_labels, y_labels, keep)
    shape = dict(zip((*x_labels, *y_labels), (*x.shape, *y.shape), strict=True))
    # Not where the result is wider: of bfloat16, XLA's CPU backend then knows the separate axes only.
    narrow = options.get("preferred_element_type") in (None, x.dtype)
    if narrow and one_device() and options.get("out_sharding") is None:
        x, x_labels = _joined(x, x_labels, y_labels)
        y, y_labels = _joined(y, y_labels, x_labels)
    shared = [label for label in x_labels if label in y_labels]
    batch = [label for label in shared if label in keep]
    summed = [label for label in shared if label not in keep]
    positions = lambda labels, wanted: [list(labels).index(label) for label in wanted]
    numbers = (
        (positions(x_labels, summed), positions(y_labels, summed)),
        (positions(x_labels, batch), positions(y_labels, batch)),
    )
    product = lax.dot_general(x, y, numbers, **options)
    return lax.reshape(product, [shape[label] for label in found]), found


def _joined(x: jax.Array, labels: Sequence, others: Sequence) -> tuple[jax.Array, Sequence]:
    """`x` with neighbouring axes that `others` lack as one, whose label is the tuple of theirs.

    JAX's gradient of a factor sums over these axes, those of batch and tokens. Over two, XLA transposes the
    operand that JAX puts first, which is as wide as the weight; over one, nothing is moved. Several devices
    keep the axes apart: joined, two that are split would be gathered.
    """
    axes: list[tuple] = []
    for own, run in itertools.groupby(zip(labels, x.shape, strict=True), lambda axis: axis[0] not in others):
        names, sizes = zip(*run, strict=True)
        axes += [(names, math.prod(sizes))] if own else zip(names, sizes, strict=True)
    names, sizes = zip(*axes, strict=True)
    return lax.reshape(x, sizes), names


def dot_labels(x_labels: Sequence, y_labels: Sequence, keep: Sequence = ()) -> tuple:
    """The labels of the product that `dot` makes."""
    shared = [label for label in x_labels if label in y_labels]
    return (
        *(label for label in shared if label in keep),
        *(label for label in (*x_labels, *y_labels) if label not in shared),
    )


def aligned(x: jax.Array, labels: Sequence, wanted: Sequence, shape: Sequence[int]) -> jax.Array:
    """`x` with its axes in the wanted order, and with size 1 along the wanted axes that it lacks."""
    order = tuple(labels.index(label) for label in wanted if label in labels)
    if order != tuple(range(len(order))):
        x = lax.transpose(x, order)
    if len(order) == len(wanted):
        return x
    return lax.broadcast_in_dim(
        x, shape, [position for position, label in enumerate(wanted) if label in labels]
    )


def scaled_by(array: jax.Array, factor: Any) -> jax.Array:
    """`array` times one number, computed in float32 at least.

    A number rounded to bfloat16 would be wrong in the same direction everywhere.
    """
    if isinstance(factor, int | float) and factor == 1:
        return array
    wide = widened(array.dtype)
    return (array.astype(wide) * jnp.asarray(factor, wide)).astype(array.dtype)
