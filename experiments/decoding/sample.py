"""Drawing the next token: temperature, then the likeliest k, then the fewest that hold p (nucleus
sampling, Holtzman et al. 2020).
"""

import jax
import jax.numpy as jnp

from experiments.config import Sample


def draw(section: Sample, key: jax.Array, logits_V: jax.Array) -> jax.Array:
    """One token of the distribution that `section` describes. Of equal logits at an edge the lower tokens
    stay.
    """
    logits_V = logits_V / section.temperature
    if section.top_k is None and section.top_p is None:
        return jax.random.categorical(key, logits_V).astype(jnp.int32)
    tokens_V = jnp.argsort(-logits_V, stable=True)
    sorted_V = logits_V[tokens_V]
    if section.top_k is not None:
        sorted_V = jnp.where(jnp.arange(sorted_V.size) < section.top_k, sorted_V, -jnp.inf)
    if section.top_p is not None:
        p_V = jax.nn.softmax(sorted_V)
        # A token stays while those before it do not hold `top_p` yet, so the first always does.
        sorted_V = jnp.where(jnp.cumsum(p_V) - p_V < section.top_p, sorted_V, -jnp.inf)
    return tokens_V[jax.random.categorical(key, sorted_V)].astype(jnp.int32)
