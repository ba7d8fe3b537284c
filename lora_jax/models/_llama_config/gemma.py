"""The configurations of Gemma 2 and of the text model of Gemma 3."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from .._rope import Rope
from .family import BiasedConfig, LayeredConfig


@dataclasses.dataclass(frozen=True)
class Gemma2Config(BiasedConfig, LayeredConfig):
    """Sizes and choices of a Gemma 2. Every other layer has a window, from the first on. `hidden_act` is
    Hugging Face's `hidden_activation`.

    ```python
    Gemma2Config.named("gemma-2-2b")
    ```
    """

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 4
    head_dim: int | None = 256
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 2
    eos_token_id: int | tuple | None = 1
    pad_token_id: int | None = 0
    query_pre_attn_scalar: float = 256
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0

    family: ClassVar = "Gemma 2"
    sizes: ClassVar = {"gemma-2-2b": dict()}
    gemma: ClassVar = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")

    @classmethod
    def translated(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        config = super().translated(config)
        config.pop("hidden_act", None)  # old files have it, and nothing reads it
        if config.get("hidden_activation") is not None:
            config["hidden_act"] = config["hidden_activation"]
        config.pop("hidden_activation", None)
        return config

    def to_hf(self) -> dict[str, Any]:
        fields = super().to_hf()
        return {**fields, "hidden_activation": fields.pop("hidden_act")}

    def usual_types(self) -> tuple[str, ...]:
        return tuple(
            "full_attention" if i % 2 else "sliding_attention" for i in range(self.num_hidden_layers)
        )

    @property
    def attention_scale(self) -> float:
        return self.query_pre_attn_scalar**-0.5

    @property
    def attention_cap(self) -> float | None:
        return self.attn_logit_softcapping

    @property
    def logit_cap(self) -> float | None:
        return self.final_logit_softcapping


@dataclasses.dataclass(frozen=True)
class Gemma3TextConfig(Gemma2Config):
    """Sizes and choices of the text model of a Gemma 3. Every sixth layer looks back on all tokens. `rope` is
    of these layers, and `local_rope` of those with a window (`rope_local_base_freq`).

    ```python
    Gemma3TextConfig.named("gemma-3-1b")
    ```
    """

    vocab_size: int = 262208
    max_position_embeddings: int = 131072
    rope: Rope = Rope(1_000_000.0)
    local_rope: Rope = Rope(10_000.0)
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None

    family: ClassVar = "Gemma 3"
    sizes: ClassVar = {
        "gemma-3-1b": dict(
            vocab_size=262144,
            hidden_size=1152,
            intermediate_size=6912,
            num_attention_heads=4,
            num_key_value_heads=1,
            max_position_embeddings=32768,
            sliding_window=512,
        )
    }
    default_theta: ClassVar = 1_000_000.0
    norms_heads: ClassVar = True

    @classmethod
    def translated(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        config = dict(config)
        every = config.pop("sliding_window_pattern", None) or config.pop("_sliding_window_pattern", None)
        if every and config.get("layer_types") is None:
            count = config.get("num_hidden_layers", cls.num_hidden_layers)
            config["layer_types"] = [
                "sliding_attention" if (i + 1) % every else "full_attention" for i in range(count)
            ]
        local = config.pop("rope_local_base_freq", None)
        both = config.get("rope_parameters") or {}
        if "sliding_attention" in both or "full_attention" in both:
            config["rope_parameters"] = both.get("full_attention") or {}
            both = both.get("sliding_attention") or {}
        else:
            both = {}
        config = super().translated(config)
        config["local_rope"] = Rope.from_hf(both, 10_000.0 if local is None else local)
        return config

    def to_hf(self) -> dict[str, Any]:
        if self.local_rope.kind != "default":
            raise ValueError(
                f"`local_rope` is {self.local_rope}; Hugging Face's files scale the other layers only."
            )
        fields = super().to_hf()
        del fields["local_rope"]
        return {**fields, "rope_local_base_freq": self.local_rope.theta}

    def usual_types(self) -> tuple[str, ...]:
        return tuple(
            "sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(self.num_hidden_layers)
        )

    @property
    def attention_cap(self) -> float | None:
        return None  # `transformers` reads the key and does not use it

    @property
    def ropes(self) -> tuple[Rope, ...]:
        return self.local_rope, self.rope
