"""A tiny model with random weights, and prompts for it to continue."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.decoding import decoder as decode
from lora_jax.models.gpt2 import GPT2, GPT2Config


MODEL = GPT2(GPT2Config(vocab_size=13, n_positions=40, n_embd=8, n_layer=2, n_head=2))


END = (0, 5)


PROMPTS = [[3, 1, 4], [1], [9, 2, 6, 5, 3, 12, 8, 9, 7, 9], [3, 2], [8, 4, 6, 2, 6, 4, 3]]


@functools.cache
def weights(seed, model=MODEL):
    """Random, and large enough for the next token to depend on all before it."""
    draw = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return jax.tree.map(lambda leaf: draw.normal(0, 0.7, leaf.shape).astype(np.float32), shapes)


def generated(params, prompts, section, end=END, model=MODEL):
    return decode.generate(model, params, prompts, section, end=end)
