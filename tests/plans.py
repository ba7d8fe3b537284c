"""Small models to plan for, as directories with nothing but a config.json."""

import dataclasses
import json

import encoders
import jax
import llama_models
import pytest

from experiments.plan import models
from lora_jax.models import GPT2Config


SIZES = {
    "vocab_size": 80,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
}


CONFIGS = {
    **{kind: dataclasses.replace(config, **SIZES, head_dim=8) for kind, config in llama_models.TINY.items()},
    "gpt2": GPT2Config(vocab_size=80, n_positions=24, n_embd=64, n_layer=2, n_head=8),
    "bert": dataclasses.replace(encoders.BERT, **SIZES),
    "roberta": dataclasses.replace(encoders.ROBERTA, **SIZES),
    "deberta-v2": dataclasses.replace(encoders.DEBERTA, **SIZES),
}


SMALL = {"batch": 8, "tokens": 16}


@pytest.fixture(autouse=True, scope="module")
def plans_promote():
    """Optax raises floats to integer powers of its counters, and plans are made as users make them."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A directory with nothing but a config.json, for each kind of model."""
    root = tmp_path_factory.mktemp("models")
    for kind, config in CONFIGS.items():
        (root / kind).mkdir()
        (root / kind / "config.json").write_text(json.dumps({**config.to_hf(), "model_type": kind}))
    return root


def small(directory, dtype="float32", checkpoint=True, **changes):
    subject = models.named(str(directory), dtype, checkpoint=checkpoint)
    return dataclasses.replace(subject, model=subject.model.clone(**changes))
