""" "all-linear" passes over nothing without a word: what it cannot follow to a contraction is an error."""

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from lora_jax import Full, LoRA


X = jnp.ones((2, 8))


def square():
    return jnp.ones((8, 8))


@jax.custom_vjp
def fused(x, w):
    return x @ w


fused.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


@jax.custom_jvp
def fused_forward(x, w):
    return x @ w


fused_forward.defjvp(lambda given, moved: (given[0] @ given[1], moved[0] @ given[1] + given[0] @ moved[1]))


def scanned(params, x):
    return jax.lax.scan(lambda x, w: (fused(x, w), None), x, params["up"])[0]


def fused_head(params, x):
    """A cross-entropy that holds the head's contraction, as fused losses do."""

    @jax.custom_vjp
    def loss(x, w):
        return jax.nn.logsumexp(x @ w, axis=-1).sum()

    loss.defvjp(lambda x, w: (loss(x, w), (x, w)), lambda kept, g: (g * kept[0], g * kept[1]))
    return loss(x @ params["down"], params["up"])


def dequantised(params, x):
    return x @ (params["up"].astype("float32") * params["scale"][None])


# What uses `up` beside `down`, in a way that has no low-rank rule.
LOST = {
    "custom_vjp": (lambda params, x: fused(x, params["up"]), {"up": square()}),
    "custom_jvp": (lambda params, x: fused_forward(x, params["up"]), {"up": square()}),
    "custom_vjp in a scan": (scanned, {"up": jnp.ones((3, 8, 8))}),
    "fused head": (fused_head, {"up": square()}),
    "int8 by hand": (dequantised, {"up": jnp.ones((8, 8), "int8"), "scale": jnp.ones(8)}),
    "a product of two": (lambda params, x: x @ (params["up"] @ params["down"]), {"up": square()}),
    "a mask": (lambda params, x: x @ (params["up"] * jnp.tri(8)), {"up": square()}),
    "a norm": (lambda params, x: x @ jnp.tanh(params["up"]), {"up": square()}),
    "jit": (lambda params, x: jax.jit(lambda w: x @ jnp.tanh(w))(params["up"]), {"up": square()}),
    "cond": (
        lambda params, x: jax.lax.cond(x.sum() > 0, lambda: x @ params["up"] ** 2, lambda: x),
        {"up": square()},
    ),
    "while": (
        lambda params, x: jax.lax.while_loop(
            lambda state: state[0] < 2, lambda state: (state[0] + 1, state[1] @ params["up"] ** 2), (0, x)
        )[1],
        {"up": square()},
    ),
}


@pytest.mark.parametrize("name", LOST)
def test_what_cannot_be_followed_is_an_error(name):
    use, own = LOST[name]
    params = {"down": square(), **own}
    fn = lambda params, x: use(params, x) @ params["down"] if name != "fused head" else use(params, x)
    with pytest.raises(
        ValueError, match=r"'all-linear'.*cannot follow: 'up'.*targets={'up': None, 'all-linear'"
    ):
        lora_jax.lorafy(params, "all-linear", method=LoRA(rank=2), fn=fn, args=(X,))
    # On purpose, and then `explain` lists it.
    frozen, delta = lora_jax.lorafy(params, {"up": None, "all-linear": LoRA(rank=2)}, fn=fn, args=(X,))
    assert delta["up"] is None and delta["down"] is not None
    found = lora_jax.explain(fn, lora_jax.combine(frozen, delta), X)
    assert found.left_out == ["up"] and "up: a weight of a contraction, and not adapted" in str(found)


def test_a_leaf_that_trains_itself_is_not_lost():
    params = {"up": square(), "down": square()}
    fn = lambda params, x: fused(x, params["up"]) @ params["down"]
    delta = lora_jax.lorafy(params, {"up": Full(), "all-linear": LoRA(rank=2)}, fn=fn, args=(X,)).delta
    tree = lora_jax.combine(*lora_jax.lorafy(params, {"up": Full(), "down": LoRA(rank=2)}))
    assert delta["up"].shape == (8, 8) and lora_jax.explain(fn, tree, X).left_out == []


KEPT = {
    "positions": (lambda params, x: (x + params["other"][:2]) @ params["w"], jnp.ones((16, 8))),
    "a table": (lambda params, x: (x + params["other"][jnp.array([1, 0])]) @ params["w"], jnp.ones((16, 8))),
    "a tied head": (
        lambda params, x: params["other"][jnp.array([1, 0])] @ params["w"] @ params["other"].T,
        jnp.ones((16, 8)),
    ),
    "a scale": (lambda params, x: (x * params["other"][None]) @ params["w"], jnp.ones(8)),
    "a stacked scale": (lambda params, x: (x * params["other"][1][None]) @ params["w"], jnp.ones((3, 8))),
    "a bias": (lambda params, x: x @ params["w"] + params["other"][None], jnp.ones(8)),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_no_weight_of_a_contraction_is_passed_over(name):
    fn, other = KEPT[name]
    params = {"w": square(), "other": other}
    frozen, delta = lora_jax.lorafy(params, "all-linear", method=LoRA(rank=2), fn=fn, args=(X,))
    assert delta["other"] is None and delta["w"] is not None


def test_none_alone_leaves_nothing_to_train():
    with pytest.raises(ValueError, match="nothing would be trained"):
        lora_jax.lorafy({"w": square()}, {"w": None})
    with pytest.raises(ValueError, match="matches no leaf"):
        lora_jax.lorafy({"w": square()}, {"u": None, "w": LoRA(rank=2)})
