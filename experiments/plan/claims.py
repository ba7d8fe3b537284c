"""What LoRA's paper says of GPT-3 175B (Hu et al. 2021, arXiv 2106.09685, section 4.2), beside what the
shapes give.

Of one copy of everything, however many devices it is spread over. Left out: the paper's 25% more tokens a
second, which is a measurement.
"""

from typing import Any

import jax

import lora_jax
from experiments.plan import flops, size
from experiments.plan.models import Subject
from experiments.plan.step import applied, Step


# Bytes, as the paper prints them.
FULL_MEMORY, LORA_MEMORY, FULL_CHECKPOINT, LORA_CHECKPOINT = 1.2e12, 350e9, 350e9, 35e6


def of(subject: Subject, step: Step, tokens: int) -> dict[str, Any]:
    """The numbers on both sides, for the step's own method and dtype."""
    weights, trained = size.whole(step.params), size.whole(step.delta)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(step.delta))
    merged = jax.eval_shape(lora_jax.merge, step.frozen, step.delta)
    same = lambda one, other: (one.shape, one.dtype) == (other.shape, other.dtype)
    ids = jax.ShapeDtypeStruct((1, tokens), "int32")
    adapted = lambda frozen, delta, ids: lora_jax.adapt(applied(subject))(
        lora_jax.combine(frozen, delta), ids
    )
    return {
        "paper": {
            "full": FULL_MEMORY,
            "lora": LORA_MEMORY,
            "full_checkpoint": FULL_CHECKPOINT,
            "lora_checkpoint": LORA_CHECKPOINT,
        },
        "full": {"weights": weights, "moments": 2 * weights, "gradients": weights, "all": 4 * weights},
        "lora": {
            "weights": weights,
            "trained": trained,
            "moments": 2 * trained,
            "gradients": trained,
            "all": weights + 4 * trained,
        },
        "checkpoint": {"full": weights, "lora": trained, "lora_16_bits": 2 * numbers},
        "merged_is_the_base": jax.tree.structure(merged) == jax.tree.structure(step.params)
        and jax.tree.all(jax.tree.map(same, merged, step.params)),
        "forward_flops": {
            "base": flops.of(applied(subject), step.params, ids),
            "adapted": flops.of(adapted, step.frozen, step.delta, ids),
            "merged": flops.of(applied(subject), merged, ids),
        },
    }
