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
    GPT2,
    GPT2Config,
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


_ENCODERS: dict[Any, Any] = {BertConfig: Bert, RobertaConfig: Roberta, DebertaV2Config: DebertaV2}


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
    options = {
        "scan": True,
        "checkpoint": checkpoint,
        "dtype": jnp.dtype(dtype),
        "param_dtype": jnp.dtype(dtype),
    }
    config = _config(name)
    if isinstance(config, GPT2Config):
        model = GPT2(config, **options)
        return Subject(
            name,
            model,
            config.n_layer,
            config.n_embd,
            config.n_positions,
            True,
            "attn/c_attn/kernel",
            (True, False, True),
            None,
        )
    deberta = isinstance(config, DebertaV2Config)
    model = _ENCODERS[type(config)](config, head="sequence_classification", **options)
    taken = config.pad_token_id + 1 if isinstance(config, RobertaConfig) else 0
    longest = config.max_position_embeddings - taken
    targets = f"attention/self/(query|value){'_proj' if deberta else ''}/kernel"
    # BERT's pooler is pretrained.
    head = "(classifier|pooler)/.*" if deberta else "classifier/.*"
    bounded = not deberta or config.position_biased_input
    return Subject(
        name, model, config.num_hidden_layers, config.hidden_size, longest, bounded, targets, None, head
    )


def _config(name: str) -> Any:
    published = {
        **dict.fromkeys(GPT3, GPT2Config),
        **{size: kind for kind in (GPT2Config, *_ENCODERS) for size in kind.sizes},
    }
    if name in GPT3:
        return GPT2Config(**GPT3[name])
    if name in published:
        return published[name].named(name)
    file = Path(name) / "config.json"
    if not file.is_file():
        raise ValueError(
            f"`MODEL` is {name!r}, neither a published size nor a directory with a "
            f"config.json{nearest(name, published)} (published: {', '.join(published)})."
        )
    return _from_json(file)


def _from_json(file: Path) -> Any:
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"`{file}` is not valid JSON: {error}") from error
    kinds: dict[str, Any] = {
        "gpt2": GPT2Config,
        "bert": BertConfig,
        "roberta": RobertaConfig,
        "deberta-v2": DebertaV2Config,
    }
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind not in kinds:
        raise ValueError(
            f"`model_type` in `{file}` is {kind!r}, and must be one of {', '.join(kinds)}: other models are "
            "not known here."
        )
    return kinds[kind].from_hf(content)
