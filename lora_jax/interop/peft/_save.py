"""`save`: adapters as PEFT writes them."""

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from ... import arithmetic
from ..._packed.lazy import value_of
from ..._tree.nodes import Fixed, is_node, Shared
from ...methods import AdaLoRA, DoRA, VeRA
from ...processes import all_or_none, on_host, spanning
from .._adapters import adapters_of, Part, parts_of, plain_number, trained_whole, weights_of
from .._exports import check_trees, NEW_HEADS, NOTHING_ADAPTED, with_heads_whole
from .._families import Family, family_of_model
from .._files import new_directory, write_json
from .._fingerprint import fingerprint
from .._modules import containers, covered_by, Module, modules_of, short_names, tied_head, whole_modules
from .._safetensors import digest, Pending, write_tensors
from .._strict import check_writable
from ._layout import places, PREFIX, PROJECTIONS, TASKS


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

    LoRA, rsLoRA, DoRA, VeRA and AdaLoRA are written as such, different ranks and scales of LoRA as patterns.
    All others, and mixtures, are written as the LoRA that computes exactly the same
    (`lora_jax.arithmetic.as_lora`): PiSSA and Delta-LoRA of twice the rank, n `blocks` of n times the rank.
    What trains without an adapter is written whole, under `modules_to_save` or `bias`. So is the head of a
    classifier, whether it trains or not, and merged if it is adapted: PEFT's user may have a fresh one, or
    none. An adapter of a tied embedding is written for both modules. Of different dropouts, PEFT gets the
    largest. Arrays keep their dtypes. The file carries a checksum of itself and of the config, and the
    fingerprint of the base.

    Where arrays span several processes, all of them call this, as with `hf.save`.

    Args:
      dir: appears when it is complete; one that is not empty is an error, or is replaced with
        `overwrite=True` if it is an earlier adapter and nothing else.
      model, frozen, delta: the model, and the two trees of `lorafy`, or later states of them.
      base: the name of the base or its directory, for `base_model_name_or_path`; PEFT's `AutoPeftModel` needs
        it.

    Raises:
      ValueError: nothing is adapted; a mixture of DoRA and others; biases that train in some adapted modules
        and not in others; values that are not finite; trees of another model, or that do not belong together.
    """
    with all_or_none(spanning(frozen, delta)) as writes:
        _save(Path(dir), model, frozen, delta, base, overwrite, writes)


def _save(
    dir: Path, model: nn.Module, frozen: Any, delta: Any, base: str | None, overwrite: bool, writes: bool
) -> None:
    _, _, family = family_of_model(model)
    task = TASKS[getattr(model, "head", None)]
    check_trees(frozen, delta)
    if getattr(model, "head", None) in NEW_HEADS:
        frozen, delta = with_heads_whole(model, family, frozen, delta)
    kind, frozen, delta = _representable(frozen, delta)
    modules = modules_of(model, family)
    parts = parts_of(model, family, delta)
    trained = trained_whole(model, family, delta)
    # The bare model's names lack the prefix.
    own_name = (lambda name: name.removeprefix(family.prefix)) if task == "FEATURE_EXTRACTION" else str
    whole, saved, bias = _whole(model, family, modules, parts, trained, frozen, own_name)
    tensors = _tensors(kind, parts, whole, own_name)
    settings = {
        "peft_type": kind,
        "task_type": task,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "bias": {"only": "vera_only" if kind == "VERA" else "lora_only"}.get(bias, bias),
        "fan_in_fan_out": any(part.module.kind == "conv1d" for part in parts),
        "modules_to_save": saved or None,
        "target_modules": [own_name(name) for name in _targets(parts, modules)],
        **_method_settings(kind, parts),
    }
    if kind == "VERA":
        tensors |= _projections(frozen)
    for name, array in tensors.items():
        check_writable(name, array)
    if not writes:
        fingerprint(model, family, frozen)
        return

    with new_directory(
        dir, overwrite=overwrite, mark="adapter_config.json", files=("adapter_model.safetensors", "README.md")
    ) as new:
        write_json(new / "adapter_config.json", settings)
        # What is written whole takes the place of the base's, whatever that is.
        base_digits = {
            name: digits for name, digits in fingerprint(model, family, frozen).items() if name not in whole
        }
        facts = {"base": base_digits, "beside": {"adapter_config.json": digest(new / "adapter_config.json")}}
        pending = [
            Pending(name, tensors[name].shape, tensors[name].dtype, lambda array=tensors[name]: array)
            for name in sorted(tensors)
        ]
        write_tensors(new, pending, shard_bytes=2**63, stem="adapter_model", facts=facts)


def _representable(frozen: Any, delta: Any) -> tuple[str, Any, Any]:
    """PEFT's name for the kind of adapter, and the two trees brought to it."""
    leaves = adapters_of(delta)
    methods, kinds = {leaf.spec.method for leaf in leaves}, {type(leaf.spec.method) for leaf in leaves}
    if not leaves:
        raise ValueError(NOTHING_ADAPTED)
    if DoRA in kinds and len(kinds) > 1:
        other = next(leaf for leaf in leaves if not isinstance(leaf.spec.method, DoRA))
        raise ValueError(
            f"`delta` holds DoRA and, at {other.spec.path!r}, {type(other.spec.method).__name__}: PEFT has "
            "one method for all modules, and DoRA is no LoRA. "
            "Write the model instead, `hf.save(dir, model, merge(frozen, delta))`"
        )
    if kinds == {DoRA}:
        return "LORA", frozen, delta
    flat = all(
        spec.path.endswith("kernel") and spec.axes.count("in") == 1 for spec in (leaf.spec for leaf in leaves)
    )
    # Of an alpha that is not positive, PEFT's AdaLoRA makes the rank.
    flat = flat and all(method.alpha > 0 for method in methods if isinstance(method, AdaLoRA))
    if len(methods) == 1 and flat and kinds in ({VeRA}, {AdaLoRA}):
        return kinds.pop().__name__.upper(), frozen, delta
    return "LORA", *arithmetic.as_lora(frozen, delta)


def _whole(
    model: nn.Module,
    family: Family,
    modules: list[Module],
    parts: list[Part],
    trained: dict[str, np.ndarray],
    frozen: Any,
    own_name: Callable[[str], str],
) -> tuple[dict[str, np.ndarray], list[str], str]:
    """What is written whole: the tensors by PyTorch's names, the modules to save, and PEFT's word for the
    biases.
    """
    adapted = {part.module.name for part in parts}
    head = tied_head(model, family)
    wanted = {
        module.name
        for module in modules
        if getattr(model, "head", None) in NEW_HEADS and not module.name.startswith(family.prefix)
    }
    wanted |= {
        module.name
        for module in modules
        if module.name not in adapted and module.weight and module.weight.name in trained
    }
    bias, biases = _biases(modules, adapted, wanted, trained)
    wanted |= {
        module.name for module in modules if module.bias and module.bias.name in trained.keys() - biases
    }
    names = whole_modules({own_name(name) for name in wanted}, [own_name(module.name) for module in modules])
    leaves = weights_of(frozen)
    tensors = {}
    for module in modules:
        if not covered_by(names, own_name(module.name)):
            continue
        if module.name in adapted:
            raise ValueError(
                f"{module.name!r} is adapted and within {names}, which PEFT would save whole: adapt it or "
                "train the whole, not both"
            )
        for tensor in module.tensors:
            own = f"{module.name}.weight" if module.tied else tensor.name
            tensors[own] = (
                trained[tensor.name]
                if tensor.name in trained
                else tensor.to_theirs(value_of(leaves[tensor.path]))
            )
    tensors |= {name: trained[name] for name in biases}
    # PyTorch has a second name for it, where PEFT looks too.
    tensors |= {alias: tensors[name] for alias, name in family.aliases.items() if name in tensors and head}
    return tensors, names, bias


def _biases(
    modules: list[Module], adapted: set[str], saved: set[str], trained: dict[str, np.ndarray]
) -> tuple[str, set[str]]:
    """PEFT's word for which biases train, and their names: all outside of what is saved whole, or those
    of the adapted modules.
    """
    every = {module.bias.name for module in modules if module.bias and module.name not in saved}
    own = {module.bias.name for module in modules if module.bias and module.name in adapted}
    if not own & trained.keys():
        return "none", set()
    if every <= trained.keys():
        return "all", every
    if not own <= trained.keys():
        raise ValueError(
            f"the bias of {sorted(own - trained.keys())[0]!r} is frozen and that of "
            f"{sorted(own & trained.keys())[0]!r} trains; PEFT trains those of all "
            "adapted modules or of none"
        )
    return "only", own


def _tensors(
    kind: str, parts: list[Part], whole: dict[str, np.ndarray], own_name: Callable[[str], str]
) -> dict[str, np.ndarray]:
    tensors, adapted = {}, {part.module.name for part in parts}
    for part in parts:
        for name, place in places(kind, isinstance(part.method, DoRA), part.module, part.method.rank).items():
            tensors[f"{PREFIX}{own_name(part.module.name)}.{place.ending}"] = part.arrays[name].reshape(
                place.shape
            )
    for name, array in whole.items():
        module, _, last = name.rpartition(".")
        tensors[PREFIX + own_name(f"{module}.base_layer.{last}" if module in adapted else name)] = array
    return tensors


def _targets(parts: list[Part], modules: list[Module]) -> list[str]:
    wanted = {part.module.name for part in parts}
    every = {module.name for module in modules}
    return short_names(wanted, (every | containers(every)) - wanted)


def _method_settings(kind: str, parts: list[Part]) -> dict[str, Any]:
    methods = {part.module.name: part.method for part in parts}
    first = parts[0].method
    dropout = max(method.dropout for method in methods.values())
    if kind == "VERA":
        return {
            "r": first.rank,
            "vera_dropout": first.dropout,
            "d_initial": first.d_initial,
            "projection_prng_key": first.seed,
            "save_projection": True,
        }
    if kind == "ADALORA":
        # `total_step` belongs to training that is over; PEFT refuses none.
        return {
            "init_r": first.rank,
            "target_r": first.rank,
            "total_step": 1,
            "lora_alpha": plain_number(first.alpha),
            "lora_dropout": dropout,
        }
    stabilised = all(method.rs for method in methods.values())
    ranks = {name: method.rank for name, method in methods.items()}
    alphas = {
        name: plain_number(method.alpha if stabilised or not method.rs else method.scale * method.rank)
        for name, method in methods.items()
    }
    rank, rank_pattern = _with_exceptions(ranks)
    alpha, alpha_pattern = _with_exceptions(alphas)
    settings = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout}
    settings |= {
        name: value
        for name, value in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern))
        if value
    }
    settings |= {
        name: True
        for name, used in (("use_rslora", stabilised), ("use_dora", isinstance(first, DoRA)))
        if used
    }
    return settings


def _with_exceptions(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and the others by the endings of their modules' names."""
    common = collections.Counter(values.values()).most_common(1)[0][0]
    exceptions = {}
    for value in sorted(set(values.values()) - {common}):
        wanted = {name for name in values if values[name] == value}
        exceptions |= dict.fromkeys(short_names(wanted, values.keys() - wanted), value)
    return common, dict(sorted(exceptions.items()))


def _projections(frozen: Any) -> dict[str, np.ndarray]:
    fixed = [
        leaf.arrays
        for leaf in jax.tree.leaves(frozen, is_leaf=is_node)
        if isinstance(leaf, Fixed) and isinstance(leaf.spec.method, VeRA)
    ]
    own = next(arrays for arrays in fixed if not any(isinstance(array, Shared) for array in arrays.values()))
    return {name: np.ascontiguousarray(on_host(own[ours]).T) for ours, name in PROJECTIONS.items()}
