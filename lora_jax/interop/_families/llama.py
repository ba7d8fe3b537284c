"""The Llama family: the names of its tensors and classes. Its members differ in the classes only."""

import re

from ...models.llama import (
    FamilyConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Llama,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from .family import Family


def _family(config: type[FamilyConfig], causal: str, bare: str, labelled: str) -> Family:
    return Family(
        model=Llama,
        config=config,
        heads={causal: None, bare: None, labelled: "sequence_classification"},
        layers="num_hidden_layers",
        prefix="model.",
        embedding="model.embed_tokens.weight",
        decoder="lm_head.weight",
        aliases={},
        fused={},
        uncalled={},
        leftovers=re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
        table=_TABLE,
    )


_WEIGHTS = [f"self_attn.{name}_proj" for name in "qkvo"] + [
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
]
_NORMS = (
    *(f"{place}_layernorm" for place in ("input", "post_attention", "pre_feedforward", "post_feedforward")),
    *(f"self_attn.{name}_norm" for name in "qk"),
)


def _row(name: str, last: str, ours: str) -> str:
    path = name.replace(".", "/")
    return f"model.layers.{{}}.{name}.{last} layers/{{}}/{path}/{ours}"


_TABLE = "\n".join(
    [
        "model.embed_tokens.weight embed_tokens/embedding",
        *(_row(name, "weight", "kernel *") for name in _WEIGHTS),
        *(_row(name, "bias", "bias") for name in _WEIGHTS),
        *(_row(name, "weight", "scale") for name in _NORMS),
        "model.norm.weight norm/scale",
        "lm_head.weight lm_head/kernel *",
        "score.weight score/kernel *",
    ]
)


def _usual(config: type[FamilyConfig], name: str) -> Family:
    return _family(config, f"{name}ForCausalLM", f"{name}Model", f"{name}ForSequenceClassification")


FAMILIES = {
    "llama": _usual(LlamaConfig, "Llama"),
    "mistral": _usual(MistralConfig, "Mistral"),
    "qwen2": _usual(Qwen2Config, "Qwen2"),
    "qwen3": _usual(Qwen3Config, "Qwen3"),
    "gemma2": _usual(Gemma2Config, "Gemma2"),
    "gemma3_text": _family(
        Gemma3TextConfig, "Gemma3ForCausalLM", "Gemma3TextModel", "Gemma3TextForSequenceClassification"
    ),
}
