"""The models that can be read and written, one table a model: a new one is one more row of `FAMILIES`.

A table says what each tensor of a Hugging Face file is called here. `{}` stands for the number of a layer, and a star
marks the weights that PyTorch's `Linear` keeps as (out, in) and Flax as (in, out); GPT-2's `Conv1D` is (in, out) in both.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ..models.gpt2 import GPT2, GPT2Config


@dataclasses.dataclass(frozen=True)
class Family:
    """How one `model_type` of Hugging Face is spelled here."""

    model: type[nn.Module]
    config: type
    architectures: tuple[str, ...]  # the first is what `save` writes
    prefix: str  # files of the bare model lack it
    tied: tuple[str, str]  # the head's tensor, and the embedding it repeats when tied
    buffers: re.Pattern  # tensors of old files that hold no parameter
    table: str

    def rows(self) -> Iterator[tuple[str, str, bool]]:
        """`(their name, our path, transposed)`, one for each line of the table."""
        for line in self.table.strip().splitlines():
            theirs, ours, *star = line.split()
            yield theirs, ours, bool(star)

    def full_name(self, name: str) -> str:
        """A tensor's name in the table: files of the bare model leave the prefix out."""
        in_table = any(name == theirs for theirs, _, _ in self.rows())
        return name if in_table or name.startswith(self.prefix) else self.prefix + name


FAMILIES = {
    "gpt2": Family(
        model=GPT2,
        config=GPT2Config,
        architectures=("GPT2LMHeadModel", "GPT2Model"),
        prefix="transformer.",
        tied=("lm_head.weight", "transformer.wte.weight"),
        buffers=re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"),
        table="""
            transformer.wte.weight                 wte/embedding
            transformer.wpe.weight                 wpe/embedding
            transformer.h.{}.ln_1.weight           h/{}/ln_1/scale
            transformer.h.{}.ln_1.bias             h/{}/ln_1/bias
            transformer.h.{}.attn.c_attn.weight    h/{}/attn/c_attn/kernel
            transformer.h.{}.attn.c_attn.bias      h/{}/attn/c_attn/bias
            transformer.h.{}.attn.c_proj.weight    h/{}/attn/c_proj/kernel
            transformer.h.{}.attn.c_proj.bias      h/{}/attn/c_proj/bias
            transformer.h.{}.ln_2.weight           h/{}/ln_2/scale
            transformer.h.{}.ln_2.bias             h/{}/ln_2/bias
            transformer.h.{}.mlp.c_fc.weight       h/{}/mlp/c_fc/kernel
            transformer.h.{}.mlp.c_fc.bias         h/{}/mlp/c_fc/bias
            transformer.h.{}.mlp.c_proj.weight     h/{}/mlp/c_proj/kernel
            transformer.h.{}.mlp.c_proj.bias       h/{}/mlp/c_proj/bias
            transformer.ln_f.weight                ln_f/scale
            transformer.ln_f.bias                  ln_f/bias
            lm_head.weight                         lm_head/kernel *
        """,
    ),
}


def family_of(config: Mapping[str, Any]) -> tuple[str, Family]:
    """The family that a `config.json` names, or an error that names the supported ones."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"`model_type`={kind!r} in config.json is not supported; supported are {sorted(FAMILIES)}")
    family = FAMILIES[kind]
    strangers = set(config.get("architectures") or ()) - set(family.architectures)
    if strangers:
        raise ValueError(
            f"`architectures`={sorted(strangers)} in config.json is not supported; of {kind!r} there are "
            f"{list(family.architectures)}"
        )
    return kind, family


def family_of_model(model: nn.Module) -> tuple[str, Family]:
    for kind, family in FAMILIES.items():
        if isinstance(model, family.model):
            return kind, family
    names = [family.model.__name__ for family in FAMILIES.values()]
    raise TypeError(f"`model` is a {type(model).__name__}, which has no Hugging Face form here; those of {names} have")


class Tensor(NamedTuple):
    """One tensor of a file, and where it lives in the parameters of a given model."""

    name: str  # in the file
    path: str  # in the parameters, components joined by `/`
    layer: int | None  # its index along the first axis there, in a scanned model
    transposed: bool
    shape: tuple[int, ...]  # in the file

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        return array.T if self.transposed else array

    def to_theirs(self, leaf) -> np.ndarray:
        """What the file holds; of a stacked leaf only this layer leaves the device."""
        array = np.asarray(leaf if self.layer is None else leaf[self.layer])
        # The writer takes the buffer as it lies in memory, whatever the strides say.
        return np.ascontiguousarray(array.T if self.transposed else array)


def tensors_of(model: nn.Module, family: Family) -> list[Tensor]:
    """Every tensor of the model's files, in the order of the table and of the layers."""
    shapes = shapes_of(model)
    tensors = []
    for theirs, ours, transposed in family.rows():
        for i in range(model.config.n_layer) if "{}" in theirs else [None]:
            path = ours.replace("/{}/", "/") if model.scan and i is not None else ours.format(i)
            layer = i if model.scan else None
            if path in shapes:
                shape = shapes[path].shape[1:] if layer is not None else shapes[path].shape
                tensors.append(Tensor(theirs.format(i), path, layer, transposed, shape[::-1] if transposed else shape))
    return tensors


def shapes_of(model: nn.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters of a model by path, as shapes: nothing is allocated."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))
    return traverse_util.flatten_dict(shapes["params"], sep="/")
