"""The head on counted positions only: the loss, the gradients and the steps are those of a head on all."""

import functools

import jax
import numpy as np
import pytest
from counted import agree, batch_of, started, WAYS
from plans import directories as directories, small
from training import optax_promotes as optax_promotes

from experiments.config import Mesh
from experiments.plan import flops
from experiments.plan.step import training_step, Workload
from experiments.training import sharded
from lora_jax import Full, LoRA


def with_all_positions(batch):
    """The same batch, with a label and a mask at every position and no columns."""
    arrays = {name: np.asarray(array) for name, array in batch.items()}
    labels, mask = np.zeros((2, *arrays["input_ids"].shape), np.int32)
    for place in zip(*np.nonzero(arrays["mask"]), strict=True):
        at = *place[:-1], arrays["columns"][place]
        labels[at], mask[at] = arrays["labels"][place], 1
    put = lambda array: jax.device_put(array, batch["input_ids"].sharding)
    return {"input_ids": batch["input_ids"], "labels": put(labels), "mask": put(mask.astype(np.float32))}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("float64", 1e-14)])
def test_loss_and_gradients(way, dtype, tolerance, x64):
    """With smoothed labels, in a batch of which half is none."""
    step, delta, _ = started(way, dtype=dtype)
    batch = batch_of(step, np.where(np.arange(16) % 2 == 0, np.arange(16) % 8, -1))
    every = with_all_positions(batch)
    assert batch["columns"].shape == (1, 16, 16) and every["labels"].shape == (1, 16, 48)
    key = None if way == "Full" else jax.random.key(3)

    @jax.jit
    def found(delta, batch):
        piece = jax.tree.map(lambda array: array[0], batch)
        loss = functools.partial(step.loss, smoothing=0.1)
        return jax.value_and_grad(loss, has_aux=True)(delta, step.frozen, piece, key)

    assert found(delta, batch)[0][1] == 2 * (9 + 4 + 12 + 8)
    assert found(delta, batch)[0][0].dtype == dtype
    agree(found(delta, batch), found(delta, every), tolerance)


@pytest.mark.parametrize("way", WAYS)
def test_steps_in_parts_on_a_mesh(way):
    """Of eight devices, against one device's head on all positions."""
    step, delta, opt_state = started(way, Mesh(2, 2, 2), accumulate=2)
    alone, delta_alone, opt_state_alone = started(way, accumulate=2)
    ours, theirs = step.compiled(delta, opt_state), alone.compiled(delta_alone, opt_state_alone)
    for number in range(2):
        batch, key = batch_of(step, np.arange(16)), jax.random.key(number)
        every = with_all_positions(batch_of(alone, np.arange(16)))
        delta, opt_state, numbers = ours(
            delta, opt_state, step.frozen, batch, jax.device_put(key, step.everywhere)
        )
        delta_alone, opt_state_alone, expected = theirs(
            delta_alone, opt_state_alone, alone.frozen, every, key
        )
        agree(numbers, expected, 2e-5)
    # The moments, and not what trains: Adam makes a whole step of a gradient that is nothing but rounding.
    agree(opt_state, opt_state_alone, 2e-5)


@pytest.mark.parametrize("method, products", [(LoRA(rank=2), 2), (Full(), 3)], ids=["LoRA", "Full"])
def test_the_head_costs_what_is_counted(method, products, directories):
    """The whole difference: of the head's products, which are those of the logits, of the hidden states'
    gradient, and of the head's own where it trains.
    """
    subject, mesh = small(directories / "gpt2"), sharded.make_mesh(Mesh())
    cost = lambda counted: flops.of(
        (step := training_step(subject, mesh, Workload(8, 24, method, counted=counted))).function,
        *step.arguments,
    )
    vocabulary, width = 80, 64
    assert cost(None) - cost(10) == products * 2 * 8 * (24 - 10) * vocabulary * width
    assert cost(24) == cost(None)


def test_a_plan_has_the_batch_of_a_run(directories):
    step, _, _ = started("LoRA")
    batch = batch_of(step, np.arange(16))
    work = Workload(16, 48, LoRA(rank=2), counted=batch["columns"].shape[-1])
    planned = training_step(small(directories / "gpt2"), sharded.make_mesh(Mesh()), work).batch
    assert {name: array.shape for name, array in batch.items()} == {
        name: array.shape for name, array in planned.items()
    }
    assert all(batch[name].nbytes == planned[name].size * 4 for name in planned)
