"""A name for the arrays of low-rank products that a `jax.checkpoint` should keep in place of computing a
product again: `x A`, which is as narrow as the rank, and what a trained diagonal multiplies.

It means nothing to a `checkpoint` whose policy does not ask for it.
"""

import jax
from jax.ad_checkpoint import checkpoint_name


NAME = "product_of_lora_jax"


def named(product: jax.Array) -> jax.Array:
    return checkpoint_name(product, NAME)


POLICY = jax.checkpoint_policies.save_only_these_names(NAME)
