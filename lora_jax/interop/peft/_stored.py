"""The tensors in an adapter's files, under the names that are expected and without what is the base's."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from ..._packed.packed import Packed
from ..._paths import is_shape, named_leaves
from ..._tree.nodes import is_node
from .. import _state_dict
from .._families import Family
from .._modules import modules_of
from .._safetensors import stored_tensors
from .._tensors import Tensor
from ._layout import PREFIX
from ._plan import Plan


def tensors(directory: Path) -> tuple[Path, Mapping[str, Any]]:
    """The file that holds them, or the first of several, and the tensors by name, not read yet."""
    names = ("adapter_model.safetensors", "adapter_model.safetensors.index.json")
    binaries = ("adapter_model.bin", "adapter_model.bin.index.json")
    if not any((directory / name).is_file() for name in names):
        if any((directory / name).is_file() for name in binaries):
            return directory / binaries[0], _state_dict.stored_binaries(directory, "adapter_model")
    return directory / "adapter_model.safetensors", stored_tensors(directory, stem="adapter_model")


def under_expected_names(
    plan: Plan, directory: Path, stored: Mapping[str, Any], family: Family
) -> dict[str, Any]:
    """The tensors by the names that are expected, each array once.

    Older files have `.weight` after DoRA's magnitudes. Where all biases train, and where embeddings are saved
    beside the adapter, PEFT writes tensors that it saves whole a second time, under their names in its own
    wrapper.
    """
    old = {
        f"{name}.weight": name for names in plan.names.values() for ours, name in names.items() if ours == "m"
    }
    named = {
        old[name] if name in old and old[name] not in stored else name: tensor
        for name, tensor in stored.items()
    }
    for name in [name for name in named if ".modules_to_save." in name or ".original_module." in name]:
        original = ".original_module." in name  # of the base; it has no effect
        inner = re.sub(r"\.original_module\.|\.modules_to_save(\.default)?\.", ".", name)
        if inner in plan.expected and inner in named:
            if not original and not np.array_equal(named[name].read(), named[inner].read()):
                raise ValueError(
                    f"{directory} has two different values of one tensor, {name!r} and {inner!r}: save the "
                    "adapter again."
                )
            del named[name]
    # A bare model has parts that a model with a head may lack.
    full = lambda name: family.full_name(name.removeprefix(PREFIX))
    return {
        name: tensor
        for name, tensor in named.items()
        if name in plan.expected or not family.leftovers.fullmatch(full(name))
    }


def without_copies_of_base(
    plan: Plan, directory: Path, model: nn.Module, family: Family, params: Any, stored: dict[str, Any]
) -> dict[str, Any]:
    """The tensors without embeddings, which PEFT writes beside an adapter of one of them. They must equal the
    base's.
    """
    kept, leaves = {}, dict(named_leaves(params, is_leaf=is_node))
    copies: dict[str, Tensor] = {}
    for module in modules_of(model, family):
        if (
            module.kind == "embedding"
            or module.weight is not None
            and (module.tied or module.weight.name == family.decoder)
        ):
            name = module.name.removeprefix(family.prefix) if plan.bare else module.name
            copies |= {f"{PREFIX}{name}.{middle}weight": module.matrix for middle in ("", "base_layer.")}
    for name, tensor in stored.items():
        weight = copies.get(name)
        if (
            weight is not None
            and len(tensor.shape) == 2
            and tensor.shape[0] > weight.shape[0]
            and tensor.shape[1:] == weight.shape[1:]
        ):
            raise ValueError(
                f"{directory} was trained with {tensor.shape[0]} tokens ({name!r}), and `model` has "
                f"{weight.shape[0]}: load the base with `hf.load(dir, vocab_size={tensor.shape[0]})`."
            )
        if weight is None or name in plan.expected:
            kept[name] = tensor
            continue
        leaf = leaves.get(weight.path)
        if isinstance(leaf, Packed) or leaf is None or is_shape(leaf):
            continue
        if _adds_rows(tensor, weight.to_theirs(leaf)):
            plan.expected[name] = tensor.shape
            plan.whole[name] = family.decoder if _of_decoder(name, family) else weight.name
            kept[name] = tensor
            continue
        if tensor.shape != weight.shape or not np.array_equal(tensor.read(), weight.to_theirs(leaf)):
            raise ValueError(
                f"{directory} has its own copy of the base's {weight.name!r}, which differs from that of "
                "`params`, in shape or in value: load the base it was trained on."
            )
    return kept


def _of_decoder(name: str, family: Family) -> bool:
    """Whether a copy in a file is that of the head."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".") == family.decoder


def _adds_rows(tensor: Any, weight: np.ndarray) -> bool:
    """Whether an embedding in a file is the base's and, where that has the zeros of `hf.load(vocab_size=)`,
    the rows of added tokens.
    """
    if tensor.shape != weight.shape or weight[-1].any():
        return False
    count = len(weight) - int(np.argmax(weight[::-1].any(axis=1)))
    array = tensor.read()
    return bool(array[count:].any()) and np.array_equal(array[:count], weight[:count])
