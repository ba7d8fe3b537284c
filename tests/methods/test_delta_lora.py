"""Delta-LoRA against the paper's algorithm, and its delayed start."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from method_columns import close
from method_rows import moved, quickly

import lora_jax
from lora_jax import DeltaLoRA, LoRA
from lora_jax.methods import start_delta


@pytest.mark.parametrize(
    "optimiser", [optax.sgd(0.05), optax.adamw(0.02, weight_decay=0.1)], ids=["sgd", "adamw"]
)
@pytest.mark.parametrize("waits", [0, 5])
def test_delta_lora_is_the_algorithm(optimiser, waits, x64, relaxed_promotion):
    """Fifteen steps of the paper's algorithm 1, with W itself updated after each: the same A, B and
    weight.
    """
    rng = np.random.default_rng(0)
    w, x, y = (jnp.asarray(rng.normal(size=sizes)) for sizes in ((5, 4), (7, 5), (7, 4)))
    frozen, delta = lora_jax.lorafy(
        {"w": w}, "w", method=DeltaLoRA(rank=2, alpha=3, ratio=0.5, delayed=waits > 0)
    )
    factors = {name: jnp.copy(array) for name, array in delta["w"].arrays.items()}

    @quickly
    def literally(w, factors, state, follows):
        def loss(factors):
            return jnp.mean((jnp.tanh(x @ (w + 1.5 * factors["a"] @ factors["b"])) - y) ** 2)

        updates, state = optimiser.update(jax.grad(loss)(factors), state, factors)
        after = optax.apply_updates(factors, updates)
        return w + follows * 0.5 * 1.5 * (after["a"] @ after["b"] - factors["a"] @ factors["b"]), after, state

    forward = lora_jax.adapt(lambda params: jnp.tanh(x @ params["w"]))

    @quickly
    def telescoped(frozen, delta, state):
        gradient = jax.grad(lambda delta: jnp.mean((forward(lora_jax.combine(frozen, delta)) - y) ** 2))(
            delta
        )
        updates, state = optimiser.update(gradient, state, delta)
        return optax.apply_updates(delta, updates), state

    state, other = optimiser.init(factors), optimiser.init(delta)
    for number in range(15):
        if number == waits and waits:
            frozen = start_delta(frozen, delta)
        w, factors, state = literally(w, factors, state, float(number >= waits))
        delta, other = telescoped(frozen, delta, other)
    close(delta["w"].arrays, factors, 1e-12)
    close(lora_jax.merge(frozen, delta)["w"], w + 1.5 * factors["a"] @ factors["b"], 1e-12)
    assert np.max(np.abs(w - (frozen["w"].weight))) > 1e-3


def test_start_delta_once():
    delayed = lora_jax.lorafy({"w": jnp.ones((4, 4))}, "w", method=DeltaLoRA(rank=1, delayed=True))
    plain = lora_jax.lorafy({"w": jnp.ones((4, 4))}, "w", method=LoRA(rank=1, alpha=16, init="kaiming"))
    moved_delta = moved(delayed.delta)
    # Until then it is LoRA.
    plain.delta["w"].arrays.update(moved_delta["w"].arrays)
    np.testing.assert_array_equal(
        lora_jax.merge(delayed.frozen, moved_delta)["w"], lora_jax.merge(*plain)["w"]
    )
    started = start_delta(delayed.frozen, moved_delta)
    close(lora_jax.merge(started, moved_delta), lora_jax.merge(*plain), 1e-6)
    for trees in (
        (started, moved_delta),
        lora_jax.lorafy({"w": jnp.ones((4, 4))}, "w", method=DeltaLoRA(rank=1)),
        plain,
    ):
        with pytest.raises(ValueError, match="holds no Delta-LoRA adapter that waits"):
            start_delta(*trees)
