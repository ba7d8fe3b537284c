"""The Llama family at a size for tests, and the same models in PyTorch with every parameter random."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from lora_jax.models import (
    Gemma2Config,
    Gemma3TextConfig,
    Llama,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)


_SMALL = {
    "vocab_size": 83,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# By their `model_type`: each as the published ones are, but in size. Windows are shorter than the texts.
TINY = {
    "llama": LlamaConfig(**_SMALL),
    "mistral": MistralConfig(**_SMALL, sliding_window=4),
    "qwen2": Qwen2Config(**_SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": Qwen3Config(**_SMALL, head_dim=16),
    "gemma2": Gemma2Config(**_SMALL, head_dim=16, sliding_window=4, query_pre_attn_scalar=12),
    "gemma3_text": Gemma3TextConfig(
        **_SMALL,
        head_dim=16,
        sliding_window=4,
        query_pre_attn_scalar=12,
        layer_types=("sliding_attention", "full_attention"),
    ),
}
_CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
}
# Code that runs once: compiling it well takes twice as long.
_QUICKLY = {"xla_backend_optimization_level": 0}


def kind_of(config):
    return next(kind for kind, tiny in TINY.items() if type(tiny) is type(config))


def torch_model(torch, config, head=None):
    """PyTorch's model with every parameter random, the ones that start as 0 or 1 included."""
    import transformers

    kind = kind_of(config)
    settings = transformers.AutoConfig.for_model(kind, **config.to_hf())
    settings._attn_implementation = "eager"
    name = _CLASSES[kind]
    if head is not None and kind == "gemma3_text":
        name = "Gemma3Text"
    name += "ForCausalLM" if head is None else "ForSequenceClassification"
    model = getattr(transformers, name)(settings).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def from_torch(torch, model, values=None):
    """The parameters by our names, or `values` of theirs (gradients). Written apart from `interop`, so
    that neither vouches for the other.
    """
    flat = {}
    for name, parameter in model.named_parameters():  # what is tied comes once, under its first name
        *path, _ = name.removeprefix("model.").split(".")
        array = (parameter if values is None else values[name]).detach().numpy()
        owner = model.get_submodule(name.rpartition(".")[0])
        if name.endswith(".bias"):
            leaf = "bias"
        elif isinstance(owner, torch.nn.Linear):
            array, leaf = array.T, "kernel"
        else:
            leaf = "embedding" if isinstance(owner, torch.nn.Embedding) else "scale"
        flat[(*path, leaf)] = jnp.asarray(array)
    return traverse_util.unflatten_dict(flat)


def apply(model, params, *args, **kwargs):
    """`model.apply` compiled as a whole, which is quicker than compiling each operation."""
    return compiled(model)({"params": params}, *args, **kwargs)


@functools.cache
def compiled(model):
    """One for equal models, so that arguments of the same shapes do not compile again."""
    return jax.jit(model.apply, static_argnames=("last_only", "deterministic"), compiler_options=_QUICKLY)


def random_params(config, seed=0, **options):
    """A model and NumPy parameters with nothing at 0 or 1, where two wrongs could cancel."""
    model, draw = Llama(config, **options), np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    return model, jax.tree.map(lambda leaf: draw.normal(0.05, 0.15, leaf.shape).astype(np.float32), shapes)


def some_ids(padding="none", batch=3, tokens=11, seed=3):
    """Ids and their mask: rows of unequal length, padded on one side with token 0, which occurs nowhere
    else.
    """
    ids = np.random.default_rng(seed).integers(1, 83, (batch, tokens)).astype(np.int32)
    mask = np.ones((batch, tokens), np.int32)
    if padding != "none":
        for row in range(batch):
            cut = slice(tokens - 2 * row, None) if padding == "right" else slice(0, 2 * row)
            mask[row, cut] = 0
    return np.where(mask == 1, ids, 0).astype(np.int32), mask
