"""BERT, RoBERTa and DeBERTa at a size for tests, and the same models in PyTorch with every parameter
random.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from lora_jax.models import Bert, BertConfig, DebertaV2, DebertaV2Config, Roberta, RobertaConfig


# The published models, everything as published but the sizes: names of layers of width 32.
_SMALL = {
    "vocab_size": 83,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_BUCKETS = {"position_buckets": 8, "max_position_embeddings": 24}
SCALED = {
    **{name: BertConfig.named(name, **_SMALL, max_position_embeddings=24) for name in BertConfig.sizes},
    **{name: RobertaConfig.named(name, **_SMALL, max_position_embeddings=26) for name in RobertaConfig.sizes},
    **{name: DebertaV2Config.named(name, **_SMALL, **_BUCKETS) for name in DebertaV2Config.sizes},
}
BERT, ROBERTA, DEBERTA = (SCALED[name] for name in ("bert-base-uncased", "roberta-base", "deberta-v2-xlarge"))
_MODELS = {BertConfig: Bert, RobertaConfig: Roberta, DebertaV2Config: DebertaV2}
_CLASSES = {
    "masked_lm": "ForMaskedLM",
    "sequence_classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
    "features": "Model",
}


def named_class(config, head):
    return _MODELS[type(config)].__name__ + _CLASSES[head]


def ours(config, head, **options):
    return _MODELS[type(config)](config, head=head, **options)


def their_config(config, **options):
    import transformers

    settings = {key: value for key, value in config.to_hf().items() if value is not None}
    return getattr(transformers, type(config).__name__)(**settings, **options)


def theirs(torch, config, head, seed=7):
    """PyTorch's model with every parameter random, the ones that start as 0 or 1 included."""
    import transformers

    model = getattr(transformers, named_class(config, head))(their_config(config)).eval()
    generator = torch.Generator().manual_seed(seed)
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
        *path, last = name.removeprefix(model.base_model_prefix + ".").split(".")
        array = (parameter if values is None else values[name]).detach().numpy()
        owner = model.get_submodule(name.rpartition(".")[0])
        if last == "weight":
            if isinstance(owner, torch.nn.Linear | torch.nn.Conv1d):
                array, last = array.T, "kernel"
            else:
                last = {torch.nn.Embedding: "embedding", torch.nn.LayerNorm: "scale"}[type(owner)]
        if path[-1:] == ["decoder"] and last == "bias":  # untied, it is the one that is added
            path.pop()
        flat[(*path, last)] = jnp.asarray(array)
    return traverse_util.unflatten_dict(flat)


def at(tree, path):
    """The leaf of a tree of dicts at a path of JAX's."""
    for entry in path:
        tree = tree[entry.key]
    return tree


def run_theirs(torch, model, ids, mask=None, **arguments):
    arguments = {
        name: None if value is None else torch.tensor(np.asarray(value), dtype=torch.long)
        for name, value in arguments.items()
    }
    mask = None if mask is None else torch.tensor(np.asarray(mask), dtype=torch.long)
    out = model(torch.tensor(np.asarray(ids), dtype=torch.long), attention_mask=mask, **arguments)
    if hasattr(out, "start_logits"):
        return torch.stack([out.start_logits, out.end_logits], -1)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


# Code that runs once: compiling it well takes twice as long.
QUICKLY = {"xla_backend_optimization_level": 0}


@functools.cache
def compiled(model):
    """One for equal models, so that arguments of the same shapes do not compile again."""
    return jax.jit(model.apply, compiler_options=QUICKLY)


def apply(model, params, *args, **kwargs):
    """`model.apply` compiled as a whole, which is quicker than compiling each operation."""
    return compiled(model)({"params": params}, *args, **kwargs)


def some_ids(config, tokens, padding="none", batch=3, seed=3):
    """Ids and their mask: rows of unequal length, padded on one side with the padding token, which occurs
    nowhere else.
    """
    rng = np.random.default_rng(seed)
    ids, mask = (
        rng.integers(config.pad_token_id + 1, config.vocab_size, (batch, tokens)),
        np.ones((batch, tokens), int),
    )
    if padding == "none":
        return ids, None
    for row in range(1, batch):
        gone = slice(tokens - row, None) if padding == "right" else slice(0, row)
        ids[row, gone], mask[row, gone] = config.pad_token_id, 0
    return ids, mask


@functools.cache
def shapes_of(model, wide=False):
    """Of its parameters; `wide` tells apart what is asked for with 64 bits."""
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]


def random_params(model, seed=0, scale=0.15):
    """Parameters with nothing at 0 or 1, where two wrongs could cancel."""
    rng = np.random.default_rng(seed)
    shapes = shapes_of(model, bool(jax.config.jax_enable_x64))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.05, scale, leaf.shape), leaf.dtype), shapes)


def changed(config, **changes):
    return dataclasses.replace(config, **changes)
