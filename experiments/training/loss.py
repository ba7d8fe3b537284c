"""The loss of causal language modelling on part of each sequence, as the authors of LoRA compute it.

Training smooths the labels over the whole vocabulary (the target included); evaluation is the plain negative
log-likelihood. The model computes both token by token (`labels`). What is reported is their sum over the
masked tokens divided by (their number + 1e-4). Sum and number are returned apart, so that parts of a batch,
accumulated one after the other, give the loss and gradient of the whole batch.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp


Number = TypeVar("Number", jax.Array, float)

# The authors' guard against a batch without a single counted token; it is part of the published loss, so it
# stays.
COUNT_OFFSET = 1e-4


def masked_sum(
    token_losses: jax.Array, mask: jax.Array, dtype: Any = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """The summed loss of the tokens whose mask is 1, in `dtype`, and their number, which bfloat16 has no
    room for from 257 on.
    """
    return jnp.sum(token_losses.astype(dtype) * mask.astype(dtype)), jnp.sum(mask.astype(jnp.float32))


def mean(total: Number, count: Number) -> Number:
    """The loss that is reported and differentiated: sum / (count + 1e-4)."""
    return total / (count + COUNT_OFFSET)
