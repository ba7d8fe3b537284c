"""What BERT and RoBERTa share: the configuration, the embeddings, of absolute positions, the layers and the
pooler. Letters as in `_layers.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ._encoder import check_token_types, EncoderConfig, EncoderLayer, EncoderPart, Residual
from ._layers import attention, Options, repeated


@dataclasses.dataclass(frozen=True)
class BertLayersConfig(EncoderConfig):
    """What the two configurations have in common. Each model gives its own vocabulary and token ids."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    classifier_dropout: float | None = None  # None: hidden_dropout_prob

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("type_vocab_size")
        self.check_activation("hidden_act")

    @property
    def head_dropout(self) -> float:
        """The rate before the last layer of a classifier."""
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout

    @classmethod
    def translated(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        config = super().translated(config)
        kind = config.pop("position_embedding_type", "absolute")
        if kind != "absolute":
            raise ValueError(
                f"`position_embedding_type` is {kind!r} in config.json, which is not supported for "
                f"{cls.family}: only 'absolute' is; load a model that was trained with it."
            )
        return config


class Embeddings(EncoderPart):
    @nn.compact
    def __call__(self, input_ids, token_type_ids, position_ids):
        config = self.config
        words = self.embed(config.vocab_size, config.hidden_size, "word_embeddings")
        types = self.embed(config.type_vocab_size, config.hidden_size, "token_type_embeddings")
        positions = self.embed(config.max_position_embeddings, config.hidden_size, "position_embeddings")
        x_BxTxD = words(input_ids) + types(token_type_ids) + positions(position_ids)
        x_BxTxD = self.norm("LayerNorm")(x_BxTxD)
        return self.drop(config.hidden_dropout_prob, x_BxTxD), words.embedding


class SelfAttention(EncoderPart):
    @nn.compact
    def __call__(self, x_BxTxD, mask_Bx1xTxS):
        batch, tokens, width = x_BxTxD.shape
        heads = self.config.num_attention_heads
        q_BxTxHxK, k_BxSxHxK, v_BxSxHxK = (
            self.dense(width, name)(x_BxTxD).reshape(batch, tokens, heads, width // heads)
            for name in ("query", "key", "value")
        )
        y_BxTxHxK = attention(
            q_BxTxHxK,
            k_BxSxHxK,
            v_BxSxHxK,
            mask_Bx1xTxS=mask_Bx1xTxS,
            scale=(width // heads) ** -0.5,
            dropout=self.random(self.config.attention_probs_dropout_prob),
            implementation=self.implementation,
            recompute=self.recompute,
        )
        return y_BxTxHxK.reshape(batch, tokens, width)


class Attention(EncoderPart):
    @nn.compact
    def __call__(self, x_BxTxD, mask_Bx1xTxS):
        y_BxTxD = SelfAttention(*self.options(), name="self")(x_BxTxD, mask_Bx1xTxS)
        return Residual(*self.options(), name="output")(y_BxTxD, x_BxTxD)


class Layer(EncoderLayer):
    """One layer, with the arguments and results of `repeated`; its number and slots are not used."""

    @nn.compact
    def __call__(self, x_BxTxD, number, slots, mask_Bx1xTxS):
        x_BxTxD = Attention(*self.options(), name="attention")(x_BxTxD, mask_Bx1xTxS)
        return self.feed_forward(x_BxTxD), slots


class Encoder(EncoderPart):
    scan: bool = False
    checkpoint: bool = False

    @nn.compact
    def __call__(self, x_BxTxD, mask_Bx1xTxS):
        count = self.config.num_hidden_layers
        layers = repeated(
            Layer, self.options(), count, scan=self.scan, checkpoint=self.checkpoint, shared=1, name="layer"
        )
        return layers(x_BxTxD, jnp.arange(count), None, mask_Bx1xTxS)[0]


class Pooler(EncoderPart):
    @nn.compact
    def __call__(self, x_BxTxD):
        return jnp.tanh(self.dense(self.config.hidden_size, "dense")(x_BxTxD[:, 0]))


def encoded(
    model,
    options: Options,
    input_ids,
    attention_mask,
    position_ids,
    token_type_ids,
):
    """The states of the last layer, and the embedding of words, inside the model's `__call__`."""
    check_token_types(token_type_ids, input_ids, model.config.type_vocab_size)
    if token_type_ids is None:
        token_type_ids = jnp.zeros((1, 1), jnp.int32)
    mask_Bx1xTxS = None if attention_mask is None else (jnp.asarray(attention_mask) != 0)[:, None, None, :]
    x_BxTxD, embedding_VxD = Embeddings(*options, name="embeddings")(input_ids, token_type_ids, position_ids)
    x_BxTxD = Encoder(*options, model.scan, model.checkpoint, name="encoder")(x_BxTxD, mask_Bx1xTxS)
    return x_BxTxD, embedding_VxD
