"""From the tensors of a file to the leaves of a model: checked, cast, stacked, and put where they belong."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..sharding import partition_specs, Rules, shardings
from ._strict import check_width
from ._tensors import shapes_of, Tensor


def shardings_of(model: nn.Module, mesh: Mesh, rules: Rules | None) -> dict[str, Any]:
    """The sharding of every leaf. Raises `ValueError` for a mesh that does not divide one."""
    shapes = dict(shapes_of(model))
    return shardings(mesh, partition_specs(shapes, model.partition_rules if rules is None else rules), shapes)


@dataclasses.dataclass(frozen=True)
class Placer:
    """Makes leaves of tensors that are not read yet. Tensors have a `name` and `read()`, which returns an
    array, or what has an array's `shape`, `dtype`, `T` and parts and is read when it is indexed.

    `check` gets a tensor's name and values before they are cast. `layout` has the sharding of each leaf; each
    part is read when its device asks for it. Without a layout, `place` gets the whole leaf.
    """

    check: Callable[[str, np.ndarray], np.ndarray]
    param_dtype: Any
    place: Callable[[str, np.ndarray], Any]
    layout: Mapping[str, Any] | None

    def leaves(self, tensors: Iterable[Tensor], stored: Mapping[str, Any]) -> dict[str, Any]:
        """By path. The layers of a stack come one after the other in `tensors`."""
        flat = {}
        for path, group in itertools.groupby(tensors, lambda tensor: tensor.path):
            parts = list(group)
            arrays = [tensor.to_ours(stored[tensor.name].read()) for tensor in parts]
            names = [stored[tensor.name].name for tensor in parts]
            flat[path] = self.leaf(path, names, arrays, parts[0].layer is not None)
        return flat

    def leaf(self, path: str, names: list[str], arrays: list[Any], stacked: bool) -> Any:
        """`arrays` has the layers of a stack, or one array."""
        if self.layout is not None:
            return self._split(path, names, arrays, stacked)
        parts = [self._checked(name, array) for name, array in zip(names, arrays, strict=True)]
        return self.place(path, np.stack(parts) if stacked else parts[0])

    def _checked(self, name: str, array: Any) -> np.ndarray:
        array = self.check(name, np.asarray(array))
        return array if self.param_dtype is None else array.astype(jnp.dtype(self.param_dtype), copy=False)

    def _split(self, path: str, names: list[str], arrays: list[Any], stacked: bool) -> jax.Array:
        assert self.layout is not None
        check_width(path, arrays[0].dtype if self.param_dtype is None else jnp.dtype(self.param_dtype))
        shape = (len(arrays), *arrays[0].shape) if stacked else arrays[0].shape

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # which JAX asserts too; only its annotation is wider
            if not stacked:
                return np.array(self._checked(names[0], arrays[0][index]))
            layers = range(*index[0].indices(len(arrays)))
            return np.stack([self._checked(names[layer], arrays[layer][index[1:]]) for layer in layers])

        return jax.make_array_from_callback(shape, self.layout[path], part)
