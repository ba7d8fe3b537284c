"""Adapted trees of random numbers, and a step of an optimiser on them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax
from lora_jax import Full, LoRA
from lora_jax._paths import named_leaves
from lora_jax.optim import adalora


# A stack, several out axes, a plain matrix, and what trains itself.
SHAPES = {"layers": (3, 6, 5), "heads": (6, 2, 3), "plain": (7, 4), "head": {"kernel": (4, 2), "bias": (4,)}}
AXES = {"layers": "layer in out", "heads": "in out out", "plain": "in out"}


def numbers(tree, seed=0, dtype=None):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda array: jnp.asarray(rng.normal(size=array.shape), array.dtype if dtype is None else dtype), tree
    )


def adapted(method, other=LoRA(rank=2), dtype="float32"):
    """`(frozen, delta)` with random numbers in both. `layers` and `heads` have the method, `plain`
    another, and the head trains itself.
    """
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype), SHAPES, is_leaf=lambda node: isinstance(node, tuple)
    )
    # From shapes, because the start is replaced: nothing is compiled.
    frozen, delta = lora_jax.lorafy(
        params, {"layers|heads": method, "plain": other, "head/.*": Full()}, axes=AXES
    )
    return numbers(frozen), numbers(delta, 1)


def leaves(tree):
    """By path; the arrays of adapters by `path/name`."""
    return dict(named_leaves(tree))


def jitted(tx):
    """`tx.update` and the updated parameters, in one program."""

    @jax.jit
    def step(gradient, state, delta):
        step.traced += 1
        updates, state = tx.update(gradient, state, delta)
        return optax.apply_updates(delta, updates), state, updates

    step.traced = 0
    return step


def adalora_of(tx, **options):
    return adalora(tx, **{"total_steps": 20, "target_rank": 2, **options})


# The last update that may choose, the sixteenth, is not one of every third.
SCHEDULE = dict(total_steps=20, target_rank=2, initial_steps=3, final_steps=4, every=3)
