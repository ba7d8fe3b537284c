"""What a training step costs, beside one of full fine-tuning on the same batch: memory and FLOPs as the
compiler counts them, time as measured.

Memory is what the compiled step needs at once: its arguments (weights, what trains, optimiser state, batch),
temporaries (activations and gradients), and results that replace no argument.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from experiments.training.trainer import Trainer
from lora_jax import Full
from lora_jax.checkpoint import State


# Steps that are timed, after one that is not.
STEPS = 5


def beside_full(
    trainer: Trainer, state: State, params: Any, specs: Any, examples: Any, whole: Sequence[str] = (".*",)
) -> dict[str, dict[str, float]]:
    """The cost of this run's step and of full fine-tuning's from the same base, on the first of these
    examples, measured in turn. `whole`: the patterns of what full fine-tuning trains.
    """
    frozen, delta = lora_jax.lorafy(params, whole, method=Full())
    full = trainer.of_full(frozen)
    train = trainer.config.train
    rows = trainer.in_rows(examples, np.arange(train.batch) % len(examples))
    batch = trainer.device_batch(examples, rows, train.accumulate)
    return {
        "this run": _of(trainer, state, batch),
        "full fine-tuning": _of(full, full.start(delta, specs, state.key), batch),
    }


def _of(trainer: Trainer, state: State, batch: dict[str, jax.Array]) -> dict[str, float]:
    delta, opt_state = jax.tree.map(
        jnp.copy, (state.delta, state.opt_state)
    )  # a step gives its first two arguments away
    step = trainer.compiled_step(state).lower(delta, opt_state, trainer.frozen, batch, state.key).compile()
    memory: Any = step.memory_analysis()
    seconds = []
    for _ in range(1 + STEPS):
        started = time.perf_counter()
        delta, opt_state, numbers = jax.block_until_ready(
            step(delta, opt_state, trainer.frozen, batch, state.key)
        )
        seconds.append(time.perf_counter() - started)
    figures = {
        "trained parameters": lora_jax.count(state.delta),
        "optimiser bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(opt_state)),
        "bytes": memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        "seconds": statistics.median(seconds[1:]),
    }
    if trainer.config.train.accumulate > 1:
        # The compiler counts the body of a loop once, and with it one part of the batch instead of all.
        return figures
    counted: Any = step.cost_analysis()
    return figures | {"FLOPs": counted["flops"]}
