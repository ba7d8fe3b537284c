"""The models that can be read and written, with one file each. A new model is one more file and
one more entry of `FAMILIES`.

A table gives our path of each tensor of a Hugging Face file. `{}` stands for the number of a layer. A star
marks the weights whose axes PyTorch has in the other order: (out, in) of `Linear`, (out, in, width) of a
convolution. GPT-2's `Conv1D` is (in, out) in both.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from . import bert, deberta, gpt2, llama, roberta
from .family import Family as Family


ELSEWHERE = (
    "docs/frameworks.md shows them on models of Flax and Equinox, and https://github.com/jax-ml/bonsai has "
    "many such models."
)
FAMILIES = {
    "gpt2": gpt2.FAMILY,
    **llama.FAMILIES,
    "bert": bert.FAMILY,
    "roberta": roberta.FAMILY,
    "deberta-v2": deberta.FAMILY,
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a `config.json` names. The error for any other names the supported ones."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(
            f"`model_type` is {kind!r} in config.json, which is not supported; supported are "
            f"{sorted(FAMILIES)}. Any JAX implementation of it will do: `lorafy` and `adapt` need no model "
            f"of ours. {ELSEWHERE}"
        )
    return FAMILIES[kind]


def chosen_head(config: Mapping[str, Any], family: Family, wanted: str | None = None) -> str | None:
    """`wanted`, or our name for the head of the class that a `config.json` names."""
    named = config.get("architectures") or ()
    strangers = set(named) - set(family.heads)
    known = sorted(filter(None, set(family.heads.values())))
    if wanted is not None:
        if wanted not in known:
            if known:
                raise ValueError(f"`head` is {wanted!r}; it must be one of {known}.")
            raise ValueError(
                f"`head` is {wanted!r}, and {config['model_type']!r} has one head; leave it out."
            )
        return wanted
    if strangers:
        fix = f" Pass `head=`, one of {known}, to choose a head by hand." if known else ""
        raise ValueError(
            f"`architectures` is {sorted(strangers)} in config.json, which is not supported; of "
            f"{config['model_type']!r} there are {list(family.heads)}.{fix}"
        )
    if not named and None in family.heads.values():
        return None
    found = {family.heads[name] for name in named} or set(family.heads.values())
    if len(found) > 1:
        raise ValueError(
            f"config.json does not name one class in `architectures`; pass `head=`, one of {known}."
        )
    return found.pop()


def family_of_model(model: nn.Module) -> tuple[str, str, Family]:
    """`(model_type, architecture, family)` of a model."""
    for kind, family in FAMILIES.items():
        if isinstance(model, family.model) and type(model.config) is family.config:
            head = getattr(model, "head", None)
            return kind, next(name for name, ours in family.heads.items() if ours == head), family
    names = list(dict.fromkeys(family.model.__name__ for family in FAMILIES.values()))
    raise TypeError(
        f"`model` is a {type(model).__name__}, which has no Hugging Face form here; pass one of {names}."
    )
