"""A model's modules under PyTorch's names, which adapter files use where our own trees have paths.

The tensors are those of the tables in `_families`, here grouped by module. Configs name modules by their
last components, so that this file also finds the shortest such endings.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

import flax.linen as nn

from ._families import Family
from ._tensors import Tensor, tensors_of


ADAPTABLE = ("linear", "conv1d", "embedding", "convolution")


class Module(NamedTuple):
    """One module with parameters of its own."""

    name: str  # PyTorch's, `transformer.h.0.attn.c_attn`
    kind: str  # one of ADAPTABLE, or "norm" or "other"
    weight: Tensor | None
    bias: Tensor | None
    tied: bool  # whether this is a head whose weight is the embedding's

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.weight, self.bias) if tensor is not None]

    @property
    def matrix(self) -> Tensor:
        """The weight of a module that has one, as every adaptable module does."""
        assert self.weight is not None, f"{self.name} has a bias only"
        return self.weight

    @property
    def outs(self) -> int:
        """The width of its result; for an embedding, of its rows."""
        shape = self.matrix.shape
        return shape[0] if self.kind in ("linear", "convolution") or self.tied else shape[1]

    @property
    def ins(self) -> tuple[int, ...]:
        shape = self.matrix.shape
        return shape[1:] if self.kind in ("linear", "convolution") or self.tied else shape[:1]


def modules_of(model: nn.Module, family: Family) -> list[Module]:
    """Every module with parameters, in the order of the table. A head that is tied to the embedding comes
    last.
    """
    found: dict[str, dict[str, Tensor]] = {}
    tensors = tensors_of(model, family)
    for tensor in tensors:
        name, _, last = tensor.name.rpartition(".")
        found.setdefault(name, {})[last] = tensor
    modules = [
        Module(
            name,
            _kind(parts["weight"]) if "weight" in parts else "other",
            parts.get("weight"),
            parts.get("bias"),
            False,
        )
        for name, parts in found.items()
    ]
    head = tied_head(model, family)
    if head is not None:
        embedding = next(tensor for tensor in tensors if tensor.name == family.embedding)
        modules.append(Module(head, "linear", embedding, None, True))
    return modules


def tied_head(model: nn.Module, family: Family) -> str | None:
    """The module whose weight is the embedding's, if this model has one."""
    if not model.config.tie_word_embeddings:
        return None
    apart = model.clone(config=dataclasses.replace(model.config, tie_word_embeddings=False))
    has_one = any(tensor.name == family.decoder for tensor in tensors_of(apart, family))
    return family.decoder.rpartition(".")[0] if has_one else None


def uncalled_modules(model: nn.Module, family: Family) -> set[str]:
    """The modules of this model in which PEFT's adapters do nothing."""
    there = {tensor.name for tensor in tensors_of(model, family)}
    return {module for module, tensor in family.uncalled.items() if tensor in there}


def _kind(weight: Tensor) -> str:
    last = weight.path.rpartition("/")[2]
    if last == "embedding":
        return "embedding"
    if last != "kernel":
        return "norm"
    if len(weight.shape) > 2:
        return "convolution"
    return "linear" if weight.transposed else "conv1d"


def containers(names: Iterable[str]) -> set[str]:
    """The modules that contain these."""
    return {
        ".".join(parts[:depth])
        for parts in (name.split(".") for name in names)
        for depth in range(1, len(parts))
    }


def ends_with(name: str, ending: str) -> bool:
    """Whether `ending` is the whole of a module's name or its last components. PEFT reads lists of targets
    so.
    """
    return name == ending or name.endswith("." + ending)


def short_names(wanted: Collection[str], others: Collection[str]) -> list[str]:
    """The shortest endings, sorted, that match every name of `wanted` and none of `others`."""
    chosen = set()
    for name in wanted:
        parts = name.split(".")
        endings = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        chosen.add(
            next(
                (ending for ending in endings if not any(ends_with(other, ending) for other in others)), name
            )
        )
    return sorted(chosen)


def whole_modules(wanted: Collection[str], all_names: Collection[str]) -> list[str]:
    """`wanted`, with a larger module in place of all that it contains: `classifier` for its two layers.

    A module is left as it is where another one's name ends like its container's, dot or no dot, because PEFT
    would take both: `word_embeddings` for `embeddings`. A list of layers is none: PEFT has no copy of it.
    """
    every = {*all_names, *containers(all_names)}

    def stands_for(outer: str) -> bool:
        within = [name for name in all_names if name == outer or name.startswith(outer + ".")]
        return (
            all(name in wanted for name in within)
            and not any(name != outer and name.endswith(outer) for name in every)
            and not any(name.removeprefix(outer + ".").split(".")[0].isdecimal() for name in within)
        )

    chosen = set()
    for name in wanted:
        parts = name.split(".")
        above = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
        chosen.add(next(filter(stands_for, above), name))
    # A module that has tensors of its own is also the container of others.
    return sorted(name for name in chosen if not any(name.startswith(other + ".") for other in chosen))


def covered_by(names: Iterable[str], module: str) -> bool:
    """Whether a module is one of `names` or within one. PEFT keeps adapters out of `modules_to_save` so."""
    return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in names)
