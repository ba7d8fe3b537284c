"""What the readers and writers know of a family of models."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn

from ...models._config import ModelConfig


# What BERT's first files have for a norm's weight and bias. transformers reads it of any model.
_FIRST_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face: its classes, and the names of its tensors there and here."""

    model: type[nn.Module]
    config: type[ModelConfig]
    heads: Mapping[str, str | None]  # their class: our head; of several for one head, `save` writes the first
    layers: str  # the field of the config that has the number of layers
    prefix: str  # of the tensors of the bare model, whose own files lack it
    embedding: str  # the tensor of the word embedding
    decoder: str  # the tensor that repeats the embedding when tied
    aliases: Mapping[str, str]  # a second name of a tensor: its first name
    fused: Mapping[str, int]  # the end of a module's name: how many projections it has side by side
    leftovers: re.Pattern  # names of further tensors in files, on which no result depends
    # Modules whose weight PyTorch's model reads without calling them, so that PEFT's adapters of them do
    # nothing there, and a tensor of each model where it is so.
    uncalled: Mapping[str, str]
    table: str
    # How tensors begin that have the prefix and belong to a classifier's head all the same: a pretrained file
    # need not hold them, and PyTorch draws them then.
    pooler: tuple[str, ...] = ()

    def in_head(self, name: str) -> bool:
        """Whether a tensor of a model with a new head, or a module, belongs to the head."""
        return not name.startswith(self.prefix) or name.startswith(self.pooler)

    def projections_in(self, module: str) -> int:
        """How many projections a module has side by side: 1 unless it is fused."""
        return self.fused.get(module.rpartition(".")[2], 1)

    def rows(self) -> Iterator[tuple[str, str, bool]]:
        """`(their name, our path, transposed)`, one for each line of the table."""
        for line in self.table.strip().splitlines():
            theirs, ours, *star = line.split()
            yield theirs, ours, bool(star)

    def full_name(self, name: str) -> str:
        """A tensor's name in the table: with the prefix that files of the bare model leave out, and not as
        the first files had it.
        """
        for first, later in _FIRST_NAMES.items():
            if name.endswith(first):
                name = name.removesuffix(first) + later
        known = name in self.aliases or any(name == theirs for theirs, _, _ in self.rows())
        return name if known or name.startswith(self.prefix) else self.prefix + name

    def build(self, config: ModelConfig, head: str | None, **options: Any) -> nn.Module:
        """The model, with that head where there is more than one."""
        return self.model(config, head=head, **options)
