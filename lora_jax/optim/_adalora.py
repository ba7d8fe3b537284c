"""How AdaLoRA spends its budget of ranks (Zhang et al., ICLR 2023, arXiv 2303.10512, algorithm 1).

The form of the adapter and its regulariser are in `lora_jax.methods`. Agrees with PEFT's `RankAllocator`,
step for step.
"""

import bisect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._lowrank.labels import widened
from .._paths import named_leaves
from .._tree.nodes import Adapter, is_node, method_of
from ..methods.adalora import AdaLoRA
from ._adapters import adapters, with_adapters


class AdaLoRAState(NamedTuple):
    """`sensitivity` and `uncertainty` are the paper's smoothed I and U: trees like the parameters, with an
    `optax.MaskedNode` for each leaf that is no AdaLoRA adapter.

    >>> import jax.numpy as jnp, lora_jax, optax
    >>> delta = lora_jax.lorafy({"w": jnp.ones((8, 8))}, "w", method=lora_jax.AdaLoRA(rank=4)).delta
    >>> state = lora_jax.optim.adalora(optax.sgd(0.1), total_steps=2, target_rank=1).init(delta)
    >>> int(state.step), state.sensitivity["w"].arrays["a"].shape
    (0, (8, 4))
    """

    inner: Any
    step: jax.Array
    sensitivity: Any
    uncertainty: Any


def adalora(
    tx: optax.GradientTransformation,
    *,
    total_steps: int,
    target_rank: int,
    initial_steps: int = 0,
    final_steps: int = 0,
    every: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> optax.GradientTransformationExtraArgs:
    """`tx`, after which the least important ranks of all AdaLoRA adapters together are given up: their e
    becomes exactly 0.

    >>> import jax, jax.numpy as jnp, lora_jax, optax
    >>> params = {"up": jnp.ones((8, 8)), "down": jnp.ones((8, 8))}
    >>> delta = lora_jax.lorafy(params, ".*", method=lora_jax.AdaLoRA(rank=4)).delta
    >>> tx = lora_jax.optim.adalora(optax.sgd(0.1), total_steps=2, target_rank=1)
    >>> state = tx.init(delta)
    >>> for step in range(2):
    ...     gradient = jax.tree.map(jnp.ones_like, delta)  # of the loss, orthogonality included
    ...     updates, state = tx.update(gradient, state, delta)
    ...     delta = optax.apply_updates(delta, updates)
    >>> sum(lora_jax.optim.ranks(delta).values())  # of eight: one a matrix on average
    2

    The importance of a number p with gradient g is I = |p·g|, smoothed over the updates,

        Ī ← β₁ Ī + (1−β₁) I,   U ← β₂ U + (1−β₂) |I − Ī|,   score = Ī·U        (equations 9 to 11)

    and that of a rank is the score of its entry of e plus the mean scores of its column of A and row of B
    (equation 7). The ranks that may stay are all until `initial_steps`, then fall with the cube of the time
    that is left to the target, which they reach `final_steps` before the end (equation 12). From then on the
    choice is fixed; until then, a rank that was given up still has a gradient and may come back.

    Updates are counted from 1, and p is the number after the update, as in PEFT after `optimizer.step()`.
    (PEFT leaves the counting to the caller. Counting from 0, as its examples do, is this one step later.) g
    is the gradient that this transformation is given: chain a clipping before it, `chain(clip,
    adalora(adamw))`, to see clipped ones. What stands after it may not change the update of e, so let it be
    the outermost. Every layer of a stacked leaf is a matrix of its own, and what is no AdaLoRA adapter gets
    the update of `tx`. It takes a `delta`, or, within `only_trainable`, a combined tree. The state has two
    arrays more for each of A, B and e, in float32 or wider.

    Args:
      tx: the optimiser.
      total_steps: T, the number of updates of the whole training.
      target_rank: at the end, on average over the matrices.
      initial_steps, final_steps: how many updates at the start and at the end leave the budget alone; t_i and
        t_f.
      every: ranks are given up at each update whose number this divides, and at all of the last
        `final_steps`.
      beta1, beta2: β₁ and β₂.

    Raises:
      TypeError: a number of steps, or the rank, is no integer.
      ValueError: a number out of range, or no steps left between `initial_steps` and `final_steps`; (from
        `init`) no AdaLoRA adapter, or a target above the ranks at the start; (from `update`) no `params`.
    """
    numbers = {
        "total_steps": (total_steps, 1),
        "target_rank": (target_rank, 1),
        "initial_steps": (initial_steps, 0),
        "final_steps": (final_steps, 0),
    }
    for name, (number, least) in {**numbers, "every": (every, 1)}.items():
        _check(name, number, least)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0.0 < beta < 1.0:
            raise ValueError(f"`{name}` is {beta!r}; it must be between 0 and 1, both excluded.")
    settled = total_steps - final_steps
    if initial_steps >= settled:
        raise ValueError(
            f"`initial_steps` ({initial_steps}) and `final_steps` ({final_steps}) leave none of the "
            f"`total_steps` ({total_steps}) to give up "
            "ranks in: lower one of them."
        )
    tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> AdaLoRAState:
        if jax.tree.leaves(
            params
        ):  # `optax.tree_map_params` passes none, to learn which parts of the state are like the parameters
            _counts(adapters(params, AdaLoRA), target_rank)
        return AdaLoRAState(tx.init(params), jnp.zeros((), jnp.int32), _zeros(params), _zeros(params))

    def update(
        updates: Any, state: AdaLoRAState, params: Any = None, **extra: Any
    ) -> tuple[Any, AdaLoRAState]:
        if params is None:
            raise ValueError(
                "`params` is None; importance is |parameter · gradient|, so call `tx.update(gradient, "
                "state, delta)`."
            )
        ours, gradients, sensitivity, uncertainty = (
            adapters(tree, AdaLoRA) for tree in (params, updates, state.sensitivity, state.uncertainty)
        )
        given_up_at = schedule(*_counts(ours, target_rank), initial_steps, settled)
        updates, inner = tx.update(updates, state.inner, params, **extra)
        changes, step = adapters(updates, AdaLoRA), optax.safe_increment(state.step)

        def smoothed(beta: float) -> Callable:
            return lambda old, new: jnp.where(step < settled, beta * old + (1 - beta) * new, old)

        importance = jax.tree.map(_importance, optax.apply_updates(ours, changes), gradients)
        sensitivity = jax.tree.map(smoothed(beta1), sensitivity, importance)
        deviation = jax.tree.map(lambda new, mean: jnp.abs(new - mean), importance, sensitivity)
        uncertainty = jax.tree.map(smoothed(beta2), uncertainty, deviation)

        widest = max(
            (array.dtype for array in jax.tree.leaves(sensitivity)), key=lambda dtype: dtype.itemsize
        )
        scores = {
            path: _scores(node).astype(widest)
            for path, node in jax.tree.map(jnp.multiply, sensitivity, uncertainty).items()
        }
        given_up = jnp.sum(jnp.asarray(given_up_at) <= step)
        due = (given_up > 0) & ((step >= settled) | ((step > initial_steps) & (step % every == 0)))
        in_order = jnp.sort(jnp.concatenate([score.reshape(-1) for score in scores.values()]))
        # That of the most important rank to be given up. No score is negative.
        threshold = jnp.where(due, in_order[jnp.maximum(given_up - 1, 0)], -1.0)

        changed = {
            path: _without(ours[path].arrays["e"], changes[path], scores[path] <= threshold) for path in ours
        }
        averages = (
            with_adapters(*pair)
            for pair in ((state.sensitivity, sensitivity), (state.uncertainty, uncertainty))
        )
        return with_adapters(updates, changed), AdaLoRAState(inner, step, *averages)

    return optax.GradientTransformationExtraArgs(init, update)


def ranks(delta: Any) -> dict[str, Any]:
    """How many ranks every AdaLoRA adapter has left, by path: the entries of e that are not 0, an array of
    one number a layer for a stacked leaf.

    >>> import jax.numpy as jnp, lora_jax
    >>> delta = lora_jax.lorafy({"kernel": jnp.ones((8, 8))}, "kernel", method=lora_jax.AdaLoRA(rank=4)).delta
    >>> lora_jax.optim.ranks(delta)  # before the first update, e is zero
    {'kernel': 0}

    Takes a `delta`, or a combined tree.

    Raises:
      ValueError: there is no AdaLoRA adapter.
    """
    ours = adapters(delta, AdaLoRA)
    if not ours:
        raise ValueError(
            "`delta` holds no AdaLoRA adapter; pass the delta of `lorafy(..., method=AdaLoRA(...))`."
        )
    counts = {
        path: np.count_nonzero(np.asarray(adapter.arrays["e"]), axis=-1) for path, adapter in ours.items()
    }
    return {path: count if np.ndim(count) else int(count) for path, count in counts.items()}


def schedule(start: int, target: int, begin: int, end: int) -> np.ndarray:
    """The updates from which 1, 2, … start − target ranks are given up (equation 12).

    Not on the device: the budget is a Python float cut to an integer, as in PEFT, and in float32 some cuts
    would fall elsewhere.
    """

    def budget(step: int) -> int:
        left = 1 - (step - begin) / (end - begin)
        return int((start - target) * left**3 + target)

    steps = range(begin, end + 1)
    found = [
        bisect.bisect_left(steps, -allowed, key=lambda step: -budget(step))
        for allowed in range(start - 1, target - 1, -1)
    ]
    return begin + np.asarray(found, np.int32)


def _counts(ours: dict[str, Adapter], target_rank: int) -> tuple[int, int]:
    """How many ranks there are at the start and at the end."""
    if not ours:
        raise ValueError(
            "`params` holds no AdaLoRA adapter; pass the delta of `lorafy(..., method=AdaLoRA(...))`."
        )
    matrices = [math.prod(adapter.spec.sizes("layer")) for adapter in ours.values()]
    start = sum(
        count * method_of(adapter, AdaLoRA).rank
        for count, adapter in zip(matrices, ours.values(), strict=True)
    )
    target = target_rank * sum(matrices)
    if target > start:
        raise ValueError(
            f"`target_rank` is {target_rank}, above the average rank at the start, "
            f"{start / sum(matrices):g}: ranks are given up, never added. "
            "Lower it, or start with more: 1.5 times as many is usual."
        )
    return start, target


def _zeros(params: Any) -> Any:
    ours = adapters(params, AdaLoRA)

    def zeros(path: str, node: Any) -> Any:
        if path not in ours:
            return None if node is None else optax.MaskedNode()
        return jax.tree.map(lambda array: jnp.zeros_like(array, widened(array.dtype)), ours[path])

    nodes = [zeros(path, node) for path, node in named_leaves(params, is_leaf=is_node)]
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_node), nodes)


def _importance(parameter: jax.Array, gradient: jax.Array) -> jax.Array:
    wide = widened(parameter.dtype)
    return jnp.abs(parameter.astype(wide) * gradient.astype(wide))


def _scores(adapter: Adapter) -> jax.Array:
    """Of every rank, (layers…, rank), from those of every number (equation 7)."""
    a, b, e = (adapter.arrays[name] for name in "abe")
    a, b = a.reshape(*e.shape[:-1], -1, e.shape[-1]), b.reshape(*e.shape, -1)
    return e + a.mean(axis=-2) + b.mean(axis=-1)


def _without(e: jax.Array, change: Adapter, given_up: jax.Array) -> Adapter:
    # e + (-e) is 0 in every dtype; e + (u - (e + u)) need not be.
    dtype = jnp.promote_types(e.dtype, change.arrays["e"].dtype)
    e = jnp.where(given_up, -e.astype(dtype), change.arrays["e"].astype(dtype))
    return Adapter({**change.arrays, "e": e}, change.spec)


def _check(name: str, number: Any, least: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"`{name}` is {number!r}; pass an integer: the schedule is static.")
    if number < least:
        raise ValueError(f"`{name}` is {number}; it must be at least {least}.")
