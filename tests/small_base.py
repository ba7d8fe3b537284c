"""The tokenizer that the tests bring along, and a tiny GPT-2 with its vocabulary and random weights."""

from pathlib import Path

import jax
import numpy as np

from experiments.config import Architecture
from experiments.running import base
from lora_jax.interop import hf


TOKENIZER = Path(__file__).resolve().parent / "tokenizer"


def write(directory):
    """The model's Hugging Face directory, with the tokenizer."""
    model = base.model(Architecture(8, 1, 2, 160), vocabulary=4096, end=0)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    hf.save(directory, model, params, source=TOKENIZER)
