"""Optimisers by name, and the one schedule of the paper's language experiments.

A row of `OPTIMIZERS` takes a learning-rate schedule, the config's section and the weight decay, and returns
an optax transformation. `adamw_authors` is what LoRA's authors trained GPT-2 with; it differs from `adamw` in
where epsilon stands and in what decays.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.config import Optimizer, Train
from lora_jax import optim


def warmup_linear(train: Train, lr: Any = None) -> Callable[[jax.Array | int], jax.Array]:
    """Rate lr * step / warmup, then linearly down to 0 at `steps`; step counts from 0, so the first
    update has rate 0. `lr`: an array in place of `train.lr`.
    """
    highest = train.lr if lr is None else lr

    def rate(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rising = step / max(train.warmup, 1)
        falling = jnp.maximum(0.0, train.steps - step) / max(train.steps - train.warmup, 1)
        return highest * jnp.where(step < train.warmup, rising, falling)

    return rate


def scale_by_adam_plain_epsilon(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps), where t counts updates from 1.

    The order of computation that section 2 of Adam's paper offers for efficiency, with its epsilon beside the
    uncorrected sqrt(v). `optax.scale_by_adam` adds epsilon to the corrected one; beside that, the epsilon
    here is larger by 1 / sqrt(1 - b2^t): 32 times at the first step with b2 = 0.999, and fading.
    """

    def correction(decay: float, count: jax.Array) -> jax.Array:
        # 1 - decay^count without the cancellation that costs float32 four digits while decay^count is near 1.
        return -jnp.expm1(count.astype(jnp.float32) * (math.log(decay) if decay else -math.inf))

    def update(
        grads: optax.Updates, state: optax.ScaleByAdamState, params: optax.Params | None = None
    ) -> tuple:
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2)
        count = optax.safe_increment(state.count)
        scale = jnp.sqrt(correction(b2, count)) / correction(b1, count)
        updates = jax.tree.map(lambda m, v: scale.astype(m.dtype) * m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam(b1, b2).init, update)


def decay_after_update(
    rate: Callable[[jax.Array], jax.Array], weight_decay: Any
) -> optax.GradientTransformation:
    """Stands last and takes rate * weight_decay of the parameter that the update u leads to: p' = (p + u)(1 -
    rate * weight_decay).

    `optax.add_decayed_weights` decays p as it was before.
    """

    def init(params: optax.Params) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates: optax.Updates, state: optax.ScaleByScheduleState, params: optax.Params) -> tuple:
        lost = rate(state.count) * weight_decay
        updates = jax.tree.map(
            lambda u, p: u - lost.astype(u.dtype) * (p.astype(u.dtype) + u), updates, params
        )
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def _adamw(rate: Callable, section: Optimizer, weight_decay: Any) -> optax.GradientTransformation:
    return optax.adamw(rate, b1=section.b1, b2=section.b2, eps=section.eps, weight_decay=weight_decay)


def _adamw_authors(rate: Callable, section: Optimizer, weight_decay: Any) -> optax.GradientTransformation:
    return optax.chain(
        scale_by_adam_plain_epsilon(section.b1, section.b2, section.eps),
        optax.scale_by_learning_rate(rate),
        decay_after_update(rate, weight_decay),
    )


OPTIMIZERS = {"adamw": _adamw, "adamw_authors": _adamw_authors}


def create(
    section: Optimizer, train: Train, *, lr: Any = None, weight_decay: Any = None
) -> optax.GradientTransformation:
    """The update rule of any parameters: clipping by the global norm if asked for, then the named
    optimiser. `lr`, `weight_decay`: arrays in place of the sections' numbers, as a sweep has them.
    """
    decay = section.weight_decay if weight_decay is None else weight_decay
    update = OPTIMIZERS[section.name](warmup_linear(train, lr), section, decay)
    if section.clip is None:
        return update
    return optax.chain(optax.clip_by_global_norm(section.clip), update)


def for_adapters(
    section: Optimizer, train: Train, frozen: Any, delta: Any, **numbers: Any
) -> optax.GradientTransformation:
    """The same with the rules that belong to a method of adaptation: LoRA-FA's gradient before, LoRA+'s
    rates and AdaLoRA's budget after. `numbers`: of `create`.
    """
    tx = create(section, train, **numbers)
    if section.lorafa:
        tx = optax.chain(optim.lorafa(frozen, delta), tx)
    if section.loraplus is not None:
        tx = optim.loraplus(tx, section.loraplus)
    if section.adalora is not None:
        budget = section.adalora
        steps = {
            "initial_steps": budget.initial_steps,
            "final_steps": budget.final_steps,
            "every": budget.every,
        }
        tx = optim.adalora(tx, total_steps=train.steps, target_rank=budget.target_rank, **steps)
    return tx


def state_shardings(
    tx: optax.GradientTransformation, state: optax.OptState, placed: Any, everywhere: Any
) -> Any:
    """Where the arrays of `state`, or of its shapes, live: moments are trees like what trains, whose
    shardings are `placed`; counters are `everywhere`.
    """
    # A rule may pass over some leaves.
    masked = lambda node: isinstance(node, optax.MaskedNode)
    follow = lambda leaf, where: leaf if masked(leaf) else where
    return optax.tree_map_params(
        tx, follow, state, placed, transform_non_params=lambda _: everywhere, is_leaf=masked
    )
