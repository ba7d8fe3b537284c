"""Many adapters of one method in one program: one per example, switched, or trained side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_deltas import assert_close, random_like, shaped

import lora_jax
from lora_jax import AdaLoRA, DeltaLoRA, DoRA, LoRAFA, PiSSA, VeRA


@jax.jit
def small(params, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
    return x @ params["w"]


def several(method, number=3):
    """One `frozen`, and deltas that started from different keys and were moved, but for what is fixed
    from one.
    """
    params = random_like(shaped({"w": (6, 12), "layers": (3, 6, 6)}), 0)
    targets = method if isinstance(method, dict) else {"w|layers": method}
    started = jax.jit(lambda key: lora_jax.lorafy(params, targets, axes={"layers": "layer in out"}, key=key))
    frozen = started(jax.random.key(0)).frozen
    starts = [started(jax.random.key(seed)).delta for seed in range(number)]
    return frozen, [
        jax.tree.map(lambda array, step: array + 0.3 * step, start, random_like(start, seed))
        for seed, start in enumerate(starts)
    ]


OTHERS = [DoRA(rank=2), AdaLoRA(rank=2), VeRA(rank=5), LoRAFA(rank=2), PiSSA(rank=2), DeltaLoRA(rank=2)]


@pytest.mark.parametrize("method", OTHERS, ids=lambda method: type(method).__name__)
def test_one_adapter_per_example_and_no_second_compilation(method, x64):
    frozen, deltas = several(method)
    xs = jnp.asarray(np.random.default_rng(1).normal(size=(4, 6)))
    forward, traced = lora_jax.adapt(small), []

    @jax.jit
    def batched(stacked, ids, xs):
        traced.append(1)
        return jax.vmap(lambda delta, x: forward(lora_jax.combine(frozen, delta), x))(
            lora_jax.take(stacked, ids), xs
        )

    merged, stacked = [lora_jax.merge(frozen, delta) for delta in deltas], lora_jax.stack(deltas)
    for ids in ([2, 0, 1, 2], [0, 0, 0, 0], [1, -1, 2, 1]):
        ys = batched(stacked, jnp.array(ids), xs)
        np.testing.assert_allclose(
            ys, [small(merged[index], x) for index, x in zip(ids, xs, strict=True)], rtol=1e-10, atol=1e-10
        )
    assert len(traced) == 1


@pytest.mark.parametrize("method", [DoRA(rank=2), VeRA(rank=5)], ids=lambda method: type(method).__name__)
def test_switching_compiles_once(method, x64):
    frozen, deltas = several(method)
    forward, traced, x = lora_jax.adapt(small), [], jnp.ones((2, 6))

    @jax.jit
    def one(stacked, index):
        traced.append(1)
        return forward(lora_jax.combine(frozen, lora_jax.take(stacked, index)), x)

    stacked = lora_jax.stack(deltas)
    for index, delta in enumerate(deltas):
        np.testing.assert_allclose(
            one(stacked, index), small(lora_jax.merge(frozen, delta), x), rtol=1e-10, atol=1e-10
        )
    assert len(traced) == 1


def test_training_several_seeds_side_by_side(x64, relaxed_promotion):
    """Of two methods at once. Adam's step forgets the size of a gradient, and so tells little of it; it
    sees every array alike.
    """
    frozen, starts = several({"w": DoRA(rank=2), "layers": AdaLoRA(rank=2)})
    x, y = (jnp.asarray(np.random.default_rng(3).normal(size=sizes)) for sizes in ((5, 6), (5, 12)))
    forward, tx = lora_jax.adapt(small), optax.adam(0.05)

    def trained(delta):
        def step(state, _):
            delta, moments = state
            loss, gradient = jax.value_and_grad(
                lambda delta: jnp.mean((forward(lora_jax.combine(frozen, delta), x) - y) ** 2)
            )(delta)
            updates, moments = tx.update(gradient, moments)
            return (optax.apply_updates(delta, updates), moments), loss

        (delta, _), losses = jax.lax.scan(step, (delta, tx.init(delta)), None, length=8)
        return delta, losses

    stacked = lora_jax.stack(starts)
    together, losses = jax.jit(jax.vmap(trained))(stacked)
    alone = jax.jit(trained)
    for seed in range(3):
        delta, wanted = alone(lora_jax.take(stacked, seed))
        np.testing.assert_allclose(losses[seed], wanted, rtol=1e-9)
        assert_close(lora_jax.take(together, seed), delta, rtol=1e-6, atol=1e-8)
        assert wanted[-1] < 0.9 * wanted[0]
