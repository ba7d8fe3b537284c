"""The training step gives the numbers of one device on every mesh: for every method, with dropout, and on
a quantised base.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import (
    alike,
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

from experiments.config import Mesh, methods
from experiments.training import sharded
from lora_jax._paths import named_leaves


def halved(ran):
    """Whether any of the optimiser's moments is split over devices."""
    return any(
        leaf.addressable_shards[0].data.shape != leaf.shape for leaf in jax.tree.leaves(ran.state.opt_state)
    )


@pytest.mark.parametrize(
    "full, shape", [(False, (1, 2, 1)), (False, (1, 1, 2)), (False, (2, 2, 2)), (True, (2, 2, 2))], ids=str
)
def test_every_mesh_gives_the_same_adapter(full, shape):
    method, targets = ({"name": "Full"}, (".*",)) if full else (LORA, ("attn/c_attn/kernel",))
    spread = steps(config(method, targets, Mesh(*shape)))
    alike(on_one_device(full), spread, 2e-5)
    # With `blocks`, B stays whole, so only fsdp splits anything of LoRA's.
    assert halved(spread) == (full or shape[1] > 1), "the moments are split as their arrays are"


def test_the_authors_optimizer_on_a_mesh():
    """Its moments are split and its counters are everywhere, as those of optax's own."""
    whole = steps(config(name="adamw_authors"))
    spread = steps(config(name="adamw_authors", mesh=Mesh(2, 2, 2)))
    alike(whole, spread, 2e-5)
    assert halved(spread)


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
        sharded.make_mesh(Mesh(4, 4, 1))


@functools.cache
def of_one_device(name, quantize=None):
    return steps(row(name, quantize=quantize))


@pytest.mark.slow
@pytest.mark.parametrize("name", methods())
def test_every_method_trains_and_every_mesh_gives_the_same(name):
    alone, spread = of_one_device(name), steps(row(name, mesh=Mesh(2, 2, 2)))
    assert alone.state.step == 3 and alone.step._cache_size() == spread.step._cache_size() == 1
    alike(alone, spread)
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(spread.trainer.frozen))


# All ways of giving eight devices to the axes, but for the one above.
MESHES = [
    (data, fsdp, 8 // data // fsdp)
    for data in (1, 2, 4, 8)
    for fsdp in (1, 2, 4, 8)
    if data * fsdp <= 8 and (data, fsdp) != (2, 2)
]
# All of them for the plainest case and for the one in which most is particular. Of the others each has two,
# so that every mesh has two or three of these.
EVERYWHERE = [("LoRA", None), ("DoRA", "nf4")]
ELSEWHERE = [*((name, None) for name in methods() if name != "LoRA"), ("LoRA", "nf4"), ("LoRA", "int8")]
PAIRS = [(*case, shape) for case in EVERYWHERE for shape in MESHES]
PAIRS += [(*case, MESHES[(place + step) % 9]) for place, case in enumerate(ELSEWHERE) for step in (0, 4)]


@pytest.mark.slow
@pytest.mark.parametrize("name, quantize, shape", PAIRS, ids=str)
def test_every_mesh_gives_every_method_the_same(name, quantize, shape):
    alike(of_one_device(name, quantize), steps(row(name, quantize=quantize, mesh=Mesh(*shape))))


def packed(trainer):
    return [leaf for leaf in jax.tree.leaves(trainer.frozen) if leaf.dtype == jnp.uint8]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LoRA", "DoRA"])
def test_a_quantised_base_trains(name):
    """On every mesh: see above."""
    alone = of_one_device(name, "nf4")
    assert len(packed(alone.trainer)) >= 4, "the matrices of the layer"
    assert np.all(np.isfinite(alone.losses)) and alone.losses[2] != alone.losses[0]


@pytest.mark.slow
def test_the_biases_of_a_quantised_base_train():
    settings = config({"name": "Full"}, ("bias",), quantize="nf4")
    alone, spread = steps(settings), steps(dataclasses.replace(settings, mesh=Mesh(2, 2, 2)))
    assert len(packed(alone.trainer)) >= 4
    close(alone.losses, spread.losses)
    # But for the bias of the keys, whose gradient is nothing but rounding, which Adam makes large.
    compared = lambda ran: {
        path: np.delete(leaf, np.s_[8:16]) if path.endswith("c_attn/bias") else leaf
        for path, leaf in named_leaves(jax.device_get(ran.state.delta))
    }
    close(compared(alone), compared(spread))
