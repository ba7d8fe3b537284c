"""The tensors that a config leads one to expect in the file of an adapter."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn

from .._families import Family
from .._modules import covered_by, Module, modules_of
from ._config import AdapterConfig
from ._layout import entries, PREFIX, PROJECTIONS, TOKENS
from ._targets import pattern_value, saved_whole, targeted


class Plan(NamedTuple):
    """The tensors that the config leads one to expect in the file."""

    bare: bool  # whether names lack the model's prefix: the adapter was trained on the encoder alone
    targets: list[Module]
    ranks: dict[str, int]
    names: dict[str, dict[str, str]]  # by module: our names of its arrays, and the file's
    expected: dict[str, tuple[int, ...]]
    shapes: dict[str, tuple[int, ...]]  # without the axes of length one that only files have
    whole: dict[str, str]  # of tensors that replace the base's: the file's name, and the tensor's
    tokens: str | None  # the file's name of the rows that take the place of the word embedding's
    idle: set[str]  # those of the file's names whose tensors have no effect on what PEFT computes


def plan_of(
    directory: Path,
    config: AdapterConfig,
    model_type: str,
    model: nn.Module,
    family: Family,
    stored: Mapping[str, Any],
) -> Plan:
    own = modules_of(model, family)
    bare = _is_bare(family, own, stored)
    own = [module for module in own if not bare or module.name.startswith(family.prefix)]
    named = [
        module._replace(name=module.name.removeprefix(family.prefix)) if bare else module for module in own
    ]
    output = family.decoder.rpartition(".")[0]
    targets = targeted(config, named, model_type, output, directory)
    ranks = {
        module.name: config.r
        if config.peft_type != "LORA"
        else pattern_value(config.rank_pattern, module.name, config.r)
        for module in targets
    }
    names: dict[str, dict[str, str]] = {}
    expected: dict[str, tuple[int, ...]] = {}
    own_shapes: dict[str, tuple[int, ...]] = {}
    for module in targets:
        rank = ranks[module.name]
        if config.peft_type == "ADALORA" and f"{module.name}.lora_E" in config.rank_pattern:
            rank = sum(config.rank_pattern[f"{module.name}.lora_E"])
        found = entries(config.peft_type, config.use_dora, module, rank)
        names[module.name] = {ours: f"{PREFIX}{module.name}.{entry.ending}" for ours, entry in found.items()}
        expected |= {names[module.name][ours]: entry.shape for ours, entry in found.items()}
        own_shapes |= {names[module.name][ours]: entry.own_shape for ours, entry in found.items()}
    if config.peft_type == "VERA" and config.save_projection and targets:
        ins, outs = max(module.ins[0] for module in targets), max(module.outs for module in targets)
        expected |= {PROJECTIONS["shared_a"]: (config.r, ins), PROJECTIONS["shared_b"]: (outs, config.r)}
    whole = _tensors_saved_whole(config, named, {module.name for module in targets}, family, stored)
    shapes = {tensor.name: tensor.shape for module in own for tensor in module.tensors}
    shapes |= {family.decoder: shapes[family.embedding]} | {
        alias: shapes[name] for alias, name in family.aliases.items() if name in shapes
    }
    expected |= {name: shapes[tensor] for name, tensor in whole.items()}
    idle = _idle(config, family, whole)
    tokens = None
    if config.tokens is not None:
        rows, shape = config.tokens[1], shapes[family.embedding]
        tokens = f"{_with_tokens(directory, config, named, targets, family, bare)}.{TOKENS}"
        if max(rows) >= shape[0]:
            raise ValueError(
                f"`trainable_token_indices` of {directory} has the token {max(rows)}, and the embedding of "
                f"this model has {shape[0]} rows: load the base that the adapter was trained on, or "
                "with `hf.load(dir, vocab_size=...)` and the number of its tokens."
            )
        expected[PREFIX + tokens] = (len(rows), shape[1])
    return Plan(bare, targets, ranks, names, expected, own_shapes, whole, tokens and PREFIX + tokens, idle)


def _with_tokens(
    directory: Path,
    config: AdapterConfig,
    modules: list[Module],
    targets: list[Module],
    family: Family,
    bare: bool,
) -> str:
    """The embedding of which tokens train. Raises `ValueError` for another module, and where the embedding or
    its head is adapted or saved whole too.
    """
    assert config.tokens is not None, "asked for by the caller"
    ending = config.tokens[0]
    own = family.embedding.rpartition(".")[0]
    own = own.removeprefix(family.prefix) if bare else own
    if ending is not None and [module.name for module in modules if module.name.endswith(ending)] != [own]:
        raise ValueError(
            f"`trainable_token_indices` of {directory} names {ending!r}, and only tokens of {own!r} can be "
            "represented here."
        )
    taken = {module.name for module in [*targets, *saved_whole(config, modules)]}
    found = taken & {own, family.decoder.rpartition(".")[0]}
    if found:
        raise ValueError(
            f"`trainable_token_indices` of {directory} trains tokens of {own!r}, and {sorted(found)[0]!r} is "
            "adapted or saved whole too: that cannot be represented here. Train it without one of the two."
        )
    return own


def _is_bare(family: Family, modules: list[Module], stored: Mapping[str, Any]) -> bool:
    """Whether the names are those of the model without a head, which lack its prefix."""
    inside = {
        module.name.removeprefix(family.prefix) for module in modules if module.name.startswith(family.prefix)
    }
    names = [name.removeprefix(PREFIX) for name in stored]
    owners = {name.partition(".lora_")[0].partition(".vera_lambda")[0] for name in names}
    return bool(owners & inside) and not any(name.startswith(family.prefix) for name in names)


def _tensors_saved_whole(
    config: AdapterConfig, modules: list[Module], targets: set[str], family: Family, stored: Mapping[str, Any]
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
    # The head's bias, of whose two names the head's own counts.
    there = {tensor.name for module in modules for tensor in module.tensors}
    for alias, name in family.aliases.items():
        owner = alias.rpartition(".")[0]
        if name in there and owner in {module.name for module in saved}:
            found[PREFIX + alias] = alias
        elif name in there and owner in targets and config.bias != "none":
            found[f"{PREFIX}{owner}.base_layer.bias"] = alias
    # PEFT writes a bias that has two names under both, or under one.
    return found | {
        PREFIX + alias: alias
        for alias, name in family.aliases.items()
        if name in found.values() and PREFIX + alias in stored
    }


def _idle(config: AdapterConfig, family: Family, whole: Mapping[str, str]) -> set[str]:
    """The first name of a bias of which the head, saved whole by itself, has a copy of its own."""
    saved = config.modules_to_save
    return {
        PREFIX + name
        for alias, name in family.aliases.items()
        if alias in whole.values()
        and PREFIX + name in whole
        and covered_by(saved, alias.rpartition(".")[0])
        and not covered_by(saved, name.rpartition(".")[0])
    }
