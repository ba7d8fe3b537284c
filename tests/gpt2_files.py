"""A small GPT-2, and its Hugging Face directory to change."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.interop import hf
from lora_jax.models import GPT2, GPT2Config


CONFIG = GPT2Config(
    vocab_size=101,
    n_positions=16,
    n_embd=16,
    n_layer=2,
    n_head=2,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
MODEL = GPT2(CONFIG)
UNTIED = GPT2(dataclasses.replace(CONFIG, tie_word_embeddings=False))
IDS = np.arange(10, dtype=np.int32).reshape(2, 5)


def random_params(model, dtype=np.float32):
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: draw.normal(0.05, 0.15, leaf.shape).astype(dtype), _shapes(model))


@functools.cache
def _shapes(model):
    return jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]


def logits_of(model, params):
    return _compiled(model)({"params": params}, IDS)


@functools.cache
def _compiled(model):
    return jax.jit(model.apply)


def assert_same(found, expected):
    """Equal to the bit, dtype and structure included."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def saved(tmp_path):
    hf.save(tmp_path / "model", MODEL, random_params(MODEL))
    return tmp_path / "model"


def edit(dir, change):
    """Rewrites the tensors of a directory as `change(tensors)` returns them, or as it left them."""
    tensors = load_file(dir / "model.safetensors")
    save_file(change(tensors) or tensors, dir / "model.safetensors", metadata={"format": "pt"})


def configure(dir, **changes):
    edit(dir, lambda tensors: None)  # without the checksum of the config
    settings = json.loads((dir / "config.json").read_text())
    (dir / "config.json").write_text(json.dumps({**settings, **changes}))
