"""Weights of a GGUF file that stay packed in the parameters, byte for byte but for the order of rows."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..._packed.blocks import KINDS
from ..._packed.packed import Packed
from ..._paths import ALL_LINEAR, resolve_targets
from ...quant import from_gguf
from ...sharding import frozen_specs, shardings
from .._placing import Placer
from .._strict import check_width
from .._tensors import shapes_of, Tensor
from ._reader import Stored


# The projections of a layer. Embeddings are looked up, and a head is large, as in `quantize`.
_LINEAR = r"(q|k|v|o|gate|up|down)_proj/kernel"
_PLAIN = ("F32", "F16", "BF16")


def packed_groups(
    model: nn.Module, tensors: Iterable[Tensor], stored: Mapping[str, Stored], packed: Any
) -> dict[str, list[Tensor]]:
    """The tensors of each leaf that stays packed, by path. Leaves of floating-point numbers do not.

    Raises:
      ValueError: a leaf is stored in a type that is not kept packed, or its layers in several.
    """
    if packed is False or packed is None:
        return {}
    targets = _LINEAR if packed is True or packed == ALL_LINEAR else packed
    chosen = resolve_targets(list(shapes_of(model).items()), targets, True, lambda taken: [])
    groups: dict[str, list[Tensor]] = {path: [] for path, method in chosen.items() if method}
    for tensor in tensors:
        if tensor.path in groups:
            groups[tensor.path].append(tensor)
    found = {}
    for path, group in groups.items():
        kinds = sorted({stored[tensor.name].tensor.tensor_type.name for tensor in group})
        if set(kinds) <= set(_PLAIN):
            continue
        if kinds[1:]:
            raise ValueError(
                f"`packed` names {path!r}, whose layers are stored in several types ({', '.join(kinds)}), "
                "and packed layers of one type alone can be stacked: pass `scan=False`, or patterns without "
                "it."
            )
        if kinds[0] not in KINDS:
            raise ValueError(
                f"`packed` names {path!r}, which is stored as {kinds[0]}; packed may stay "
                f"{', '.join(KINDS)}. Pass patterns without it."
            )
        found[path] = group
    return found


def packed_leaf(path: str, group: list[Tensor], stored: Mapping[str, Stored], placer: Placer) -> Packed:
    """One leaf, of one tensor or of the layers of a stack."""
    tensors = [stored[tensor.name] for tensor in group]
    for tensor in tensors:
        placer.check(tensor.name, np.asarray(tensor.read()))
    parts = [tensor.rows() for tensor in tensors]
    data = parts[0] if group[0].layer is None else np.stack(parts)
    dtype = jnp.dtype(placer.param_dtype or jnp.float32)
    check_width(path, dtype)
    leaf = from_gguf(data, tensors[0].tensor.tensor_type.name, transpose=group[0].transposed, dtype=dtype)
    if placer.layout is None:
        return dataclasses.replace(leaf, arrays={"codes": placer.place(path, leaf.arrays["codes"])})
    sharding = placer.layout[path]
    specs = frozen_specs({path: leaf}, {path: sharding.spec})
    split = shardings(sharding.mesh, specs, {path: leaf})
    return jax.tree.map(_split, {path: leaf}, split)[path]


def _split(array: np.ndarray, sharding: Any) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
