"""One training step as a pure function: gradients over the parts of a batch, the update rule, and numbers
that tell how it went.

The trainer compiles it for arrays and `plan` for shapes. A step whose loss or gradient is not finite changes
nothing: neither what trains nor the optimiser's state.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from experiments.training import loss as losses


def step_of(
    loss: Callable,
    tx: optax.GradientTransformation,
    accumulate: int = 1,
    penalty: Callable | None = None,
    reduce: Any = jnp.float32,
) -> Callable:
    """`step(delta, opt_state, frozen, batch, key)` → delta, opt_state, numbers.

    `loss(delta, frozen, piece, key)` is the summed loss and the number of counted tokens of one part of a
    batch, whose arrays have the parts as their first axis. The parts' gradients are added and divided by the
    tokens of all: the whole batch's gradient. `reduce`: the dtype of that sum; the gradient that the update
    rule is given has the dtype of what trains. `penalty(delta)` is added to the loss. The numbers: `loss`,
    `gradient_norm`, `tokens`; `finite`, whether the step was one; and `largest`, the largest absolute value
    of each array's gradient, (arrays,), without the penalty's.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)

    def step(delta: Any, opt_state: Any, frozen: Any, batch: dict, key: jax.Array) -> tuple:
        def part(index: jax.Array | int) -> tuple:
            piece = jax.tree.map(lambda array: array[index], batch)
            (total, count), grads = gradient(delta, frozen, piece, jax.random.fold_in(key, index))
            return total, count, jax.tree.map(lambda grad: grad.astype(reduce), grads)

        sums = part(0)
        if accumulate > 1:
            sums = jax.lax.fori_loop(
                1, accumulate, lambda index, sums: jax.tree.map(jnp.add, sums, part(index)), sums
            )
        total, count, grads = sums
        # In float32 at least: a number of tokens rounded to bfloat16 would be another one.
        wide = jnp.promote_types(reduce, jnp.float32)
        grads = jax.tree.map(
            lambda grad, leaf: losses.mean(grad.astype(wide), count.astype(wide)).astype(leaf.dtype),
            grads,
            delta,
        )
        largest = jnp.stack([jnp.max(jnp.abs(grad)).astype(jnp.float32) for grad in jax.tree.leaves(grads)])
        if penalty is not None:
            grads = jax.tree.map(jnp.add, grads, jax.grad(penalty)(delta))
        finite = jnp.stack(
            [jnp.isfinite(total), *(jnp.isfinite(grad).all() for grad in jax.tree.leaves(grads))]
        ).all()
        updates, fresh = tx.update(grads, opt_state, delta)
        delta, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (optax.apply_updates(delta, updates), fresh),
            (delta, opt_state),
        )
        numbers = {
            "loss": losses.mean(total, count),
            "gradient_norm": optax.tree.norm(grads),
            "tokens": count,
            "finite": finite,
            "largest": largest,
        }
        return delta, opt_state, numbers

    return step


def compiled_for(step: Callable, delta: Any, opt_state: Any, mesh: Mesh) -> jax.stages.Wrapped:
    """`step` under `jax.jit`, its first two arguments donated, so that they are updated in place, where
    they are; every device has the numbers.
    """
    where = lambda tree: jax.tree.map(lambda leaf: leaf.sharding, tree)
    return jax.jit(
        step, donate_argnums=(0, 1), out_shardings=(where(delta), where(opt_state), NamedSharding(mesh, P()))
    )
