"""`save`: every adapter that is a LoRA, or computes what one computes, in loralib's layout."""

import collections
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from ... import arithmetic
from ..._packed.lazy import value_of
from ..._tree.nodes import Adapter, Shared
from ...arithmetic._leaves import times
from ...methods import LoRA
from ...processes import agree, all_or_none, spanning
from .. import _fingerprint, _torch_files
from .._adapters import adapters_of, Part, parts_of, plain_number, trained_whole, weights_of
from .._exports import check_trees, NEW_HEADS, NOTHING_ADAPTED, with_heads_whole
from .._families import family_of_model, tensors_of
from .._modules import modules_of
from .._strict import check_writable


def save(file: str | Path, model: nn.Module, frozen: Any, delta: Any, *, overwrite: bool = False) -> float:
    """Writes what `torch.save(lora.lora_state_dict(model))` writes, and returns the `lora_alpha` that goes
    with it, which the format does not hold.

    ```python
    alpha = loralib.save("adapter.pt", model, frozen, delta)
    # In PyTorch, with layers of that alpha:
    model.load_state_dict(torch.load("adapter.pt"), strict=False)
    ```

    A plain adapter has the layout of `Linear` or `Embedding`, one with `blocks` that of `MergedLinear`; both
    for GPT-2's `Conv1D` too (`fan_in_fan_out=True`). Other methods are written as the LoRA that computes the
    same. Where adapters differ in alpha, B takes the difference. What trains without an adapter has its own
    name, `classifier.dense.weight`, as has a classifier's head, whether it trains or not, merged if it is
    adapted. The file carries a checksum, the alpha and the fingerprint of the base, which PyTorch does not
    see; it appears complete or not at all.

    Where arrays span several processes, all of them call this, as with `hf.save`.

    Raises `ValueError` for a file that exists, unless `overwrite=True`; for DoRA, which no LoRA equals; for a
    convolution, of which loralib has another adapter.
    """
    with all_or_none(spanning(frozen, delta)) as writes:
        return _save(Path(file), model, frozen, delta, overwrite, writes)


def _save(file: Path, model: nn.Module, frozen: Any, delta: Any, overwrite: bool, writes: bool) -> float:
    if writes and file.exists() and (file.is_dir() or not overwrite):
        raise ValueError(
            f"{file} exists; choose another name"
            + ("" if file.is_dir() else ", or replace it with `overwrite=True`")
        )
    agree()
    _, _, family = family_of_model(model)
    check_trees(frozen, delta)
    if getattr(model, "head", None) in NEW_HEADS:
        frozen, delta = with_heads_whole(model, family, frozen, delta)
    # Blocks have a layout of their own, which is smaller than what they would become.
    others = any(not _has_layout(leaf) for leaf in adapters_of(delta))
    frozen, delta = arithmetic.as_lora(frozen, delta) if others else (frozen, delta)
    parts = parts_of(model, family, delta)
    if not parts:
        raise ValueError(NOTHING_ADAPTED)
    counts = collections.Counter(_alpha(part) for part in parts)
    # Of zero no B is a multiple.
    alpha = max(counts, key=lambda value: (value != 0, counts[value]))
    tensors: dict[str, np.ndarray] = {}
    for part in parts:
        a, b = _written(part, alpha)
        tensors |= {f"{part.module.name}.lora_A": a, f"{part.module.name}.lora_B": b}
    trained = trained_whole(model, family, delta)
    for module in modules_of(model, family):
        if module.tied and module.weight.name in trained:
            trained[f"{module.name}.weight"] = trained[module.weight.name]
    if getattr(model, "head", None) in NEW_HEADS:
        leaves = weights_of(frozen)
        own = [
            tensor
            for tensor in tensors_of(model, family)
            if not tensor.name.startswith(family.prefix) and tensor.name not in trained
        ]
        trained |= {tensor.name: tensor.to_theirs(value_of(leaves[tensor.path])) for tensor in own}
    tensors |= trained
    for name, array in tensors.items():
        check_writable(name, array)
    base = {
        name: digits
        for name, digits in _fingerprint.fingerprint(model, family, frozen).items()
        if name not in trained
    }
    if writes:
        file.parent.mkdir(parents=True, exist_ok=True)
        _torch_files.write(file, tensors, facts={"alpha": alpha, "base": base}, overwrite=overwrite)
    return alpha


def _has_layout(leaf: Adapter) -> bool:
    return type(leaf.spec.method) is LoRA and not any(
        isinstance(array, Shared) for array in leaf.arrays.values()
    )


def _alpha(part: Part) -> float:
    """loralib's, whose scale is alpha / r. A product of a quotient may miss by a rounding what it was
    made of.
    """
    method = part.method
    return plain_number(method.scale * method.rank if method.rs else method.alpha)


def _written(part: Part, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    a, b = part.arrays["a"], part.arrays["b"]
    if part.module.kind == "convolution":
        raise ValueError(
            f"{part.module.name!r} is a convolution, whose adapter in loralib is another one (it reshapes "
            "A·B): write PEFT's format, `peft.save`"
        )
    if part.method.blocks is not None:  # (r, in, blocks) and (out, r, blocks)
        a, b = (array.transpose(2, 0, 1).reshape(-1, array.shape[1]) for array in (a, b))
    if _alpha(part) != alpha:
        b = times(_alpha(part) / alpha, b)
    return np.ascontiguousarray(a), np.ascontiguousarray(b)
