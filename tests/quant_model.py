"""A model with every kind of weight that can be quantised."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax import AdaLoRA, DeltaLoRA, DoRA, DyLoRA, LoRA, LoRAFA, PiSSA, VeRA
from lora_jax.quant import NF4


METHODS = [
    LoRA(rank=2),
    DoRA(rank=2),
    VeRA(rank=4),
    LoRAFA(rank=2),
    DyLoRA(rank=2),
    DeltaLoRA(rank=2),
    AdaLoRA(rank=2),
    PiSSA(rank=2),
]
FORMATS = ["nf4", "int8", NF4(double=False), NF4(block=32)]


def numbers(*sizes, seed=0, dtype="float32", scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=sizes) * scale, dtype)


def network(dtype="float32"):
    sizes = {
        "table": (20, 16),
        "kernel": (16, 24),
        "heads": (24, 2, 8),
        "stack": (3, 16, 16),
        "convolution": (3, 16, 16),
        "turned": (10, 16),
    }
    params = {
        name: numbers(*size, seed=seed, dtype=dtype, scale=0.2)
        for seed, (name, size) in enumerate(sizes.items())
    }
    return params | {"bias": jnp.ones(24, dtype)}


AXES = {"heads": "in out out", "stack": "layer in out", "convolution": "in in out", "turned": "out in"}


def model(params, ids):
    x = params["table"][ids]  # looked up
    x = jnp.tanh(x @ params["kernel"] + params["bias"][None, None])
    x = jnp.einsum("bti,ihd->bthd", x, params["heads"]).reshape(*ids.shape, 16)
    x = lax.scan(lambda x, w: (jnp.tanh(x @ w.astype(x.dtype)), None), x, params["stack"])[0]
    x = (
        x @ params["stack"][1] @ lax.dynamic_index_in_dim(params["stack"], ids[0, 0] % 3, keepdims=False)
    )  # indexed, statically and not
    x = lax.conv_general_dilated(
        x, params["convolution"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )
    return x @ params["turned"].T


IDS = jnp.array([[3, 1, 4, 1], [5, 9, 2, 6]])
EVERY = "table|kernel|heads|stack|convolution|turned"


def randomised(delta, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda array: array + jnp.asarray(rng.normal(size=array.shape) * 0.1, array.dtype), delta
    )


def near(found, expected, bound):
    error = np.max(np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64)))
    assert error <= bound * np.max(np.abs(np.asarray(expected, np.float64))), error


# A format is one with a method as with another.
