"""`save` writes adapters as PEFT does."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from ... import arithmetic
from ..._tree.nodes import adapters_of, Fixed, is_node, Shared
from ...methods import AdaLoRA, DoRA, VeRA
from ...processes import all_or_none, on_host, spanning
from .._adapters import Part
from .._exports import (
    checked_trees,
    frozen_tensors,
    has_new_head,
    parts_of,
    trained_whole,
)
from .._families import Family, family_of_model
from .._files import new_directory, write_json
from .._fingerprint import fingerprint
from .._modules import covered_by, Module, modules_of, whole_modules
from .._safetensors import digest, Pending, write_tensors
from .._strict import check_writable
from ._layout import entries, PREFIX, PROJECTIONS, TASKS
from ._settings import method_settings, target_names


def save(
    dir: str | Path,
    model: nn.Module,
    frozen: Any,
    delta: Any,
    *,
    base: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a directory that PEFT's `PeftModel.from_pretrained` loads, and `load` here.

    ```python
    peft.save("adapter", model, frozen, delta, base="gpt2")

    # In PyTorch:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("gpt2"), "adapter")
    ```

    LoRA, rsLoRA, DoRA, VeRA and AdaLoRA are written as such, and LoRA of different ranks and scales as
    patterns. Other methods, and mixtures, are written as the LoRA that computes exactly the same
    (`lora_jax.arithmetic.as_lora`): PiSSA and Delta-LoRA with twice the rank, n `blocks` with n times the
    rank. Weights that train without an adapter are written whole, under `modules_to_save` or `bias`. The head
    of a classifier is written whole too, whether it trains or not, because PEFT's user may have a fresh one,
    or none; it is merged if it is adapted, and so is a weight that PyTorch's model reads without calling its
    module, such as DeBERTa's `rel_embeddings`. BERT's pooler is of that head. An adapter of a tied embedding
    is written for both modules. Where dropouts differ, PEFT gets the largest. Arrays keep their dtypes. The
    file carries a checksum of itself and of the config, and the fingerprint of the base.

    Where arrays span several processes, all of them call this, as with `hf.save`.

    Args:
      dir: appears when it is complete. One that is not empty is an error; `overwrite=True` replaces it if it
        is an earlier adapter and nothing else.
      model, frozen, delta: the model, and the two trees of `lorafy`, or later states of them.
      base: the name of the base or its directory, for `base_model_name_or_path`; PEFT's `AutoPeftModel` needs
        it.

    Raises:
      ValueError: nothing is adapted; a mixture of DoRA and others; biases that train in some adapted modules
        and not in others; values that are not finite; trees of another model, or that do not belong together.
      TypeError: a combined tree, or the two trees in the other order.
    """
    with all_or_none(spanning(frozen, delta)) as writes:
        _save(Path(dir), model, frozen, delta, base, overwrite, writes)


def _save(
    directory: Path,
    model: nn.Module,
    frozen: Any,
    delta: Any,
    base: str | None,
    overwrite: bool,
    writes: bool,
) -> None:
    _, _, family = family_of_model(model)
    task = TASKS[getattr(model, "head", None)]
    frozen, delta = checked_trees(model, family, frozen, delta)
    kind, frozen, delta = _representable(frozen, delta)
    modules = modules_of(model, family)
    parts = parts_of(model, family, delta)
    trained = trained_whole(model, family, delta)
    # The bare model's names lack the prefix.
    own_name = (lambda name: name.removeprefix(family.prefix)) if task == "FEATURE_EXTRACTION" else str
    whole, saved, bias = _tensors_saved_whole(model, family, modules, parts, trained, frozen, own_name)
    tensors = _tensors(kind, parts, whole, own_name)
    targets = target_names(parts, modules)
    settings = {
        "peft_type": kind,
        "task_type": task,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "bias": {"only": "vera_only" if kind == "VERA" else "lora_only"}.get(bias, bias),
        "fan_in_fan_out": any(part.module.kind == "conv1d" for part in parts),
        "modules_to_save": saved or None,
        "target_modules": targets if isinstance(targets, str) else [own_name(name) for name in targets],
        **method_settings(parts),
    }
    if kind == "VERA":
        tensors |= _projections(frozen)
    for name, array in tensors.items():
        check_writable(name, array)
    if not writes:
        fingerprint(model, family, frozen)
        return

    with new_directory(
        directory,
        overwrite=overwrite,
        mark="adapter_config.json",
        files=("adapter_model.safetensors", "README.md"),
    ) as new:
        write_json(new / "adapter_config.json", settings)
        # A tensor that is written whole takes the place of the base's, whose values do not matter.
        base_digits = {
            name: digits for name, digits in fingerprint(model, family, frozen).items() if name not in whole
        }
        facts = {"base": base_digits, "beside": {"adapter_config.json": digest(new / "adapter_config.json")}}
        pending = [
            Pending(
                name, tensors[name].shape, tensors[name].dtype, functools.partial(np.asarray, tensors[name])
            )
            for name in sorted(tensors)
        ]
        write_tensors(new, pending, shard_bytes=2**63, stem="adapter_model", facts=facts)


def _representable(frozen: Any, delta: Any) -> tuple[str, Any, Any]:
    """PEFT's name for the method, and the two trees with adapters of that method."""
    leaves = adapters_of(delta).values()
    methods, kinds = {leaf.spec.method for leaf in leaves}, {type(leaf.spec.method) for leaf in leaves}
    if DoRA in kinds and len(kinds) > 1:
        other = next(leaf for leaf in leaves if not isinstance(leaf.spec.method, DoRA))
        raise ValueError(
            f"`delta` holds DoRA and, at {other.spec.path!r}, {type(other.spec.method).__name__}: PEFT has "
            "one method for all modules, and DoRA is no LoRA. Write the model instead, `hf.save(dir, model, "
            "merge(frozen, delta))`."
        )
    if kinds == {DoRA}:
        return "LORA", frozen, delta
    flat = all(
        spec.path.endswith("kernel") and spec.axes.count("in") == 1 for spec in (leaf.spec for leaf in leaves)
    )
    # PEFT's AdaLoRA replaces an alpha that is not positive by the rank.
    flat = flat and all(method.alpha > 0 for method in methods if isinstance(method, AdaLoRA))
    if len(methods) == 1 and flat and kinds in ({VeRA}, {AdaLoRA}):
        return kinds.pop().__name__.upper(), frozen, delta
    return "LORA", *arithmetic.as_lora(frozen, delta)


def _tensors_saved_whole(
    model: nn.Module,
    family: Family,
    modules: list[Module],
    parts: list[Part],
    trained: dict[str, np.ndarray],
    frozen: Any,
    own_name: Callable[[str], str],
) -> tuple[dict[str, np.ndarray], list[str], str]:
    """What is written whole: the tensors by PyTorch's names, the modules for `modules_to_save`, and PEFT's
    word for which biases train.
    """
    adapted = {part.module.name for part in parts}
    wanted = {module.name for module in modules if has_new_head(model) and family.in_head(module.name)}
    wanted |= {
        module.name
        for module in modules
        if module.name not in adapted and module.weight and module.weight.name in trained
    }
    # A head that has a bias under a second name brings it along.
    second = {name: alias for alias, name in family.aliases.items()}
    of_head = {name: alias.rpartition(".")[0] for name, alias in second.items()}
    bias, biases = _biases(modules, adapted, wanted, trained, of_head)
    wanted |= {
        module.name
        for module in modules
        if module.bias
        and module.bias.name in trained.keys() - biases
        and of_head.get(module.bias.name) not in wanted
    }
    value = lambda tensor: (
        trained[tensor.name] if tensor.name in trained else frozen_tensors(frozen, [tensor])[tensor.name]
    )
    names = whole_modules({own_name(name) for name in wanted}, [own_name(module.name) for module in modules])
    tensors: dict[str, np.ndarray] = {}
    for module in modules:
        if not covered_by(names, own_name(module.name)):
            continue
        if module.name in adapted:
            raise ValueError(
                f"{module.name!r} is adapted and within {names}, which PEFT would save whole; adapt it or "
                "train the whole, not both."
            )
        for tensor in module.tensors:
            own = f"{module.name}.weight" if module.tied else tensor.name
            tensors[own] = value(tensor)
    tensors |= {name: trained[name] for name in biases}
    for module in modules:
        own = module.bias.name if module.bias else ""
        if own in second and (own in tensors or covered_by(names, of_head[own])):
            # PyTorch's head adds what is under the second name.
            tensors[second[own]] = value(module.bias)
    if bias == "only":
        for name in of_head.keys() & tensors.keys():
            if not covered_by(names, name.rpartition(".")[0]):
                del tensors[name]
    return tensors, names, bias


def _biases(
    modules: list[Module],
    adapted: set[str],
    saved: set[str],
    trained: dict[str, np.ndarray],
    of_head: dict[str, str],
) -> tuple[str, set[str]]:
    """PEFT's word for which biases train, and their names: all but those of modules that are saved whole, or
    those of the adapted modules. `of_head`: the module that adds a bias, where another one has it.
    """
    every = {module.bias.name for module in modules if module.bias and module.name not in saved}
    own = {
        module.bias.name
        for module in modules
        if module.bias and of_head.get(module.bias.name, module.name) in adapted
    }
    if not own & trained.keys():
        return "none", set()
    if every <= trained.keys():
        return "all", every
    if not own <= trained.keys():
        raise ValueError(
            f"the bias of {sorted(own - trained.keys())[0]!r} is frozen and that of "
            f"{sorted(own & trained.keys())[0]!r} trains; PEFT trains those of all adapted modules or of "
            "none. Freeze or train all of them."
        )
    return "only", own


def _tensors(
    kind: str, parts: list[Part], whole: dict[str, np.ndarray], own_name: Callable[[str], str]
) -> dict[str, np.ndarray]:
    tensors, adapted = {}, {part.module.name for part in parts}
    for part in parts:
        for name, entry in entries(
            kind, isinstance(part.method, DoRA), part.module, part.method.rank
        ).items():
            tensors[f"{PREFIX}{own_name(part.module.name)}.{entry.ending}"] = part.arrays[name].reshape(
                entry.shape
            )
    for name, array in whole.items():
        module, _, last = name.rpartition(".")
        tensors[PREFIX + own_name(f"{module}.base_layer.{last}" if module in adapted else name)] = array
    return tensors


def _projections(frozen: Any) -> dict[str, np.ndarray]:
    fixed = [
        leaf.arrays
        for leaf in jax.tree.leaves(frozen, is_leaf=is_node)
        if isinstance(leaf, Fixed) and isinstance(leaf.spec.method, VeRA)
    ]
    own = next(arrays for arrays in fixed if not any(isinstance(array, Shared) for array in arrays.values()))
    return {name: np.ascontiguousarray(on_host(own[ours]).T) for ours, name in PROJECTIONS.items()}
