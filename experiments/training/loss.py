"""The loss of causal language modelling on part of each sequence, as the authors of LoRA compute it.

Training smooths the labels over the whole vocabulary (the target included); evaluation is the plain negative
log-likelihood. Both are sums over the masked tokens divided by (their number + 1e-4). Sum and number are
returned apart, so that parts of a batch, accumulated one after the other, give the loss and gradient of the
whole batch.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp


Number = TypeVar("Number", jax.Array, float)

# The authors' guard against a batch without a single counted token; it is part of the published loss, so it
# stays.
COUNT_OFFSET = 1e-4


def token_losses(
    logits: jax.Array, labels: jax.Array, smoothing: float = 0.0, dtype: Any = jnp.float32
) -> jax.Array:
    """(1 - s) NLL + s mean_v(-log p_v) for every token, computed in `dtype`.

    Both terms are written with one log-sum-exp, so that no array of log-probabilities of the vocabulary's
    size is kept for the backward pass: NLL = lse - logit[label], mean(-log p) = lse - mean(logits).
    """
    logits = logits.astype(dtype)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    loss = normalizer - target
    if smoothing:
        loss = (1 - smoothing) * loss + smoothing * (normalizer - jnp.mean(logits, axis=-1))
    return loss


def masked_sum(
    logits: jax.Array, labels: jax.Array, mask: jax.Array, smoothing: float = 0.0, dtype: Any = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """The summed loss of the tokens whose mask is 1, in `dtype`, and their number, which bfloat16 has no
    room for from 257 on.
    """
    return jnp.sum(token_losses(logits, labels, smoothing, dtype) * mask.astype(dtype)), jnp.sum(
        mask.astype(jnp.float32)
    )


def mean(total: Number, count: Number) -> Number:
    """The loss that is reported and differentiated: sum / (count + 1e-4)."""
    return total / (count + COUNT_OFFSET)
