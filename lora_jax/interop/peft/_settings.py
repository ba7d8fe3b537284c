"""What a written `adapter_config.json` says of the method and of its targets."""

import collections
from typing import Any

from ...methods import AdaLoRA, DoRA, LoRA, VeRA
from .._adapters import Part, plain_number
from .._modules import containers, Module, short_names


# What PEFT accepts where only whole modules are saved.
NO_MODULES = "dummy-target-modules"


def target_names(parts: list[Part], modules: list[Module]) -> list[str] | str:
    """The endings of the adapted modules' names, or PEFT's word for none."""
    if not parts:
        return NO_MODULES
    wanted = {part.module.name for part in parts}
    every = {module.name for module in modules}
    return short_names(wanted, (every | containers(every)) - wanted)


def method_settings(parts: list[Part]) -> dict[str, Any]:
    if not parts:
        return {"r": 1, "lora_alpha": 1, "lora_dropout": 0.0}
    first = parts[0].method
    if isinstance(first, VeRA):
        return {
            "r": first.rank,
            "vera_dropout": first.dropout,
            "d_initial": first.d_initial,
            "projection_prng_key": first.seed,
            "save_projection": True,
        }
    dropout = max(part.method.dropout for part in parts)
    if isinstance(first, AdaLoRA):
        # `total_step` is of the training, which is over; PEFT does not accept a config without it.
        return {
            "init_r": first.rank,
            "target_r": first.rank,
            "total_step": 1,
            "lora_alpha": plain_number(first.alpha),
            "lora_dropout": dropout,
        }
    methods = {part.module.name: part.method for part in parts if isinstance(part.method, LoRA | DoRA)}
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
    exceptions: dict[str, Any] = {}
    for value in sorted(set(values.values()) - {common}):
        wanted = {name for name in values if values[name] == value}
        exceptions |= dict.fromkeys(short_names(wanted, values.keys() - wanted), value)
    return common, dict(sorted(exceptions.items()))
