"""Mixed precision as a policy: which dtype each part of a run has, and where each of the four is made true.

`parameters` when the base is read or drawn (`base`), `compute` as the model's own `dtype`, `adapters` by the
method and, of leaves that train themselves, by a cast (`trained`), `reduce` in the step's sums, the loss and
`lora_jax.adapt`. The words are in `experiments.config.Precision`. Left out: float16, whose range needs the
loss to be scaled, and 8 bits.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from experiments.config import Config, method_value, Precision
from lora_jax import Adapter


def computing(model: Any, section: Precision) -> Any:
    """`model` with the dtype of its activations.

    Where adapters have a dtype of their own, the parameters' dtype has to be given: a bias that trains in
    float32 would widen everything after it.
    """
    own = model.param_dtype if section.adapters is not None else model.dtype
    return model.clone(dtype=own if section.compute is None else jnp.dtype(section.compute))


def method(config: Config) -> Any:
    """The config's method, with A and B in the dtype of the adapters. `Full` has no dtype to choose;
    `trained` casts its leaves.
    """
    value, dtype = method_value(config.method), config.precision.adapters
    return dataclasses.replace(value, dtype=dtype) if dtype is not None and hasattr(value, "dtype") else value


def trained(delta: Any, section: Precision) -> Any:
    """`delta`, with the dtype of the adapters for the leaves that train themselves. They are master weights
    where that dtype is the wider one.
    """
    if section.adapters is None:
        return delta
    is_adapter = lambda leaf: isinstance(leaf, Adapter)
    return jax.tree.map(
        lambda leaf: leaf if is_adapter(leaf) else leaf.astype(section.adapters), delta, is_leaf=is_adapter
    )


def stored(params: Any, like: Any) -> Any:
    """`params` in the dtypes of the base, `like`. Merged adapters have them; master weights are cast."""
    return jax.tree.map(lambda leaf, base: leaf.astype(base.dtype), params, like)
