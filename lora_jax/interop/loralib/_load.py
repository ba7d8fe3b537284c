"""`load` puts a state dict of loralib's layers onto the parameters of the base; `head_of` says which head the
base needs.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from ..._lorafy import Lorafied
from ..._packed.packed import Packed
from ..._paths import is_array, is_shape, named_leaves
from ..._tree.nodes import is_node
from ...methods import LoRA
from ...processes import all_or_none, spanning
from .. import _fingerprint, _state_dict, _torch_files
from .._adapters import Part
from .._families import Family, family_of_model
from .._heads import head_in
from .._imports import adapted
from .._modules import ADAPTABLE, Module, modules_of
from .._strict import check_finite, check_tensors, renamed
from .._tensors import Tensor


# The authors adapt these of GPT-2's fused query, key and value.
_AUTHORS = (True, False, True)


def load(
    file: str | Path,
    model: nn.Module,
    params: Any,
    *,
    alpha: float,
    dropout: float = 0.0,
    blocks: tuple[bool, ...] | None = None,
    verify: bool = True,
    check_base: bool = True,
) -> Lorafied:
    """The adapters in a checkpoint of loralib's, on `params`: what `lorafy` would have returned, trained.

    ```python
    model, params = hf.load("gpt2-medium")
    frozen, delta = loralib.load("model.26290.pt", model, params, alpha=32)
    ```

    Ranks, and the number of blocks of a `MergedLinear`, follow from the shapes. Names may begin with
    `module.`, and the state dict may be in `{"model_state_dict": ...}`. Where the file holds tensors of the
    base, those that equal `params` are left out. The others have been trained, and become leaves that train
    (`Full`).

    Where arrays of `params` span several processes, all of them call this, and an error is raised in all. A
    and B come on each process's default device: `jax.device_put(delta, shardings(mesh, delta_specs(delta,
    specs), delta))` of `lora_jax.sharding` places them as the weights are.

    Args:
      file: in PyTorch's zip format; no code in it is run.
      model, params: as `hf.load` returned them, with the head of the checkpoint.
      alpha: `lora_alpha`, which loralib's files do not hold. A file that `save` wrote does, and the two must
        agree.
      dropout: of the adapters, for further training.
      blocks: `enable_lora` of fused projections, where not all are adapted; None is the authors' (True,
        False, True) for two of three.
      verify, check_base: as in `peft.load`.

    Raises:
      ValueError: a tensor that is missing, unexpected, of another shape or dtype, or not finite; a weight
        that an adapter is merged into already; a file that is damaged or that asks for code; an `alpha` or
        `blocks` that the file contradicts; an adapter of only one of two modules that share their weight
        (then `OneSided`).
    """
    file = Path(file)
    with all_or_none(spanning(params)):
        _, _, family = family_of_model(model)
        facts = _torch_files.facts_of(file, verify=verify)
        weights = _weights(model, family)
        stored = _under_full_names(file, _state_dict.tensors(file), family, weights)
        layers = {
            module.name: module
            for module in modules_of(model, family)
            if module.kind in ADAPTABLE and module.kind != "convolution"
        }
        pairs = {
            name: module
            for name, module in layers.items()
            if {f"{name}.lora_A", f"{name}.lora_B"} & stored.keys()
        }
        if not pairs:
            raise ValueError(
                f"{file} holds no `lora_A` of a layer of this model; it has {sorted(stored)[:5]}."
            )
        fused = {name: family.projections_in(name) for name in pairs}
        expected = {name: weights[name].shape for name in stored if name in weights}
        for name, module in pairs.items():
            shapes = _shapes(module, fused[name], stored.get(f"{name}.lora_A"), stored.get(f"{name}.lora_B"))
            expected |= {f"{name}.{array}": shape for array, shape in shapes.items()}
        check_tensors(f"{file} does not hold adapters of this model", expected, stored)
        arrays = {
            name: check_finite(file, tensor.name, tensor.read()) if verify else tensor.read()
            for name, tensor in stored.items()
        }
        options = {"alpha": alpha, "dropout": dropout}
        parts = [
            _part(
                file, module, fused[name], arrays[f"{name}.lora_A"], arrays[f"{name}.lora_B"], options, blocks
            )
            for name, module in pairs.items()
        ]
        _check_arguments(file, parts, alpha, blocks, facts or {})
        plain = {name: arrays[name] for name in arrays if name in weights}
        whole = _trained(file, params, weights, plain, {f"{name}.weight" for name in pairs})
        result = adapted(model, family, params, parts, whole, {}, file)
        if check_base and facts:
            _fingerprint.check_base(file, facts, model, family, result.frozen)
        return result


def head_of(file: str | Path) -> dict[str, Any]:
    """The head that a checkpoint brings along, as arguments of `hf.load` for its base.

    ```python
    # head="sequence_classification", num_labels=3
    model, params = hf.load("roberta-base", **loralib.head_of("mnli.bin"))
    ```

    The result is empty where the file does not hold the whole of a head; the base must have it then.
    `loralib.load` replaces the head that `hf.load` draws by the file's.
    """
    return head_in(
        {name.removeprefix("module."): tensor for name, tensor in _state_dict.tensors(Path(file)).items()}
    )


def _weights(model: nn.Module, family: Family) -> dict[str, Tensor]:
    """The tensors of the model by name. A tensor that has a second name stands under both."""
    found = {tensor.name: tensor for module in modules_of(model, family) for tensor in module.tensors}
    found |= {f"{module.name}.weight": module.matrix for module in modules_of(model, family) if module.tied}
    return found | {alias: found[name] for alias, name in family.aliases.items() if name in found}


def _under_full_names(
    file: Path, stored: Mapping[str, Any], family: Family, weights: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The tensors under the model's names: without the `module.` of data-parallel training, and with the
    prefix that files of the bare model lack.
    """
    full = lambda name: _full_name(family, name.removeprefix("module."))
    # A tensor that one head does not need may belong to another.
    kept = {
        name: tensor
        for name, tensor in stored.items()
        if full(name) in weights or not family.leftovers.fullmatch(full(name))
    }
    return renamed(file, kept, full)


def _full_name(family: Family, name: str) -> str:
    module, _, last = name.rpartition(".")
    if last not in ("lora_A", "lora_B"):
        return family.full_name(name)
    # The table has weights, not adapters: an adapter's name needs the prefix if its weight's name does.
    return family.full_name(f"{module}.weight").removesuffix("weight") + last


def _blocks_in(file_shapes: tuple[tuple[int, ...], ...], module: Module, fused: int) -> int | None:
    """The number of blocks of a fused projection that A and B adapt; None for the layout of a plain layer."""
    a, b = file_shapes
    if fused == 1 or len(a) != 2 or len(b) != 2 or not a[0] or not b[1] or a[0] % b[1]:
        return None
    count = a[0] // b[1]
    return None if count == 1 and b[0] == module.outs else count


def _shapes(module: Module, fused: int, a: Any, b: Any) -> dict[str, tuple[int, ...]]:
    """The shapes that A and B of a module must have, given their rank and number of blocks."""
    if not a or not b:  # the error will be that the other is missing
        return {"lora_A": a.shape if a else (), "lora_B": b.shape if b else ()}
    rank = max(b.shape[1], 1) if len(b.shape) == 2 else 1
    blocks = _blocks_in((a.shape, b.shape), module, fused)
    if blocks is None:
        return {"lora_A": (rank, *module.ins), "lora_B": (module.outs, rank)}
    blocks = min(blocks, fused)
    return {"lora_A": (blocks * rank, *module.ins), "lora_B": (module.outs // fused * blocks, rank)}


def _part(
    file: Path,
    module: Module,
    fused: int,
    a: np.ndarray,
    b: np.ndarray,
    options: dict[str, Any],
    blocks: tuple[bool, ...] | None,
) -> Part:
    count, rank = _blocks_in((a.shape, b.shape), module, fused), b.shape[1]
    if count is None:
        return Part(module, LoRA(rank, **options), {"a": a, "b": b})
    chosen = blocks or {fused: (True,) * fused, 2: _AUTHORS}.get(count)
    if chosen is None or len(chosen) != fused or sum(map(bool, chosen)) != count:
        raise ValueError(
            f"{file} adapts {count} of the {fused} blocks of {module.name!r}, and `blocks` is {blocks!r}, "
            f"which does not say which: pass {fused} truth values, {count} of them True."
        )
    a, b = (array.reshape(count, -1, array.shape[1]).transpose(1, 2, 0) for array in (a, b))
    return Part(module, LoRA(rank, blocks=chosen, **options), {"a": a, "b": b})


def _check_arguments(
    file: Path, parts: list[Part], alpha: float, blocks: tuple[bool, ...] | None, facts: Mapping[str, Any]
) -> None:
    found = any(isinstance(part.method, LoRA) and part.method.blocks is not None for part in parts)
    if blocks is not None and not found:
        raise ValueError(
            f"`blocks` is {blocks!r}, and {file} has the adapters of whole layers only: leave it out."
        )
    saved = facts.get("alpha", alpha)
    if not math.isclose(saved, alpha, rel_tol=1e-4):  # an alpha copied from a screen has few digits
        raise ValueError(
            f"`alpha` is {alpha!r}, and {file} was saved with {saved!r}: pass that; for another effect, "
            "scale the result, `arithmetic.scaled`."
        )


def _trained(
    file: Path,
    params: Any,
    weights: Mapping[str, Tensor],
    arrays: Mapping[str, np.ndarray],
    adapted_weights: set[str],
) -> dict[str, np.ndarray]:
    """The tensors that differ from the base's, and with one layer of a stack all of its layers."""
    leaves = dict(named_leaves(params, is_leaf=is_node))
    different = set()
    for name, array in arrays.items():
        leaf = leaves.get(weights[name].path)
        if is_shape(leaf) or isinstance(leaf, Packed):
            raise ValueError(
                f"{file} has a {name!r}, and that of `params` is "
                f"{'a shape' if is_shape(leaf) else 'quantised'}: nothing tells whether the file's was "
                "trained. Load onto plain parameters, and `quantize` what is frozen then."
            )
        if is_array(leaf) and np.array_equal(array, weights[name].to_theirs(leaf)):
            continue
        if name in adapted_weights:
            raise ValueError(
                f"{file} has a {name!r} that differs from that of `params`, beside an adapter of it: loralib "
                "merges adapters into the weights in evaluation mode, and the adapter would count twice "
                "then. Training mode takes them out again, but for rounding. Save "
                "`lora.lora_state_dict(model)`, which has no weights, or load the base that it was trained "
                "on."
            )
        different.add(weights[name].path)
    return {name: array for name, array in arrays.items() if weights[name].path in different}
