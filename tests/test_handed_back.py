"""A weight that a loop, a branch or a function inside hands back stays a weight, of which nothing is formed.

`nnx.scan` over `nnx.remat` layers hands back every layer's weights, from within a `checkpoint`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import LoRA


def layer(x, w):
    return jnp.tanh(x @ w), w


def scanned(wrap):
    return lambda params, x: jax.lax.scan(wrap(layer), x, params["w"])[0]


def of_the_stack(wrap):
    """The stack that comes back is used again, each layer of it."""

    def fn(params, x):
        x, ws = jax.lax.scan(wrap(layer), x, params["w"], reverse=True)
        return jax.lax.scan(wrap(layer), x, ws)[0]

    return fn


def of_a_constant(wrap):
    """Every step hands back one weight, so that the stack holds copies."""

    def fn(params, x):
        w = params["w"][1]
        x, ws = jax.lax.scan(wrap(lambda x, _: layer(x, w)), x, length=2)
        return x @ ws[1]

    return fn


def in_the_carry(wrap):
    def fn(params, x):
        step = wrap(lambda carry, _: (layer(*carry), None))
        x, w = jax.lax.scan(step, (x, params["w"][0]), length=2)[0]
        return x @ w

    return fn


def of_a_loop(wrap):
    def fn(params, x):
        step = wrap(lambda x, w: layer(x, w))
        _, x, w = jax.lax.while_loop(
            lambda state: state[0] < 3,
            lambda state: (state[0] + 1, *step(*state[1:])),
            (0, x, params["w"][2]),
        )
        return x @ w

    return fn


def of_branches(wrap):
    def fn(params, x):
        x, w = jax.lax.cond(x.sum() > 0, wrap(layer), lambda x, w: (x, w), x, params["w"][0])
        return x @ w

    return fn


WAYS = [scanned, of_the_stack, of_a_constant, in_the_carry, of_a_loop, of_branches]


@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.checkpoint, jax.jit], ids=["plain", "checkpoint", "jit"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_weight_that_is_handed_back(way, wrap, x64):
    draw = np.random.default_rng(0).normal
    params, x = {"w": jnp.asarray(draw(size=(3, 6, 6)) / 3)}, jnp.asarray(draw(size=(2, 6)))
    frozen, delta = lora_jax.lorafy(params, "w", method=LoRA(rank=2), axes="layer in out")
    delta = jax.tree.map(lambda array: array + 0.1, delta)
    fn, tree = way(wrap), lora_jax.combine(frozen, delta)
    assert not lora_jax.explain(fn, tree, x).formed
    expected = fn(lora_jax.merge(frozen, delta), x)
    assert not np.allclose(expected, fn(params, x))
    np.testing.assert_allclose(jax.jit(lora_jax.adapt(fn))(tree, x), expected, rtol=1e-9)


def test_branches_that_hand_back_different_weights_are_refused():
    params = {"v": jnp.eye(4), "w": jnp.ones((4, 4))}
    frozen, delta = lora_jax.lorafy(params, ".", method=LoRA(rank=2))

    def fn(params, x):
        return x @ jax.lax.cond(x.sum() > 0, lambda v, w: v, lambda v, w: w, params["v"], params["w"])

    with pytest.raises(lora_jax.MaterializeError, match="`cond`"):
        lora_jax.adapt(fn)(lora_jax.combine(frozen, delta), jnp.ones((1, 4)))
