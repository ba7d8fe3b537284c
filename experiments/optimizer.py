"""Optimisers by name, and the one schedule of the paper's language experiments.

A row of `OPTIMIZERS` takes a learning-rate schedule and the config's section and returns an optax transformation. Left out for
now: the authors' own AdamW, whose epsilon is added before the bias correction; it is a row to add, not a change.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from experiments.config import Optimizer, Train


def warmup_linear(train: Train) -> Callable[[jax.Array], jax.Array]:
    """Rate lr * step / warmup, then linearly down to 0 at `steps`; step counts from 0, so the first update has rate 0."""

    def rate(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rising = step / max(train.warmup, 1)
        falling = jnp.maximum(0.0, train.steps - step) / max(train.steps - train.warmup, 1)
        return train.lr * jnp.where(step < train.warmup, rising, falling)

    return rate


def _adamw(rate: Callable, section: Optimizer) -> optax.GradientTransformation:
    return optax.adamw(rate, b1=section.b1, b2=section.b2, eps=section.eps, weight_decay=section.weight_decay)


OPTIMIZERS = {"adamw": _adamw}


def create(section: Optimizer, train: Train) -> optax.GradientTransformation:
    """The whole update rule: clipping by the global norm if asked for, then the named optimiser."""
    update = OPTIMIZERS[section.name](warmup_linear(train), section)
    if section.clip is None:
        return update
    return optax.chain(optax.clip_by_global_norm(section.clip), update)
