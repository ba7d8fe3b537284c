"""An adapted function against the same function of merged parameters: values and gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType

import lora_jax


def cosines(*shape):
    """Fixed numbers without a random key: the same in both versions of a function."""
    return jnp.cos(jnp.arange(math.prod(shape), dtype=float).reshape(shape) * 0.7 + 0.3)


def adapted(params, targets, **options):
    """A frozen tree and a delta in which nothing is zero."""
    frozen, delta = lora_jax.lorafy(params, targets, **options)
    rng = np.random.default_rng(1)
    return frozen, jax.tree.map(lambda array: jnp.asarray(rng.normal(size=array.shape), array.dtype), delta)


def value_and_gradient(fn, frozen, delta, join):
    return jax.value_and_grad(
        lambda delta: sum(jnp.sum(jnp.sin(out)) for out in jax.tree.leaves(fn(join(frozen, delta))))
    )(delta)


def assert_equal_to_merged(cases, rtol=1e-9):
    """`cases`: (fn of parameters, frozen, delta). One program for all, because compiling is what takes
    the time.
    """

    @jax.jit
    def both(trees):
        adapted = [
            value_and_gradient(lora_jax.adapt(fn), *pair, lora_jax.combine)
            for (fn, _, _), pair in zip(cases, trees, strict=True)
        ]
        merged = [
            value_and_gradient(fn, *pair, lora_jax.merge)
            for (fn, _, _), pair in zip(cases, trees, strict=True)
        ]
        return adapted, merged

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol),
        *both([case[1:] for case in cases]),
    )


def contracted(w, letters):
    """An activation times the weight, over its in axes; stacked and new axes are shared."""
    shared = "".join(letter for letter in letters if letter in "ln")
    summed = "".join(letter for letter in letters if letter in "ij")
    free = "".join(letter for letter in letters if letter in "opq")
    sizes = dict(zip(letters, w.shape, strict=True))
    x = cosines(2, *(sizes[letter] for letter in shared + summed)).astype(w.dtype)
    return jnp.einsum(f"b{shared}{summed},{letters}->b{shared}{free}", x, w)


def two_devices(kind=AxisType.Auto):
    return jax.make_mesh((2,), ("model",), axis_types=(kind,))


def traced_index(number):
    """An index that is not known when it is traced."""
    return lax.optimization_barrier(jnp.asarray(number))
