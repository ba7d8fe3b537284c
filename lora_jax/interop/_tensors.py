"""The tensors of a given model's files, and where each lies in its parameters."""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ..processes import on_host
from ._families import Family


class Tensor(NamedTuple):
    """One tensor of a file, and where it lives in the parameters of a given model."""

    name: str  # in the file
    path: str  # in our parameters, components joined by `/`
    layer: int | None  # in a scanned model, its index along the first axis of our leaf
    transposed: bool
    shape: tuple[int, ...]  # in the file

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        return array.T if self.transposed else array

    def to_theirs(self, leaf) -> np.ndarray:
        """The array that the file holds. Of a stacked leaf, only this layer leaves the device."""
        array = on_host(leaf, self.layer)
        # The writer takes the buffer as it lies in memory and ignores strides.
        return np.ascontiguousarray(array.T if self.transposed else array)


def tensors_of(model: nn.Module, family: Family) -> list[Tensor]:
    """Every tensor of the model's files, in the order of the table and of the layers."""
    shapes = shapes_of(model)
    tensors = []
    for theirs, ours, transposed in family.rows():
        for i in range(getattr(model.config, family.layers)) if "{}" in theirs else [None]:
            path = ours.replace("/{}/", "/") if model.scan and i is not None else ours.format(i)
            layer = i if model.scan else None
            if path in shapes:
                shape = shapes[path].shape[1:] if layer is not None else shapes[path].shape
                tensors.append(
                    Tensor(theirs.format(i), path, layer, transposed, shape[::-1] if transposed else shape)
                )
    return tensors


def layout_of(model: nn.Module) -> str:
    """How a model's layers lie in its parameters and what brings them there, for errors."""
    return "stacked, `stack_layers(params)`" if model.scan else "not stacked, `unstack_layers(params)`"


@functools.lru_cache(maxsize=64)  # tracing a model takes as long as reading it
def shapes_of(model: nn.Module) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The shapes of a model's parameters by path. Nothing is allocated."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))
    return MappingProxyType(traverse_util.flatten_dict(shapes["params"], sep="/"))
