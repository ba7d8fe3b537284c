"""`save` writes every adapter that is a LoRA, or computes what a LoRA does, in loralib's layout."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from ... import arithmetic
from ..._tree.nodes import Adapter, adapters_of, Shared
from ...methods import LoRA
from ...processes import agree, all_or_none, spanning
from .. import _fingerprint, _torch_files
from .._adapters import b_for, common_alpha, Part
from .._exports import (
    checked_trees,
    frozen_tensors,
    has_new_head,
    NOTHING_ADAPTED,
    parts_of,
    trained_whole,
)
from .._families import family_of_model
from .._modules import modules_of
from .._strict import check_writable
from .._tensors import tensors_of


def save(file: str | Path, model: nn.Module, frozen: Any, delta: Any, *, overwrite: bool = False) -> float:
    """Writes the file that `torch.save(lora.lora_state_dict(model))` does, and returns its `lora_alpha`,
    which the format does not hold.

    ```python
    alpha = loralib.save("adapter.pt", model, frozen, delta)
    # In PyTorch, with layers of that alpha:
    model.load_state_dict(torch.load("adapter.pt"), strict=False)
    ```

    A plain adapter has the layout of `Linear` or `Embedding`, and one with `blocks` that of `MergedLinear`;
    both serve GPT-2's `Conv1D` too (`fan_in_fan_out=True`). Other methods are written as the LoRA that
    computes the same. Where adapters differ in alpha, B takes the difference. Weights that train without an
    adapter keep their own name, for example `classifier.dense.weight`. So does a classifier's head, whether
    it trains or not; it is merged if it is adapted. The file carries a checksum, the alpha and the
    fingerprint of the base, which PyTorch does not see. It appears complete or not at all.

    Where arrays span several processes, all of them call this, as with `hf.save`.

    Raises:
      ValueError: a file that exists, unless `overwrite=True`; nothing is adapted; DoRA, which no LoRA equals;
        a convolution, of which loralib has another adapter; values that are not finite.
      TypeError: a combined tree, or the two trees in the other order.
    """
    with all_or_none(spanning(frozen, delta)) as writes:
        return _save(Path(file), model, frozen, delta, overwrite, writes)


def _save(file: Path, model: nn.Module, frozen: Any, delta: Any, overwrite: bool, writes: bool) -> float:
    if writes and file.exists() and (file.is_dir() or not overwrite):
        raise ValueError(
            f"{file} exists; choose another name"
            + ("." if file.is_dir() else ", or replace it with `overwrite=True`.")
        )
    agree()
    _, _, family = family_of_model(model)
    frozen, delta = checked_trees(model, family, frozen, delta)
    # Blocks are not brought to plain LoRA, because loralib has a layout for them, and a smaller one.
    others = any(not _has_layout(leaf) for leaf in adapters_of(delta).values())
    frozen, delta = arithmetic.as_lora(frozen, delta) if others else (frozen, delta)
    parts = parts_of(model, family, delta)
    if not parts:
        raise ValueError(NOTHING_ADAPTED)
    alpha = common_alpha(parts)
    tensors: dict[str, np.ndarray] = {}
    for part in parts:
        a, b = _written(part, alpha)
        tensors |= {f"{part.module.name}.lora_A": a, f"{part.module.name}.lora_B": b}
    trained = trained_whole(model, family, delta)
    for module in modules_of(model, family):
        if module.tied and module.matrix.name in trained:
            trained[f"{module.name}.weight"] = trained[module.matrix.name]
    if has_new_head(model):
        head = [tensor for tensor in tensors_of(model, family) if family.in_head(tensor.name)]
        trained |= frozen_tensors(frozen, (tensor for tensor in head if tensor.name not in trained))
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


def _written(part: Part, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    a, b = part.arrays["a"], part.arrays["b"]
    if part.module.kind == "convolution":
        raise ValueError(
            f"{part.module.name!r} is a convolution, whose adapter in loralib is another one (it reshapes "
            "A·B): write PEFT's format, `peft.save`."
        )
    assert isinstance(part.method, LoRA), "`as_lora` makes one of every other method"
    if part.method.blocks is not None:  # (r, in, blocks) and (out, r, blocks)
        a, b = (array.transpose(2, 0, 1).reshape(-1, array.shape[1]) for array in (a, b))
    return np.ascontiguousarray(a), np.ascontiguousarray(b_for(part, b, alpha))
