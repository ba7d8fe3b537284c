"""The products of an array: with a factor, and with a diagonal.

The gradient of a factor is a sum over all rows of the array. JAX's own rule gives it the dtype of the array,
which is bfloat16 in mixed precision. Where the rows lie on several devices, XLA adds the devices' parts in
that dtype, and a cast behind it comes too late. Here the product that makes the gradient has a wider result
from the same operands. It costs no FLOP and no array more. Left out: the forward-mode derivative, which no
function with a `custom_vjp` has. So this is for who asks for it (`adapt(reduce=)`).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._kept import named
from .._mesh import moved, sharding_like
from .labels import aligned, dot, dot_labels, widened


def with_factor(
    x: jax.Array,
    x_labels: Sequence,
    factor: jax.Array,
    labels: Sequence,
    keep: Sequence,
    *,
    reduce: Any,
    factor_on_left: bool = False,
    **options: Any,
) -> tuple[jax.Array, tuple]:
    """`dot` of `x` and `factor`, which is cast to the dtype of `x`, and the labels of the result.

    `reduce`: the dtype of the sum that is the factor's gradient, if it is wider than that of `x`. None leaves
    it to JAX, except beside float16, where it is float32.
    """

    def product(x: jax.Array, factor: jax.Array) -> jax.Array:
        sides = ((factor.astype(x.dtype), labels), (x, x_labels))
        # The order of the original product, whose result needs no transpose.
        left, right = sides if factor_on_left else sides[::-1]
        return dot(*left, *right, keep=keep, **options)[0]

    found = dot_labels(labels, x_labels, keep) if factor_on_left else dot_labels(x_labels, labels, keep)
    if reduce is None and x.dtype == jnp.float16:
        reduce = jnp.float32  # float16 ends at 65,504, which the sum over the rows soon exceeds
    if reduce is None or jnp.finfo(reduce).bits <= jnp.finfo(x.dtype).bits:
        # The backward pass keeps `x` itself, once for all products with it, and not `x` as `dot` reshapes it.
        return jax.checkpoint(product, prevent_cse=False)(x, factor), found

    def forward(x: Any, factor: Any) -> tuple:
        # The backward pass makes no product for what is not differentiated: a fixed factor, the input of the
        # first layer.
        return product(x.value, factor.value), (
            x.value,
            factor.value,
            [() if operand.perturbed else None for operand in (x, factor)],
        )

    def backward(residuals: tuple, cotangent: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
        x, factor, (wanted_x, wanted_factor) = residuals
        return (
            of_x(x, factor, cotangent) if wanted_x is not None else None,
            of_factor(x, factor, cotangent) if wanted_factor is not None else None,
        )

    def of_x(x: jax.Array, factor: jax.Array, cotangent: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda x: product(x, factor), x)(cotangent)[0]

    def of_factor(x: jax.Array, factor: jax.Array, cotangent: jax.Array) -> jax.Array:
        where = sharding_like(
            factor, labels, dot_labels(x_labels, found, labels), jax.typeof(x).sharding.mesh
        )
        others = {
            "precision": options.get("precision"),
            "preferred_element_type": reduce,
            "out_sharding": where,
        }
        summed = dot(x, x_labels, cotangent, found, keep=labels, **others)
        return aligned(*summed, labels, ()).astype(factor.dtype)

    reduced = jax.custom_vjp(product)
    reduced.defvjp(forward, backward, symbolic_zeros=True)
    return reduced(x, factor), found


def times(x: jax.Array, x_labels: Sequence, factor: jax.Array | None, labels: Sequence) -> jax.Array:
    """`x` times a factor for some of its axes, in float32 at least: rounded to bfloat16, a factor of 1.01
    would be 1.0078.
    """
    if factor is None:
        return x
    factor = moved(
        factor, sharding_like(x, x_labels, labels)
    )  # otherwise the result would be split as the factor is
    wide = widened(x.dtype)

    def product(x: jax.Array, factor: jax.Array) -> jax.Array:
        return (x.astype(wide) * aligned(factor.astype(wide), labels, x_labels, x.shape)).astype(x.dtype)

    # The backward pass keeps the two as they are: neither `x` in the wider dtype nor the factor as large as
    # `x`.
    return jax.checkpoint(product, prevent_cse=False)(named(x), factor)
