"""What the configurations of the family have in common, and what they say to the one model."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from .._config import IDLE, LabelledConfig, numbered_labels
from .._rope import Rope


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
class BiasedConfig(FamilyConfig):
    """All four projections of attention have a bias, or none has."""

    attention_bias: bool = False

    @property
    def input_bias(self) -> bool:
        return self.attention_bias

    @property
    def output_bias(self) -> bool:
        return self.attention_bias


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
