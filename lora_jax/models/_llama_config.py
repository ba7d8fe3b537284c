"""The configurations of the Llama family: one class for each `model_type`, and what they say to one model."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from ._config import IDLE, LabelledConfig, numbered_labels
from ._rope import Rope


@dataclasses.dataclass(frozen=True)
class FamilyConfig(LabelledConfig):
    """What all of the family have. The defaults are Llama's.

    `rope` stands for `rope_theta` and `rope_scaling`, and for `rope_parameters`, which newer files have
    instead. `num_key_value_heads` and `head_dim` are filled in where they are None. `pad_token_id` takes part
    in the computation with a head of classes only, the other token ids never.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope: Rope = Rope()
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | tuple | None = 2
    pad_token_id: int | None = None
    labels: tuple[str, ...] = numbered_labels(2)

    idle: ClassVar = IDLE | frozenset(
        "pretraining_tp is_llama_config cache_implementation transformers.js_config".split()
    )
    default_theta: ClassVar[float] = 10_000.0

    # What distinguishes the families that share the model.
    norms_heads: ClassVar[bool] = False  # queries and keys are normalised, head by head
    gemma: ClassVar[bool] = False  # scales of norms count from 1, inputs are scaled, four norms a layer

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_activation("hidden_act")
        self.check_positive(
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
        )
        self.check_positive("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps")
        heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % heads:
                raise ValueError(
                    f"`hidden_size` is {self.hidden_size}; it must be a multiple of "
                    f"`num_attention_heads`={heads}, or `head_dim` must say how wide a head is."
                )
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", heads)
        if heads % self.kv_heads:
            raise ValueError(
                f"`num_attention_heads` is {heads}; it must be a multiple of "
                f"`num_key_value_heads`={self.kv_heads}."
            )
        if self.head_width % 2:
            raise ValueError(
                f"`head_dim` is {self.head_dim}; rotary positions turn pairs, so that it must be even."
            )

    @classmethod
    def translated(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        config = super().translated(config)
        theta, scaling = config.pop("rope_theta", None), config.pop("rope_scaling", None)
        parameters = config.pop("rope_parameters", None)
        settings = scaling or parameters or {}
        if any(isinstance(value, Mapping) for value in settings.values()):
            raise ValueError(
                f"`rope_parameters` is {settings!r} in config.json, which differs between layers; "
                f"{cls.family} has one setting for all of them."
            )
        config["rope"] = Rope.from_hf(settings, cls.default_theta if theta is None else theta)
        return config

    def to_hf(self) -> dict[str, Any]:
        fields = super().to_hf()
        fields |= {"rope_theta": self.rope.theta, "rope_scaling": self.rope.to_hf()}
        del fields["rope"]
        if self.labels == numbered_labels(2):  # what Hugging Face takes where nothing is said
            del fields["id2label"], fields["label2id"]
        return fields

    @property
    def positions(self) -> int:
        """How many positions the model was made for. It takes more."""
        return self.max_position_embeddings

    @property
    def head_width(self) -> int:
        assert self.head_dim is not None  # filled in
        return self.head_dim

    @property
    def kv_heads(self) -> int:
        assert self.num_key_value_heads is not None  # filled in
        return self.num_key_value_heads

    @property
    def input_bias(self) -> bool:
        """Whether the projections to queries, keys and values have a bias."""
        return False

    @property
    def output_bias(self) -> bool:
        """Whether the projection out of attention has one."""
        return False

    @property
    def inner_bias(self) -> bool:
        """Whether the projections of the MLP have one."""
        return False

    @property
    def attention_scale(self) -> float:
        return self.head_width**-0.5

    @property
    def attention_cap(self) -> float | None:
        """Attention scores are squeezed below it, by c · tanh(x / c)."""
        return None

    @property
    def logit_cap(self) -> float | None:
        """The language model's logits are squeezed below it."""
        return None

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many tokens each layer looks back on, itself among them; None: on all."""
        return (None,) * self.num_hidden_layers

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The rotary positions of all layers, or those of layers with a window and then of the others."""
        return (self.rope,)


@dataclasses.dataclass(frozen=True)
class LlamaConfig(FamilyConfig):
    """Sizes and choices of a Llama 1 to 3 or a SmolLM2, under the names and with the defaults of Hugging
    Face's `config.json`, but for `rope`.

    ```python
    LlamaConfig.named("llama-3-8b")
    LlamaConfig.named("smollm2-135m", attention_dropout=0.1)
    LlamaConfig.from_hf(json.loads(text))  # what a config.json says, or an error that names the key
    ```

    Raises:
      ValueError: a value out of range.
      TypeError: a value of the wrong type.
    """

    attention_bias: bool = False
    mlp_bias: bool = False

    family: ClassVar = "Llama"
    sizes: ClassVar = {
        "llama-7b": dict(),
        "llama-2-7b": dict(max_position_embeddings=4096, rms_norm_eps=1e-5),
        "llama-3-8b": dict(
            vocab_size=128256,
            intermediate_size=14336,
            num_key_value_heads=8,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope=Rope(500_000.0),
            bos_token_id=128000,
            eos_token_id=128001,
        ),
        "llama-3-70b": dict(
            vocab_size=128256,
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope=Rope(500_000.0),
            bos_token_id=128000,
            eos_token_id=128001,
        ),
        "smollm2-135m": dict(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope=Rope(100_000.0),
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        ),
    }

    @property
    def input_bias(self) -> bool:
        return self.attention_bias

    @property
    def output_bias(self) -> bool:
        return self.attention_bias

    @property
    def inner_bias(self) -> bool:
        return self.mlp_bias


@dataclasses.dataclass(frozen=True)
class MistralConfig(FamilyConfig):
    """Sizes and choices of a Mistral. All of its layers look back on `sliding_window` tokens; None: on all.

    ```python
    MistralConfig.named("mistral-7b")
    ```
    """

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096

    family: ClassVar = "Mistral"
    sizes: ClassVar = {"mistral-7b": dict(max_position_embeddings=32768, rms_norm_eps=1e-5)}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("sliding_window")

    @property
    def windows(self) -> tuple[int | None, ...]:
        return (self.sliding_window,) * self.num_hidden_layers


@dataclasses.dataclass(frozen=True)
class LayeredConfig(FamilyConfig):
    """Layers of two kinds: "sliding_attention" looks back on `sliding_window` tokens, "full_attention" on
    all.
    """

    sliding_window: int | None = 4096
    layer_types: tuple | None = None  # None: as the family has it

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("sliding_window")
        if self.layer_types is None:
            object.__setattr__(self, "layer_types", self.usual_types())
        types = self.layer_types or ()
        if set(types) - {"sliding_attention", "full_attention"} or len(types) != self.num_hidden_layers:
            raise ValueError(
                f"`layer_types` is {types!r}; it must be 'sliding_attention' or 'full_attention' for each of "
                f"the {self.num_hidden_layers} layers."
            )
        if "sliding_attention" in types and self.window is None:
            raise ValueError(
                "`layer_types` has 'sliding_attention', and there is no window: set `sliding_window`, and "
                "`use_sliding_window` where the family has it."
            )

    @property
    def window(self) -> int | None:
        return self.sliding_window

    @abc.abstractmethod
    def usual_types(self) -> tuple[str, ...]:
        """The kinds of the layers where a file does not name them."""

    @property
    def windows(self) -> tuple[int | None, ...]:
        assert self.layer_types is not None  # filled in
        return tuple(self.window if kind == "sliding_attention" else None for kind in self.layer_types)


@dataclasses.dataclass(frozen=True)
class Qwen2Config(LayeredConfig):
    """Sizes and choices of a Qwen2 or Qwen2.5. Queries, keys and values have a bias. With
    `use_sliding_window`, the layers from `max_window_layers` on have a window.

    ```python
    Qwen2Config.named("qwen2.5-7b")
    ```
    """

    vocab_size: int = 151936
    intermediate_size: int = 22016
    max_position_embeddings: int = 32768
    num_key_value_heads: int | None = 32
    bos_token_id: int | None = None
    eos_token_id: int | tuple | None = None
    use_sliding_window: bool = False
    max_window_layers: int = 28

    family: ClassVar = "Qwen2"
    sizes: ClassVar = {
        "qwen2.5-0.5b": dict(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            rope=Rope(1_000_000.0),
            tie_word_embeddings=True,
        ),
        "qwen2.5-7b": dict(
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            max_position_embeddings=131072,
            rope=Rope(1_000_000.0),
        ),
    }

    @property
    def input_bias(self) -> bool:
        return True

    @property
    def window(self) -> int | None:
        return self.sliding_window if self.use_sliding_window else None

    def usual_types(self) -> tuple[str, ...]:
        full = self.num_hidden_layers if self.window is None else self.max_window_layers
        return tuple(
            "full_attention" if i < full else "sliding_attention" for i in range(self.num_hidden_layers)
        )


@dataclasses.dataclass(frozen=True)
class Qwen3Config(Qwen2Config):
    """Sizes and choices of a dense Qwen3. Queries and keys are normalised, head by head.

    ```python
    Qwen3Config.named("qwen3-0.6b")
    ```
    """

    head_dim: int | None = 128
    attention_bias: bool = False

    family: ClassVar = "Qwen3"
    sizes: ClassVar = {
        "qwen3-0.6b": dict(
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            max_position_embeddings=40960,
            rope=Rope(1_000_000.0),
            tie_word_embeddings=True,
        )
    }
    norms_heads: ClassVar = True

    @property
    def input_bias(self) -> bool:
        return self.attention_bias

    @property
    def output_bias(self) -> bool:
        return self.attention_bias


@dataclasses.dataclass(frozen=True)
class Gemma2Config(LayeredConfig):
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
    attention_bias: bool = False
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
    def input_bias(self) -> bool:
        return self.attention_bias

    @property
    def output_bias(self) -> bool:
        return self.attention_bias

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
