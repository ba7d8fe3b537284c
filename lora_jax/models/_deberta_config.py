"""The configuration of DeBERTa-v2 and v3, which are one architecture."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from ._encoder import EncoderConfig


_COMMON = dict(
    max_relative_positions=-1,
    norm_rel_ebd=("layer_norm",),
    pos_att_type=("p2c", "c2p"),
    position_biased_input=False,
    position_buckets=256,
    relative_attention=True,
    share_att_key=True,
)
_V2 = dict(_COMMON, conv_act="gelu", conv_kernel_size=3)
_V3 = dict(_COMMON, hidden_size=768, num_attention_heads=12, intermediate_size=3072, legacy=False)


@dataclasses.dataclass(frozen=True)
class DebertaV2Config(EncoderConfig):
    """Sizes and choices of a DeBERTa-v2 or v3, under the names and with the defaults of Hugging Face's
    `config.json`.

    ```python
    DebertaV2Config.named("deberta-v2-xxlarge")  # 48 layers of width 1,536 (He et al. 2021)
    DebertaV2Config.named("deberta-v3-base", labels=("no", "maybe", "yes"))
    DebertaV2Config.from_hf(json.loads(text))                           # what a config.json says
    ```

    With `relative_attention` the scores depend on distances, by the terms in `pos_att_type`: "c2p", content
    to position, and "p2c", position to content. Distances are exact up to half of `position_buckets`, and
    logarithmic beyond; a value below 1 makes all exact. Distances from `max_relative_positions` on count as
    one; a value below 1 stands for `max_position_embeddings`. With `share_att_key` content and position use
    the same projections. `conv_kernel_size` is that of the convolution beside the first layer, 0 for none.
    With `legacy` the masked-LM head is that of `transformers`' first version; False is the authors'.

    Raises:
      ValueError: a value out of range, or values that do not fit each other.
      TypeError: a value of the wrong type.
    """

    vocab_size: int = 128100
    hidden_size: int = 1536
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    intermediate_size: int = 6144
    embedding_size: int | None = None  # None: hidden_size
    cls_dropout: float | None = None  # None: hidden_dropout_prob
    type_vocab_size: int = 0
    layer_norm_eps: float = 1e-7
    relative_attention: bool = False
    max_relative_positions: int = -1
    position_buckets: int = -1
    norm_rel_ebd: tuple[str, ...] = ("none",)
    share_att_key: bool = False
    pos_att_type: tuple[str, ...] = ()
    position_biased_input: bool = True
    conv_kernel_size: int = 0
    conv_act: str = "tanh"
    conv_groups: int = 1
    pooler_dropout: float = 0.0
    pooler_hidden_act: str = "gelu"
    legacy: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | tuple | None = None

    family: ClassVar = "DeBERTa-v2"
    sizes: ClassVar = {
        "deberta-v2-xlarge": _V2,
        "deberta-v2-xxlarge": dict(_V2, num_hidden_layers=48),
        "deberta-v3-xsmall": dict(
            _V3, hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536
        ),
        "deberta-v3-small": dict(_V3, num_hidden_layers=6),
        "deberta-v3-base": dict(_V3, num_hidden_layers=12),
        "deberta-v3-large": dict(
            _V3, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
        ),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("embedding_size", "conv_groups")
        self.check_activation("hidden_act", "conv_act", "pooler_hidden_act")
        _check_words("pos_att_type", self.pos_att_type, ("c2p", "p2c"))
        _check_words("norm_rel_ebd", self.norm_rel_ebd, ("none", "layer_norm"))
        if self.type_vocab_size < 0:
            raise ValueError(f"`type_vocab_size` is {self.type_vocab_size}; it must not be negative.")
        if self.conv_kernel_size < 0 or (self.conv_kernel_size and self.conv_kernel_size % 2 == 0):
            raise ValueError(
                f"`conv_kernel_size` is {self.conv_kernel_size}; it must be odd, for as many outputs as "
                "inputs, or 0, for no convolution."
            )
        if self.hidden_size % self.conv_groups:
            raise ValueError(
                f"`conv_groups` is {self.conv_groups}; it must divide `hidden_size`={self.hidden_size}."
            )
        if self.position_buckets == 1:
            raise ValueError("`position_buckets` is 1; it must be at least 2, or below 1 for none.")
        if self.position_buckets > 1 and self.furthest - 1 <= self.position_buckets // 2:
            raise ValueError(
                f"`position_buckets` is {self.position_buckets}; it must be less than twice the largest "
                f"distance, {self.furthest - 1}."
            )
        if not self.legacy and self.embedding_width != self.hidden_size:
            raise ValueError(
                "`legacy` is False, which decodes by the embedding, and needs an `embedding_size` that is "
                "`hidden_size`."
            )

    @property
    def positions(self) -> int | None:
        return self.max_position_embeddings if self.position_biased_input else None

    @property
    def furthest(self) -> int:
        """The distance from which on all distances count as one."""
        return (
            self.max_relative_positions if self.max_relative_positions >= 1 else self.max_position_embeddings
        )

    @property
    def span(self) -> int:
        """The rows of the relative embedding to each side of distance 0."""
        return self.position_buckets if self.position_buckets > 0 else self.furthest

    @property
    def embedding_width(self) -> int:
        return self.embedding_size or self.hidden_size

    @classmethod
    def translated(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        config = super().translated(config)
        for name in ("pos_att_type", "norm_rel_ebd"):
            if isinstance(value := config.get(name, ()), str):
                config[name] = [word.strip() for word in value.lower().split("|")]
            elif value is None:
                del config[name]
        # Sizes that follow from the width in all published models.
        width, heads = (
            config.get("hidden_size", cls.hidden_size),
            config.get("num_attention_heads", cls.num_attention_heads),
        )
        for name, value in (("attention_head_size", width / heads), ("pooler_hidden_size", width)):
            if config.pop(name, value) != value:
                raise ValueError(
                    f"`{name}` in config.json is not supported for {cls.family} unless it is {value:g}, as "
                    "`hidden_size` has it."
                )
        if config.pop("z_steps", 0) > 1:
            raise ValueError(f"`z_steps` in config.json is not supported for {cls.family} above 1.")
        return config

    def to_hf(self) -> dict[str, Any]:
        fields = super().to_hf()
        fields["norm_rel_ebd"] = "|".join(self.norm_rel_ebd)
        if self.embedding_size is None:  # because readers take whatever is there for a number
            del fields["embedding_size"]
        return fields


def _check_words(name: str, words: tuple[str, ...], known: tuple[str, ...]) -> None:
    strangers = [word for word in words if word not in known]
    if strangers:
        raise ValueError(f"`{name}` has {strangers[0]!r}; known are {', '.join(known)}.")
