"""Adapters of random numbers, and their dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from lora_jax import LoRA


# A matrix, a stack with several out axes, and one of several in axes that is stored transposed.
SHAPES = {"w": (6, 8), "heads": (2, 6, 2, 4), "window": (7, 2, 3)}
WHERE = {"w": "in out", "heads": "layer in out out", "window": "out in in"}


def shaped(sizes, dtype="float64"):
    """From shapes, and with NumPy's numbers, adapters are made without a compilation."""
    return jax.tree.map(
        lambda size: jax.ShapeDtypeStruct(size, dtype), sizes, is_leaf=lambda node: isinstance(node, tuple)
    )


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda array: jnp.asarray(rng.normal(size=array.shape), array.dtype), tree)


def random_delta(method=LoRA(rank=3, alpha=4), seed=0, targets="w|heads|window", dtype="float64", axes=WHERE):
    return random_like(lora_jax.lorafy(shaped(SHAPES, dtype), targets, method=method, axes=axes).delta, seed)


def lorafied(method, dtype="float32", targets="w|heads", seed=3):
    """Both trees with random numbers in all that trains and all that is fixed."""
    frozen, delta = lora_jax.lorafy(shaped(SHAPES, dtype), targets, method=method, axes=WHERE)
    return random_like(frozen, seed), random_like(delta, seed + 1)


def dense(delta):
    """ΔW of every plain LoRA adapter, a stack of matrices (layers, in, out)."""
    found = {}
    for name, leaf in delta.items():
        if leaf is not None:
            a, b, method = np.asarray(leaf.arrays["a"]), np.asarray(leaf.arrays["b"]), leaf.spec.method
            count = leaf.spec.shape[0] if "layer" in leaf.spec.axes else 1
            scale = method.alpha / (method.rank**0.5 if method.rs else method.rank)
            found[name] = scale * a.reshape(count, -1, method.rank) @ b.reshape(count, method.rank, -1)
    return found


def assert_close(found, wanted, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **{"rtol": 1e-10, "atol": 1e-11, **tolerance}),
        found,
        wanted,
    )
