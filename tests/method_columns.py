"""What the columns share: the adapted model, its loss, and when two results are equal."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_rows import ADAPTERS, APART, BY_NAME, literal, model, moved, parameters, quickly, TOKENS

import lora_jax
from lora_jax._paths import named_leaves
from lora_jax._tree.nodes import Fixed


FORWARD = lora_jax.adapt(model)
# Compiled once for all rows, or once for all columns of a row.
MODEL = quickly(model)
COMPILED = quickly(FORWARD)
rows = pytest.mark.parametrize("name", BY_NAME)
adapters = pytest.mark.parametrize("name", ADAPTERS)
distinct = pytest.mark.parametrize("name", [*APART, "Full"])


def adapted(frozen, delta, *args, key=None):
    return FORWARD(lora_jax.combine(frozen, delta, key=key), *(args or (TOKENS,)))


@functools.lru_cache(maxsize=None)
def equation(name):
    """In float64: W' by the equation, compiled, and what it makes of a gradient with respect to W'."""
    row = BY_NAME[name]

    @quickly
    def weights(frozen, delta):
        return literal(row, frozen, delta)

    @quickly
    def pulled_back(frozen, delta, cotangent):
        return jax.vjp(lambda delta: literal(row, frozen, delta), delta)[1](cotangent)[0]

    return weights, pulled_back


def weight_of(node):
    return node.weight if isinstance(node, Fixed) else node


def close(left, right, tolerance):
    """Equal within `tolerance` of the largest number of each array."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, one), two in zip(named_leaves(left), jax.tree.leaves(right), strict=True):
        one, two = np.asarray(one, np.float64), np.asarray(two, np.float64)
        assert one.shape == two.shape and np.all(np.isfinite(one)), path
        assert np.max(np.abs(one - two)) <= tolerance * np.max(np.abs(two)), (
            path,
            np.max(np.abs(one - two)) / np.max(np.abs(two)),
        )


TEACHER = moved(parameters("float32"), 0.15, seed=7)


def loss(frozen, delta, tokens, target, key=None):
    return jnp.mean(jnp.square(adapted(frozen, delta, tokens, key=key) - target))


def defaults():
    """JAX's default promotion, which optax counts on."""
    both = contextlib.ExitStack()
    both.enter_context(jax.numpy_dtype_promotion("standard"))
    both.enter_context(jax.numpy_rank_promotion("allow"))
    return both
