"""PiSSA's start, which PEFT subtracts from the base's weight and does not write."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..._packed.packed import is_packed
from ..._paths import is_shape, named_leaves
from ..._tree.method import Spec
from ..._tree.nodes import is_node
from ...methods import DoRA, PiSSA
from .._adapters import Part, plain_number
from .._families import Family
from .._modules import Module
from .._tensors import Tensor, tensors_of
from ._config import AdapterConfig


def begins_at_base(config: AdapterConfig, module: Module) -> bool:
    """Whether PEFT subtracts the start of A and B from the base's weight."""
    return config.init_lora_weights == "pissa" and module.kind in ("linear", "conv1d")


def check_start(directory: Path, parts: list[Part], model: nn.Module, family: Family, params: Any) -> None:
    """Raises `ValueError` for a start that PEFT subtracts from the weight of the embedding too: in PEFT the
    head and the embedding that it is tied to are one parameter.
    """
    leaves = dict(named_leaves(params, is_leaf=is_node))
    for part in parts:
        if part.module.tied or (
            part.module.matrix.name == family.decoder
            and _is_embedding(part.module.matrix, leaves, model, family)
        ):
            raise ValueError(
                f"`init_lora_weights` is 'pissa' in {directory}, and {part.module.name!r} shares its weight "
                "with the embedding, from which PEFT subtracts the start as well: that cannot be represented "
                "here. Convert the adapter to a plain LoRA first, with the "
                "`path_initial_model_for_weight_conversion` of PEFT's `save_pretrained`, or train it without "
                "that target."
            )


def _is_embedding(matrix: Tensor, leaves: Mapping[str, Any], model: nn.Module, family: Family) -> bool:
    """Whether the head's weight is the embedding's, as in a base that was untied here only."""
    embedding = next(tensor for tensor in tensors_of(model, family) if tensor.name == family.embedding)
    arrays = [(tensor, leaves.get(tensor.path)) for tensor in (matrix, embedding)]
    if any(leaf is None or is_packed(leaf) or is_shape(leaf) for _, leaf in arrays):
        return True  # nothing to compare: the careful answer
    one, other = (tensor.to_theirs(leaf) for tensor, leaf in arrays)
    return np.array_equal(one, other)


def with_start(part: Part, config: AdapterConfig, params: Any) -> Part:
    """A DoRA that began at the base's singular vectors, as the DoRA of twice the rank that computes the same:
    `W - s A0 B0 + s A B`, whose directions PEFT scales, is `W` and one product. This is the form into which
    PEFT converts it too.
    """
    if not begins_at_base(config, part.module):
        return part
    assert isinstance(part.method, DoRA), "asked for by the config"
    matrix, (rank, *_), wide = part.module.matrix, part.arrays["a"].shape, np.float32
    leaf = dict(named_leaves(params, is_leaf=is_node))[matrix.path]
    weight = leaf if matrix.layer is None or is_shape(leaf) or is_packed(leaf) else leaf[matrix.layer]
    start = PiSSA(rank, part.method.alpha, rs=part.method.rs)
    if is_shape(leaf):
        a, b = np.zeros(part.arrays["a"].shape, wide), np.zeros(part.arrays["b"].shape, wide)
    else:
        spec = Spec(matrix.path, tuple(weight.shape), ("in", "out"), start)
        fixed = start.split(jnp.asarray(weight), spec, jax.random.key(0))[0].arrays
        a, b = np.asarray(fixed["start_a"]).T, np.asarray(fixed["start_b"]).T
    arrays = {
        **part.arrays,
        "a": np.concatenate([part.arrays["a"].astype(np.result_type(a)), a]),
        "b": np.concatenate([part.arrays["b"].astype(np.result_type(b)), -b], axis=1),
    }
    alpha = plain_number(part.method.scale * 2 * rank)
    return Part(part.module, dataclasses.replace(part.method, rank=2 * rank, alpha=alpha, rs=False), arrays)
