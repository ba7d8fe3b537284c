"""A tiny model, its data, and a few steps of it on any mesh: what tests of training share."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from experiments.config import (
    Architecture,
    Base,
    Budget,
    Config,
    E2EData,
    Mesh,
    method_value,
    methods,
    Optimizer,
    Source,
    TextData,
    Train,
)
from experiments.tasks.examples import Examples
from experiments.training import sharded, trainer as train
from lora_jax.checkpoint import State
from lora_jax.models.gpt2 import GPT2, GPT2Config


LORA = {"name": "LoRA", "rank": 2, "alpha": 4, "init": "kaiming", "blocks": [True, False, True]}


@pytest.fixture(autouse=True, scope="module")
def optax_promotes():
    """Optax raises floats to integer powers of its counters, which strict promotion refuses. Ranks stay
    strict.
    """
    with jax.numpy_dtype_promotion("standard"):
        yield


def config(
    method=LORA,
    targets=("attn/c_attn/kernel",),
    mesh=Mesh(),
    clip=None,
    name="adamw",
    rules=(),
    quantize=None,
    **settings,
):
    section = Train(**{"steps": 6, "batch": 8, "lr": 1e-2, "warmup": 2, "label_smoothing": 0.1, **settings})
    architecture = Base(architecture=Architecture(8, 1, 2, 16), tokenizer="none")
    packs = section.pack is not None  # which blocks of text do not
    data = E2EData("e2e", "none", "none", seq_len=12) if packs else TextData("text", "none", "none", 12)
    rule = Optimizer(name, weight_decay=0.01, clip=clip, **dict(rules))
    return Config(
        "tiny", Source(None), architecture, data, method, targets, section, rule, mesh, quantize=quantize
    )


def examples(count=24, seq_len=12):
    random = np.random.default_rng(0)
    draw = lambda low, high: random.integers(1, 31, size=random.integers(low, high)).tolist()
    return Examples([(draw(2, 5), draw(2, 7)) for _ in range(count)], seq_len)


MODEL = GPT2(GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2))


@functools.cache
def weights():
    return jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def started(settings):
    """A trainer and its first state, on the mesh that `settings` asks for."""
    params = weights()
    mesh = sharded.make_mesh(settings.mesh)
    params, specs = sharded.on_mesh(mesh, params, MODEL.partition_rules)
    frozen, delta = lora_jax.lorafy(
        params, list(settings.targets), method=method_value(settings.method), key=jax.random.key(1)
    )
    trainer = train.Trainer.create(settings, mesh, MODEL.apply, frozen, delta, specs)
    return trainer, trainer.start(delta, specs, jax.random.key(2))


class Ran(NamedTuple):
    """`losses`: one a step. `state`: after the last."""

    losses: list[float]
    state: State
    step: Callable
    trainer: train.Trainer


def steps(settings, count=3):
    trainer, state = started(settings)
    step, data, found = trainer.compiled_step(state), examples(), []
    for number in range(count):
        indices = np.arange(number * settings.train.batch, (number + 1) * settings.train.batch) % len(data)
        batch = trainer.device_batch(data, trainer.in_rows(data, indices), settings.train.accumulate)
        key = jax.random.fold_in(state.key, number)
        delta, opt_state, numbers = step(state.delta, state.opt_state, trainer.frozen, batch, key)
        state = state._replace(delta=delta, opt_state=opt_state, step=number + 1)
        found.append(float(numbers["loss"]))
    return Ran(found, state, step, trainer)


def close(left, right, tolerance=1e-6):
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, atol=tolerance, rtol=tolerance), left, right
    )


def alike(ran, other, tolerance=1e-6):
    """Two runs of the same steps, to rounding."""
    np.testing.assert_allclose(ran.losses, other.losses, rtol=max(tolerance / 2, 1e-6), atol=1e-6)
    close(jax.device_get(ran.state.delta), jax.device_get(other.state.delta), tolerance)


@functools.cache
def on_one_device(full=False):
    """What the sharded and the accumulated runs are compared with."""
    return steps(config({"name": "Full"}, (".*",)) if full else config())


RULES = {
    "AdaLoRA": {"adalora": Budget(target_rank=1, final_steps=1, orthogonality=0.1)},
    "LoRAFA": {"lorafa": True, "loraplus": 4.0},
    "DyLoRA": {"loraplus": 4.0},
}
ROWS = {name: {"name": name} if name == "Full" else {"name": name, "rank": 2} for name in methods()}


def row(name, **more):
    return config(ROWS[name], ("attn/.*/kernel", "mlp/c_fc/kernel"), rules=RULES.get(name, {}), **more)
