"""A small GPT-2 here and in PyTorch, with every parameter random."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from lora_jax.models import GPT2, GPT2Config


TINY = GPT2Config(n_positions=32, n_embd=32, n_layer=2, n_head=4)
SMALL_VOCABULARY = dataclasses.replace(TINY, vocab_size=101, bos_token_id=0, eos_token_id=None)
TEXTS = ["name : The Eagle | Type : coffee shop || The Eagle is a", "A coffee shop near the river"]


def apply(model, params, *args, **kwargs):
    """`model.apply` compiled as a whole, which is quicker than compiling each operation."""
    return compiled(model)({"params": params}, *args, **kwargs)


@functools.cache
def compiled(model):
    """One for equal models, so that arguments of the same shapes do not compile again."""
    return jax.jit(model.apply, static_argnames=("last_only", "deterministic"))


def torch_model(torch, config):
    """PyTorch's model with every parameter random, the ones that start as 0 or 1 included."""
    import transformers

    settings = transformers.GPT2Config(**config.to_hf(), attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(settings).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def from_torch(model):
    """The parameters by our names. Written apart from `interop`, so that neither vouches for the other."""
    leaf = {"wte": "embedding", "wpe": "embedding", "ln_1": "scale", "ln_2": "scale", "ln_f": "scale"}
    flat = {}
    for name, value in model.state_dict().items():
        *path, last = name.removeprefix("transformer.").split(".")
        if path == ["lm_head"]:
            if model.config.tie_word_embeddings:
                continue
            value = value.T
        flat[(*path, leaf.get(path[-1], "kernel") if last == "weight" else last)] = jnp.asarray(value.numpy())
    return traverse_util.unflatten_dict(flat)


def tensor(torch, array):
    return None if array is None else torch.tensor(np.asarray(array), dtype=torch.long)


def random_params(config, seed=0):
    """A model and NumPy parameters with nothing at 0 or 1, where two wrongs could cancel; nothing is
    compiled.
    """
    model, draw = GPT2(config), np.random.default_rng(seed)
    shapes = _shapes(model)
    return model, jax.tree.map(lambda leaf: draw.normal(0.05, 0.15, leaf.shape).astype(np.float32), shapes)


@functools.cache
def _shapes(model):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]


def some_ids(shape, seed=3, vocabulary=101):
    return np.random.default_rng(seed).integers(0, vocabulary, shape, dtype=np.int32)
