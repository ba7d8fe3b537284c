"""The weights of a row: random, written once as a Hugging Face directory that every way reads."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.interop import hf
from lora_jax.models import GPT2, GPT2Config, Llama, LlamaConfig, Roberta, RobertaConfig


# GPT-2's fused projection has query, key and value in a row.
TARGETS = {
    ("gpt2", "q, v"): "h/.*/attn/c_attn/kernel",
    ("gpt2", "all-linear"): "h/.*/kernel",
    ("smollm2-135m", "q, v"): "layers/.*/(q_proj|v_proj)/kernel",
    ("smollm2-135m", "all-linear"): "layers/.*/kernel",
    ("roberta-base", "q, v"): "encoder/.*/(query|value)/kernel",
    ("roberta-base", "all-linear"): "encoder/.*/kernel",
}
# The same for PEFT, by the ends of its modules' names. It cannot adapt two blocks of a fused projection.
MODULES = {
    ("gpt2", "all-linear"): ["c_attn", "c_proj", "c_fc"],
    ("smollm2-135m", "q, v"): ["q_proj", "v_proj"],
    ("smollm2-135m", "all-linear"): [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")],
    ("roberta-base", "q, v"): ["query", "value"],
    ("roberta-base", "all-linear"): r".*encoder\.layer.*\.(query|key|value|dense)",
}


def described(name: str) -> GPT2 | Llama | Roberta:
    """The model with its published sizes, and without dropout."""
    if name == "gpt2":
        return GPT2(GPT2Config.named("gpt2", embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0))
    if name == "smollm2-135m":
        return Llama(LlamaConfig.named("smollm2-135m"))
    config = RobertaConfig.named("roberta-base", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return Roberta(config, head="sequence_classification")


def write(name: str, directory: Path, layers: int | None = None) -> None:
    """A directory that `hf.load` and `transformers` read. `layers`: in place of the published number."""
    model = described(name)
    if layers is not None:
        depth = "n_layer" if name == "gpt2" else "num_hidden_layers"
        model = model.clone(config=dataclasses.replace(model.config, **{depth: layers}))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    hf.save(directory, model, params)


def batch(name: str, examples: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, and labels: what follows each token, or the class of each example."""
    draw = np.random.default_rng(0)
    ids = draw.integers(5, described(name).config.vocab_size, (examples, tokens)).astype(np.int32)
    return ids, (draw.integers(0, 2, examples) if name == "roberta-base" else ids).astype(np.int32)
