"""The loss of causal language modelling on part of each sequence, as the authors of LoRA compute it.

Training smooths the labels over the whole vocabulary (the target included); evaluation is the plain negative
log-likelihood. The model computes both token by token (`labels`). What is reported is their sum over the
masked tokens divided by (their number + 1e-4). Sum and number are returned apart, so that parts of a batch,
accumulated one after the other, give the loss and gradient of the whole batch.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from lora_jax.models import cross_entropy


Number = TypeVar("Number", jax.Array, float)

# The authors' guard against a batch without a single counted token; it is part of the published loss, so it
# stays.
COUNT_OFFSET = 1e-4


def of_labels(model: Callable, piece: dict, smoothing: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """The loss of each label of a part of a batch, and the mask of those that are counted.

    Labels with a `mask` of 1 are counted. Without a `mask`, each label is: the class of an example, then.
    With `columns`, the labels are of these positions, and the head computes no other logits. With
    `segment_ids`, a row has several texts.
    """
    inputs = [piece[name] for name in ("input_ids", "attention_mask") if name in piece]
    if "mask" not in piece:
        found = cross_entropy(model(*inputs), piece["labels"], smoothing)
        return found, jnp.ones(found.shape)
    named = {"logits_at": "columns", "segment_ids": "segment_ids"}
    some = {name: piece[array] for name, array in named.items() if array in piece}
    return model(*inputs, labels=piece["labels"], label_smoothing=smoothing, **some), piece["mask"]


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
