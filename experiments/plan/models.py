"""The models that can be planned: by a published name, or by a directory. Only its `config.json` is read.

Encoders are planned with the head of sequence classification, which is new and trains beside the adapters, as
in LoRA's paper. GPT-3 (Brown et al. 2020, arXiv 2005.14165, table 2.1) is GPT-2's architecture at other
sizes; left out of it: the locally banded sparse attention of every other layer, here dense in all, which
stores no weight and costs no less.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from experiments.strict_json import nearest
from lora_jax.models import (
    Bert,
    BertConfig,
    DebertaV2,
    DebertaV2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2,
    GPT2Config,
    Llama,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Roberta,
    RobertaConfig,
)


def _gpt3(layers: int, width: int, heads: int) -> dict[str, int]:
    return {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": 2048}


# Two rows of the table are not products of its own columns: XL prints 24 heads of 128 for a width of 2,048,
# which are 16, and 13B a width of 5,140 for 40 heads of 128, which is 5,120.
GPT3 = {
    "gpt3-125m": _gpt3(12, 768, 12),
    "gpt3-350m": _gpt3(24, 1024, 16),
    "gpt3-760m": _gpt3(24, 1536, 16),
    "gpt3-1.3b": _gpt3(24, 2048, 16),
    "gpt3-2.7b": _gpt3(32, 2560, 32),
    "gpt3-6.7b": _gpt3(32, 4096, 32),
    "gpt3-13b": _gpt3(40, 5120, 40),
    "gpt3-175b": _gpt3(96, 12288, 96),
}


@dataclass(frozen=True)
class _Family:
    """What is planned of one kind of model. `targets`, `blocks` and `head` are a `Subject`'s; `sizes`: the
    names of the config's fields for its depth and width."""

    config: Any
    model: Any
    targets: str
    blocks: tuple[bool, ...] | None = None
    head: str | None = None
    sizes: tuple[str, str] = ("num_hidden_layers", "hidden_size")


def _llama(config: Any) -> _Family:
    return _Family(config, Llama, "self_attn/(q_proj|v_proj)/kernel")


# By the `model_type` of a config.json.
FAMILIES = {
    "gpt2": _Family(GPT2Config, GPT2, "attn/c_attn/kernel", (True, False, True), sizes=("n_layer", "n_embd")),
    "llama": _llama(LlamaConfig),
    "mistral": _llama(MistralConfig),
    "qwen2": _llama(Qwen2Config),
    "qwen3": _llama(Qwen3Config),
    "gemma2": _llama(Gemma2Config),
    "gemma3_text": _llama(Gemma3TextConfig),
    # BERT's pooler is pretrained.
    "bert": _Family(BertConfig, Bert, "attention/self/(query|value)/kernel", head="classifier/.*"),
    "roberta": _Family(RobertaConfig, Roberta, "attention/self/(query|value)/kernel", head="classifier/.*"),
    "deberta-v2": _Family(
        DebertaV2Config,
        DebertaV2,
        "attention/self/(query|value)_proj/kernel",
        head="(classifier|pooler)/.*",
    ),
}


@dataclass(frozen=True)
class Subject:
    """A model to be planned. `longest`: the tokens it was made for, and if `bounded` the most it can take.
    `targets`: query and value, the paper's choice; `blocks`: which parts of a fused weight these are; `head`:
    what trains whole beside the adapters."""

    name: str
    model: Any
    layers: int
    width: int
    longest: int
    bounded: bool
    targets: str
    blocks: tuple[bool, ...] | None
    head: str | None

    @property
    def classifies(self) -> bool:
        return self.head is not None


def named(name: str, dtype: str, *, checkpoint: bool) -> Subject:
    """The model of a published name or of a directory, with its layers under `scan`, which keeps compile time
    constant in depth.

    Raises `ValueError` for a name that is neither, with the nearest.
    """
    family, config = _found(name)
    options = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
    if family.head is not None:
        options["head"] = "sequence_classification"
    depth, width = (getattr(config, field) for field in family.sizes)
    return Subject(
        name,
        family.model(config, scan=True, checkpoint=checkpoint, **options),
        depth,
        width,
        config.positions or config.max_position_embeddings,
        config.positions is not None and family.model is not Llama,  # rotary ones have no table
        family.targets,
        family.blocks,
        family.head,
    )


def _published() -> dict[str, tuple[_Family, dict[str, Any]]]:
    """The family of each published name, and its sizes."""
    gpt3 = {name: (FAMILIES["gpt2"], sizes) for name, sizes in GPT3.items()}
    return gpt3 | {
        name: (family, sizes) for family in FAMILIES.values() for name, sizes in family.config.sizes.items()
    }


def _found(name: str) -> tuple[_Family, Any]:
    names = _published()
    if name in names:
        family, sizes = names[name]
        return family, family.config(**sizes)
    file = Path(name) / "config.json"
    if not file.is_file():
        raise ValueError(
            f"`MODEL` is {name!r}, neither a published size nor a directory with a "
            f"config.json{nearest(name, names)} (published: {', '.join(names)})."
        )
    return _from_json(file)


def _from_json(file: Path) -> tuple[_Family, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"`{file}` is not valid JSON: {error}") from error
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind not in FAMILIES:
        raise ValueError(
            f"`model_type` in `{file}` is {kind!r}, and must be one of {', '.join(FAMILIES)}: other models "
            "are not known here."
        )
    return FAMILIES[kind], FAMILIES[kind].config.from_hf(content)
