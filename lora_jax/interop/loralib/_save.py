"""`save`: every adapter that is a LoRA, or computes what one computes, in loralib's layout."""

import collections
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from ... import arithmetic
from ..._nodes import Adapter, Shared, is_node
from ...arithmetic._leaves import times
from ...methods import LoRA
from .. import _fingerprint, _torch_files
from .._adapters import Part, parts_of, plain_number, trained_whole
from .._families import family_of_model
from .._modules import modules_of


def save(file: str | Path, model: nn.Module, frozen: Any, delta: Any, *, overwrite: bool = False) -> float:
    """Writes what `torch.save(lora.lora_state_dict(model))` writes, and returns the `lora_alpha` that goes with it, which the format does not hold.

    ```python
    alpha = loralib.save("adapter.pt", model, frozen, delta)
    # In PyTorch, with layers of that alpha:
    model.load_state_dict(torch.load("adapter.pt"), strict=False)
    ```

    A plain adapter has the layout of `Linear` or `Embedding`, one with `blocks` that of `MergedLinear`; both for GPT-2's `Conv1D` too
    (`fan_in_fan_out=True`). Other methods are written as the LoRA that computes the same. Where adapters differ in alpha, B takes the
    difference. What trains without an adapter has its own name, `classifier.dense.weight`. The file carries a checksum, the alpha and the
    fingerprint of the base, which PyTorch does not see; it appears complete or not at all.

    Raises `ValueError` for a file that exists, unless `overwrite=True`; for DoRA, which no LoRA equals; for a convolution, of which loralib
    has another adapter.
    """
    file = Path(file)
    if file.exists() and (file.is_dir() or not overwrite):
        raise ValueError(f"{file} exists; choose another name" + ("" if file.is_dir() else ", or replace it with `overwrite=True`"))
    _, _, family = family_of_model(model)
    # Blocks have a layout of their own, which is smaller than what they would become.
    others = any(not _has_layout(leaf) for leaf in _leaves(delta))
    frozen, delta = arithmetic.as_lora(frozen, delta) if others else (frozen, delta)
    parts = parts_of(model, family, delta)
    if not parts:
        raise ValueError("`delta` holds no adapter: write the model instead, `hf.save(dir, model, merge(frozen, delta))`")
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
    facts = {"alpha": alpha, "base": _fingerprint.fingerprint(model, family, frozen)}
    file.parent.mkdir(parents=True, exist_ok=True)
    _torch_files.write(file, {**tensors, **trained}, facts=facts)
    return alpha


def _leaves(delta: Any) -> list[Adapter]:
    return [leaf for leaf in jax.tree.leaves(delta, is_leaf=is_node) if isinstance(leaf, Adapter)]


def _has_layout(leaf: Adapter) -> bool:
    return type(leaf.spec.method) is LoRA and not any(isinstance(array, Shared) for array in leaf.arrays.values())


def _alpha(part: Part) -> float:
    """loralib's, whose scale is alpha / r. A product of a quotient may miss by a rounding what it was made of."""
    method = part.method
    return plain_number(method.scale * method.rank if method.rs else method.alpha)


def _written(part: Part, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    a, b = part.arrays["a"], part.arrays["b"]
    if part.module.kind == "convolution":
        raise ValueError(f"{part.module.name!r} is a convolution, whose adapter in loralib is another one (it reshapes A·B): write PEFT's format, `peft.save`")
    if part.method.blocks is not None:  # (r, in, blocks) and (out, r, blocks)
        a, b = (array.transpose(2, 0, 1).reshape(-1, array.shape[1]) for array in (a, b))
    if _alpha(part) != alpha:
        b = times(_alpha(part) / alpha, b)
    return np.ascontiguousarray(a), np.ascontiguousarray(b)
