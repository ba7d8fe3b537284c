"""`load`: PEFT's adapters, whichever of them can be represented, and nothing else without an error."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from ..._lorafy import Lorafied
from ..._packed.packed import Packed
from ..._paths import is_shape, named_leaves
from ..._tree.nodes import is_node
from ...methods import AdaLoRA, DoRA, LoRA, PiSSA, VeRA
from ...processes import agree, all_or_none, spanning
from .. import _fingerprint, _state_dict
from .._adapters import adapted, once, Part, plain_number, with_blocks
from .._families import Family, family_of_model
from .._files import read_json
from .._heads import head_in
from .._modules import Module, modules_of
from .._safetensors import facts_of, stored_tensors
from .._strict import check_beside, check_finite, check_tensors
from ._config import Config, parse
from ._layout import places, PREFIX, PROJECTIONS, TASKS
from ._targets import pattern_value, saved_whole, targeted


def load(
    dir: str | Path, model: nn.Module, params: Any, *, verify: bool = True, check_base: bool = True
) -> Lorafied:
    """The adapter in a directory of PEFT's, on `params`: what `lorafy` would have returned, trained.

    ```python
    model, params = hf.load("gpt2")
    frozen, delta = peft.load("adapter", model, params)
    logits = lora_jax.adapt(model.apply)({"params": lora_jax.combine(frozen, delta)}, input_ids)
    ```

    Reads LoRA (rsLoRA, DoRA, PiSSA included), VeRA and AdaLoRA, on linear layers, convolutions and
    embeddings, with heads and other modules saved whole, which become leaves that train (`Full`), and biases.
    A PiSSA adapter that PEFT has not converted begins at the singular vectors of the base, which are computed
    again. An adapter of GPT-2's fused `c_attn` whose B is zero outside of blocks becomes a LoRA of those
    `blocks`. Arrays keep the dtype they have in the file. The rank may be above min(in, out).

    Where arrays of `params` span several processes, all of them call this, and an error is raised in all. A
    and B come on each process's default device: `jax.device_put(delta, shardings(mesh, delta_specs(delta,
    specs), delta))` of `lora_jax.sharding` places them as the weights are.

    Args:
      dir: with `adapter_config.json` and `adapter_model.safetensors`, or `.bin`, of which no code is run.
      model, params: as `hf.load` returned them, with the head that the adapter was trained with:
        `head_of(dir)`.
      verify: whether to compare with the checksums, where the files carry some, and to look for values that
        are not finite.
      check_base: whether to compare `params` with the base beside which the adapter was saved, where the file
        has its fingerprint.

    Raises:
      ValueError: naming what is wrong: a tensor that is missing, unexpected, of another shape or dtype, or
        not finite; a field of the config that means what cannot be represented; a file that is damaged;
        another base; an adapter of one side only of a tied embedding.
    """
    dir = Path(dir)
    with all_or_none(spanning(params)):
        kind, _, family = family_of_model(model)
        config = parse(dir / "adapter_config.json", read_json(dir / "adapter_config.json"))
        file, stored = _stored(dir)
        facts = facts_of(file, verify=verify) if file.suffix == ".safetensors" else None
        if verify:
            check_beside(file, facts)
        _check_task(dir, config, model)
        plan = _planned(dir, config, kind, model, family, stored)
        stored = _named(plan, dir, stored, family)
        stored = _without_base(plan, dir, model, family, params, stored)
        check_tensors(
            f"{dir} does not hold the adapter that its config describes for this model", plan.expected, stored
        )
        read = lambda name: check_finite(file, name, stored[name].read()) if verify else stored[name].read()
        arrays = {name: read(name) for name in plan.expected}

        whole = {tensor: arrays[name] for name, tensor in plan.whole.items()}
        parts = with_blocks([_part(config, module, arrays, plan) for module in plan.targets], family)
        agree()
        result = adapted(
            model, family, params, parts, once(model, family, whole, dir), _shared(config, arrays, plan), dir
        )
        if check_base and facts:
            _fingerprint.check_base(
                dir, facts.get("base"), _fingerprint.fingerprint(model, family, result.frozen)
            )
        return result


def head_of(dir: str | Path) -> dict[str, Any]:
    """The head that an adapter was trained with: what to pass to `hf.load` for its base.

    ```python
    # head="sequence_classification", num_labels=3
    model, params = hf.load("roberta-base", **peft.head_of("adapter"))
    ```

    By the task that the config names, or the head that the file holds; empty where neither says anything, and
    the base has the head already. The head that is drawn is replaced by the adapter's.
    """
    dir = Path(dir)
    config = parse(dir / "adapter_config.json", read_json(dir / "adapter_config.json"))
    names = {name.removeprefix(PREFIX): tensor for name, tensor in _stored(dir)[1].items()}
    if any(re.match(r"(transformer\.)?h\.\d+\.", name) for name in names):  # GPT-2, which has one head
        return {}
    head = next(
        (head for head, task in TASKS.items() if task is not None and task == config.task_type and head), None
    )
    return head_in(names) if head is None else {"head": head, **_labels(names)}


def _labels(stored: Mapping[str, Any]) -> dict[str, int]:
    ends = ("classifier.weight", "classifier.out_proj.weight")
    return next(
        ({"num_labels": stored[end].shape[0]} for end in ends if end in stored and stored[end].shape), {}
    )


class _Plan(NamedTuple):
    """What the config makes one expect of the file."""

    bare: bool  # names lack the model's prefix: the adapter was trained on the encoder alone
    targets: list[Module]
    ranks: dict[str, int]
    names: dict[str, dict[str, str]]  # of the arrays of each module: ours, and the file's
    expected: dict[str, tuple[int, ...]]
    shapes: dict[str, tuple[int, ...]]  # without the axes of size one that only the file has
    whole: dict[str, str]  # of what replaces tensors of the base: the file's name, and the tensor's


def _stored(dir: Path) -> tuple[Path, Mapping[str, Any]]:
    binary = dir / "adapter_model.bin"
    if not (dir / "adapter_model.safetensors").is_file() and binary.is_file():
        return binary, _state_dict.tensors(binary)
    return dir / "adapter_model.safetensors", stored_tensors(dir, stem="adapter_model")


def _check_task(dir: Path, config: Config, model: nn.Module) -> None:
    own = TASKS[getattr(model, "head", None)]
    if config.task_type in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") and config.task_type != own:
        head = next(head for head, task in TASKS.items() if task == config.task_type)
        raise ValueError(
            f"`task_type` of {dir} is {config.task_type}, and `model` has another head: load the base with "
            f"`hf.load(base, **peft.head_of(dir))` (head={head!r})"
        )


def _planned(
    dir: Path, config: Config, model_type: str, model: nn.Module, family: Family, stored: Mapping[str, Any]
) -> _Plan:
    own = modules_of(model, family)
    bare = _is_bare(family, own, stored)
    own = [module for module in own if not bare or module.name.startswith(family.prefix)]
    named = [
        module._replace(name=module.name.removeprefix(family.prefix)) if bare else module for module in own
    ]
    output = family.decoder.rpartition(".")[0]
    targets = targeted(config, named, model_type, output, dir)
    ranks = {
        module.name: config.r
        if config.peft_type != "LORA"
        else pattern_value(config.rank_pattern, module.name, config.r)
        for module in targets
    }
    names, expected, own_shapes = {}, {}, {}
    for module in targets:
        rank = ranks[module.name]
        if config.peft_type == "ADALORA" and f"{module.name}.lora_E" in config.rank_pattern:
            rank = sum(config.rank_pattern[f"{module.name}.lora_E"])
        found = places(config.peft_type, config.use_dora, module, rank)
        names[module.name] = {ours: f"{PREFIX}{module.name}.{place.ending}" for ours, place in found.items()}
        expected |= {names[module.name][ours]: place.shape for ours, place in found.items()}
        own_shapes |= {names[module.name][ours]: place.ours for ours, place in found.items()}
    if config.peft_type == "VERA" and config.save_projection:
        shapes = (
            (config.r, max(module.ins[0] for module in targets)),
            (max(module.outs for module in targets), config.r),
        )
        expected |= dict(zip(PROJECTIONS.values(), shapes, strict=True))
    whole = _whole(config, named, {module.name for module in targets}, family, stored)
    shapes = {tensor.name: tensor.shape for module in own for tensor in module.tensors}
    shapes |= {family.decoder: shapes[family.embedding]} | {
        alias: shapes[name] for alias, name in family.aliases.items() if name in shapes
    }
    expected |= {name: shapes[tensor] for name, tensor in whole.items()}
    return _Plan(bare, targets, ranks, names, expected, own_shapes, whole)


def _is_bare(family: Family, modules: list[Module], stored: Mapping[str, Any]) -> bool:
    """Whether the names are those of the model without a head, which lack its prefix."""
    inside = {
        module.name.removeprefix(family.prefix) for module in modules if module.name.startswith(family.prefix)
    }
    names = [name.removeprefix(PREFIX) for name in stored]
    owners = {name.partition(".lora_")[0].partition(".vera_lambda")[0] for name in names}
    return bool(owners & inside) and not any(name.startswith(family.prefix) for name in names)


def _whole(
    config: Config, modules: list[Module], targets: set[str], family: Family, stored: Mapping[str, Any]
) -> dict[str, str]:
    found = {}
    saved = saved_whole(config, modules)
    for module in saved:
        for tensor in module.tensors:
            own = family.decoder if module.tied else tensor.name
            found[f"{PREFIX}{module.name}.{own.rpartition('.')[2]}"] = own
    if config.bias != "none":
        for module in modules:
            if (
                module.bias
                and (config.bias == "all" or module.name in targets)
                and PREFIX + module.bias.name not in found
            ):
                found[f"{PREFIX}{module.name}{'.base_layer' if module.name in targets else ''}.bias"] = (
                    module.bias.name
                )
    # A bias with two names: PEFT writes it under both, or under one.
    return found | {
        PREFIX + alias: alias
        for alias, name in family.aliases.items()
        if name in found.values() and PREFIX + alias in stored
    }


def _named(plan: _Plan, dir: Path, stored: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """By the names of today, each array once: older files have `.weight` after DoRA's lengths, and where all
    biases train PEFT writes those of modules that are saved whole again, under the names that they have in
    its own wrapper."""
    old = {
        f"{name}.weight": name for names in plan.names.values() for ours, name in names.items() if ours == "m"
    }
    named = {
        old[name] if name in old and old[name] not in stored else name: tensor
        for name, tensor in stored.items()
    }
    for name in [
        name
        for name in named
        if name.endswith(".bias") and (".modules_to_save." in name or ".original_module." in name)
    ]:
        original = ".original_module." in name  # of the base, and without effect
        inner = re.sub(r"\.original_module\.|\.modules_to_save(\.default)?\.", ".", name)
        if inner in plan.expected and inner in named:
            if not original and not np.array_equal(named[name].read(), named[inner].read()):
                raise ValueError(
                    f"{dir} has two different values of one bias, {name!r} and {inner!r}: save the adapter "
                    "again"
                )
            del named[name]
    # A bare model has parts that a model with another head does without.
    full = lambda name: family.full_name(name.removeprefix(PREFIX))
    return {
        name: tensor
        for name, tensor in named.items()
        if name in plan.expected or not family.leftovers.fullmatch(full(name))
    }


def _without_base(
    plan: _Plan, dir: Path, model: nn.Module, family: Family, params: Any, stored: dict[str, Any]
) -> dict[str, Any]:
    """Without the embeddings that PEFT writes beside an adapter of one of them, which must be those of
    the base.
    """
    kept, leaves = {}, dict(named_leaves(params, is_leaf=is_node))
    copies = {}
    for module in modules_of(model, family):
        if (
            module.kind == "embedding"
            or module.weight is not None
            and (module.tied or module.weight.name == family.decoder)
        ):
            name = module.name.removeprefix(family.prefix) if plan.bare else module.name
            copies |= {f"{PREFIX}{name}.{middle}weight": module.weight for middle in ("", "base_layer.")}
    for name, tensor in stored.items():
        weight = copies.get(name)
        if weight is None or name in plan.expected:
            kept[name] = tensor
            continue
        leaf = leaves.get(weight.path)
        if isinstance(leaf, Packed) or leaf is None or is_shape(leaf):
            continue
        if tensor.shape != weight.shape or not np.array_equal(tensor.read(), weight.to_theirs(leaf)):
            raise ValueError(
                f"{dir} has its own copy of the base's {weight.name!r}, which differs from that of "
                "`params`, in shape or in value: load the base it was trained on"
            )
    return kept


def _part(config: Config, module: Module, arrays: dict[str, np.ndarray], plan: _Plan) -> Part:
    rank = plan.ranks[module.name]
    own = {ours: arrays[name].reshape(plan.shapes[name]) for ours, name in plan.names[module.name].items()}
    alpha = plain_number(pattern_value(config.alpha_pattern, module.name, config.lora_alpha))
    if config.peft_type == "VERA":
        return Part(module, VeRA(rank, config.d_initial, config.projection_prng_key, config.dropout), own)
    if config.peft_type == "ADALORA":
        mask = config.rank_pattern.get(f"{module.name}.lora_E")
        # PEFT's rule, for this method alone.
        alpha = alpha if alpha > 0 else rank
        return Part(
            module,
            AdaLoRA(rank, alpha, config.dropout),
            own if mask is None else _spread(own, np.array(mask, bool), rank),
        )
    options = {"rank": rank, "alpha": alpha, "dropout": config.dropout, "rs": config.use_rslora}
    if config.use_dora:
        return Part(module, DoRA(**options), own)
    begins = config.init_lora_weights == "pissa" and module.kind in ("linear", "conv1d")
    return Part(module, PiSSA(**options) if begins else LoRA(**options), own)


def _spread(arrays: dict[str, np.ndarray], kept: np.ndarray, rank: int) -> dict[str, np.ndarray]:
    """AdaLoRA's arrays with the ranks that were given up at zero again, where the budget may bring them
    back.
    """
    if len(kept) != rank:
        raise ValueError(f"`rank_pattern` has a mask of {len(kept)} entries, and `init_r` is {rank}")
    spread = {}
    for name, array in arrays.items():
        axis = 1 if name == "b" else 0
        shape = list(array.shape)
        shape[axis] = rank
        spread[name] = np.zeros(shape, array.dtype)
        np.moveaxis(spread[name], axis, 0)[kept] = np.moveaxis(array, axis, 0)
    return spread


def _shared(config: Config, arrays: dict[str, np.ndarray], plan: _Plan) -> dict[str, np.ndarray]:
    """VeRA's projections, if the file has them; otherwise they are drawn again, from its seed."""
    return {ours: arrays[name].T for ours, name in PROJECTIONS.items() if name in plan.expected}
