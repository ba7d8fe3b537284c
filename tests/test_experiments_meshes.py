"""The training step gives the numbers of one device on every mesh: for every method, with dropout, and on
a quantised base.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import (
    close,
    config,
    examples,
    LORA,
    on_one_device,
    optax_promotes as optax_promotes,
    row,
    started,
    steps,
)

from experiments import train
from experiments.config import Mesh, METHODS


@pytest.mark.parametrize(
    "full, shape",
    [(False, (2, 1, 1)), (False, (1, 2, 1)), (False, (1, 1, 2)), (False, (2, 2, 2)), (True, (2, 2, 2))],
    ids=str,
)
def test_every_mesh_gives_the_same_adapter(full, shape):
    whole, state = on_one_device(full)
    method, targets = ({"name": "Full"}, (".*",)) if full else (LORA, ("attn/c_attn/kernel",))
    spread, other, _ = steps(config(method, targets, Mesh(*shape)))
    np.testing.assert_allclose(whole, spread, rtol=1e-5)
    close(state.delta, jax.device_get(other.delta), 2e-5)
    halved = [
        leaf.addressable_shards[0].data.shape != leaf.shape for leaf in jax.tree.leaves(other.opt_state)
    ]
    # With `blocks`, B stays whole, so only fsdp splits anything of LoRA's.
    assert any(halved) == (full or shape[1] > 1), "the moments are split as their arrays are"


def test_the_authors_optimizer_on_a_mesh():
    """Its moments are split and its counters are everywhere, as those of optax's own."""
    whole, state, _ = steps(config(name="adamw_authors"))
    spread, other, _ = steps(config(name="adamw_authors", mesh=Mesh(2, 2, 2)))
    np.testing.assert_allclose(whole, spread, rtol=1e-5)
    close(state.delta, jax.device_get(other.delta), 2e-5)
    assert any(
        leaf.addressable_shards[0].data.shape != leaf.shape for leaf in jax.tree.leaves(other.opt_state)
    )


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 2, 2)])
def test_dropout_is_the_same_on_every_mesh(shape):
    """A run that goes on with other devices sees what it would have seen."""
    settings = {**LORA, "dropout": 0.5}
    found = []
    for mesh in (Mesh(), Mesh(*shape)):
        trainer, state = started(config(settings, mesh=mesh))
        batch = jax.tree.map(lambda array: array[0], trainer.device_batch(examples(), np.arange(8)))
        found.append(
            jax.jit(trainer.loss)(
                jax.tree.map(jnp.ones_like, state.delta),
                trainer.frozen,
                batch,
                jax.random.fold_in(state.key, 0),
            )[0]
        )
    np.testing.assert_allclose(*map(float, found), rtol=1e-6)


def test_a_mesh_larger_than_the_machine():
    with pytest.raises(ValueError, match="`mesh` 4 x 4 x 1 needs 16 devices, but there are 8"):
        train.make_mesh(Mesh(4, 4, 1))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_every_mesh_gives_the_same(name):
    alone, state, step = steps(row(name), 3)
    assert state.step == 3 and step._cache_size() == 1
    spread, other, _ = steps(row(name, mesh=Mesh(2, 2, 2)), 3)
    close(alone, spread)
    close(state.delta, jax.device_get(other.delta))
    assert all(
        len(leaf.sharding.device_set) == 8
        for leaf in jax.tree.leaves(started(row(name, mesh=Mesh(2, 2, 2)))[0].frozen)
    )


@functools.cache
def of_one_device(name, quantize=None):
    return steps(row(name, quantize=quantize), 3)[:2]


# All ways of giving eight devices to the axes, but for the one above.
MESHES = [
    (data, fsdp, 8 // data // fsdp)
    for data in (1, 2, 4, 8)
    for fsdp in (1, 2, 4, 8)
    if data * fsdp <= 8 and (data, fsdp) != (2, 2)
]


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize(
    "name, quantize",
    [*((name, None) for name in METHODS), ("LoRA", "nf4"), ("LoRA", "int8"), ("DoRA", "nf4")],
)
def test_every_mesh_gives_every_method_the_same(name, quantize, shape):
    alone, state = of_one_device(name, quantize)
    spread, other, _ = steps(row(name, quantize=quantize, mesh=Mesh(*shape)), 3, quickly=True)
    close(alone, spread)
    close(state.delta, jax.device_get(other.delta))
