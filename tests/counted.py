"""Steps of a small GPT-2 on examples of which a part is counted."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from experiments.config import Mesh, Optimizer, Train
from experiments.tasks.examples import Examples
from experiments.training import sharded
from experiments.training.trainer import Trainer
from lora_jax import Full, LoRA
from lora_jax.models import GPT2, GPT2Config


MODEL = GPT2(GPT2Config(vocab_size=32, n_positions=64, n_embd=16, n_layer=2, n_head=2))
# The embedding is the head too, so that its adapter has the gathered positions beside the tokens.
WAYS = {
    "LoRA": (["attn/c_attn/kernel", "wte/embedding"], LoRA(rank=2)),
    "dropout": (["attn/c_attn/kernel", "mlp/c_fc/kernel"], LoRA(rank=2, dropout=0.5)),
    "Full": ([".*"], Full()),
}


def examples():
    """Two of them are cut off, and one of these has nothing left to count."""
    random = np.random.default_rng(0)
    draw = lambda count: random.integers(1, 31, size=count).tolist()
    sizes = [(20, 9), (3, 2), (44, 9), (50, 5), (1, 12), (30, 16), (8, 8), (35, 5)] * 2
    return Examples([(draw(context), draw(completion)) for context, completion in sizes], 48)


def started(way, mesh=Mesh(), dtype="float32", accumulate=1):
    """A step, what trains, and the optimiser's state. What trains is not at its start, where B is 0."""
    train = Train(steps=6, batch=16, lr=1e-2, label_smoothing=0.1, accumulate=accumulate)
    draw = np.random.default_rng(1)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(0.05, 0.3, leaf.shape), dtype), shapes)
    mesh = sharded.make_mesh(mesh)
    params, specs = sharded.on_mesh(mesh, params, MODEL.partition_rules)
    targets, method = WAYS[way]
    frozen, delta = lora_jax.lorafy(params, targets, method=method)
    delta = jax.tree.map(lambda leaf: leaf + 0.1, delta)
    options = {"section": Optimizer(), "train": train, "reduce": dtype}
    step = sharded.ShardedStep.create(mesh, MODEL.apply, frozen, delta, specs, **options)
    return step, *step.start(delta, specs)


def batch_of(step, indices):
    """As a run has it, (accumulate, examples, positions), from the trainer's own function."""
    return Trainer.device_batch(SimpleNamespace(mesh=step.mesh), examples(), indices, step.accumulate)


def agree(found, expected, tolerance):
    """Of each array, to its own largest value."""
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, rtol=0, atol=tolerance * abs(two).max()),
        *jax.device_get((found, expected)),
    )
