"""The modules that a config names, by PEFT's own rules."""

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from .._modules import ADAPTABLE, covered_by, ends_with, Module
from ._config import AdapterConfig
from ._settings import NO_MODULES


# PEFT's table, for configs whose `target_modules` is null.
_DEFAULTS = {
    "gpt2": ("c_attn",),
    "bert": ("query", "value"),
    "roberta": ("query", "value"),
    "deberta-v2": ("query_proj", "value_proj"),
}
_DEFAULTS_OF_ADALORA = _DEFAULTS | {
    "roberta": ("query", "key", "value", "dense"),
    "deberta-v2": ("query_proj", "key_proj", "value_proj", "dense"),
}
# PEFT's names for the head of a classifier, which "all-linear" leaves out.
_HEADS = ("classifier", "score")


def targeted(
    config: AdapterConfig, modules: list[Module], model_type: str, output: str | None, source: Any
) -> list[Module]:
    """The modules that get an adapter. `output` is the module that turns features into logits, which
    "all-linear" leaves out.

    A target that matches nothing beside others is warned of. Raises `ValueError` where none matches, or for
    a module that cannot be adapted.
    """
    defaults = _DEFAULTS_OF_ADALORA if config.peft_type == "ADALORA" else _DEFAULTS
    names = defaults[model_type] if config.target_modules is None else config.target_modules
    if names == NO_MODULES:
        return []
    found = [module for module in modules if _matches(config, names, module, output)]
    for module in found:
        if module.kind not in ADAPTABLE:
            raise ValueError(
                f"`target_modules` of {source} names {module.name!r}, which is not a linear layer, a "
                "convolution or an embedding, and has no adapter here."
            )
    unused = (
        [name for name in names if not any(ends_with(module.name, name) for module in modules)]
        if isinstance(names, tuple)
        else []
    )
    if unused:
        stranger = (
            f"`target_modules` of {source} names {unused[0]!r}, which this model does not have: "
            f"{_endings(modules)}."
        )
        if not found:
            raise ValueError(stranger)
        # As in PEFT. The tensors, all of which must be expected, decide whether something is missing.
        warnings.warn(f"{stranger} The other targets are read.", stacklevel=4)
    if not found:
        raise ValueError(
            f"`target_modules` is {config.target_modules!r} in {source}, which matches no module of this "
            f"model: {_endings(modules)}."
        )
    return found


def saved_whole(config: AdapterConfig, modules: list[Module]) -> list[Module]:
    """The modules that the adapter's file holds whole, in place of the base's."""
    return [module for module in modules if covered_by(config.modules_to_save, module.name)]


def _matches(config: AdapterConfig, names: tuple[str, ...] | str, module: Module, output: str | None) -> bool:
    if _listed(config.exclude_modules, module.name) or covered_by(config.modules_to_save, module.name):
        return False
    if isinstance(names, str) and names.lower() == "all-linear":
        in_head = config.task_type == "SEQ_CLS" and module.name.split(".")[0] in _HEADS
        return module.kind in ("linear", "conv1d") and module.name != output and not in_head
    # The whole name of a module is chosen in any layer.
    return _listed(names, module.name) and (
        isinstance(names, str) or module.name in names or _layer_chosen(config, module.name)
    )


def _listed(names: tuple[str, ...] | str | None, module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(ends_with(module, name) for name in names or ())


def _layer_chosen(config: AdapterConfig, module: str) -> bool:
    if config.layers_to_transform is None:
        return True
    patterns = [rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\." for pattern in config.layers_pattern] or [
        r".*?\.[^.]*\.(?P<index>\d+)\."
    ]
    found = next(filter(None, (re.match(pattern, module) for pattern in patterns)), None)
    return found is not None and int(found["index"]) in config.layers_to_transform


def _endings(modules: Iterable[Module]) -> str:
    return "it has " + ", ".join(
        sorted({module.name.rpartition(".")[2] for module in modules if module.kind in ADAPTABLE})
    )


def pattern_value(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first key that matches a module's name, or its end."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)
