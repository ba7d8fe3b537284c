"""What BERT, RoBERTa and DeBERTa share: BERT's layer (a norm after each residual), the names of the heads and
what ends in logits, and the configuration of encoders.

Letters beyond those of `_layers.py`: E width of the embedding, N labels.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from . import _rules
from ._config import LabelledConfig, numbered_labels as numbered_labels
from ._layers import accumulator, ACTIVATIONS, LayerNorm, Options, Part


HEADS = {
    "features": "(batch, time, width): no head, the states of the last layer",
    "masked_lm": "(batch, time, vocabulary)",
    "sequence_classification": "(batch, labels); one label is a regression",
    "token_classification": "(batch, time, labels)",
    "question_answering": "(batch, time, 2): start and end of the answer",
}
"""The heads of an encoder, and the shape of the result with each."""


@dataclasses.dataclass(frozen=True)
class EncoderConfig(LabelledConfig):
    """What the configurations of encoders have in common. Each model gives the sizes its own defaults."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    type_vocab_size: int
    layer_norm_eps: float
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    problem_type: str | None = None
    labels: tuple[str, ...] = numbered_labels(2)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive(
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"
        )
        self.check_positive("max_position_embeddings", "layer_norm_eps")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` is {self.hidden_size}; it must be a multiple of "
                f"`num_attention_heads`={self.num_attention_heads}."
            )

    @property
    def positions(self) -> int | None:
        """How many tokens a sequence may have. None: any number."""
        return self.max_position_embeddings


class EncoderModel(nn.Module):
    """The fields of an encoder with one of the heads of `HEADS`."""

    partition_rules = _rules.ENCODER

    config: Any
    head: str = "masked_lm"
    dtype: Any = None
    param_dtype: Any = jnp.float32
    scan: bool = False
    checkpoint: bool = False
    implementation: str | None = None

    def options(self, deterministic: bool) -> Options:
        """The fields of this model's parts."""
        return (
            *(self.config, self.dtype, self.param_dtype, deterministic),
            *(self.implementation, not self.checkpoint),
        )


class EncoderPart(Part):
    def norm(self, name):
        return LayerNorm(self.config.layer_norm_eps, self.dtype, self.param_dtype, name=name)

    def activation(self, x):
        return ACTIVATIONS[self.config.hidden_act](x)


class Dense(EncoderPart):
    """A dense layer in a module of its own, because Hugging Face's names have one: `intermediate/dense`."""

    features: int = 0

    @nn.compact
    def __call__(self, x):
        return self.dense(self.features, "dense")(x)


class Residual(EncoderPart):
    """LayerNorm(residual + dropout(dense(x))), the end of both halves of a layer; of the second half, x goes
    through the activation first.
    """

    @nn.compact
    def __call__(self, x_BxTxF, residual_BxTxD, activated=False):
        width = self.config.hidden_size
        dense = self.dense_of(self.activation, width, "dense") if activated else self.dense(width, "dense")
        x_BxTxD = dense(x_BxTxF)
        x_BxTxD = self.drop(self.config.hidden_dropout_prob, x_BxTxD)
        return self.norm("LayerNorm")(residual_BxTxD + x_BxTxD)


class EncoderLayer(EncoderPart):
    """A layer's second half, the same in all of them. It is a method, because its two modules have no parent
    of their own in Hugging Face's names.
    """

    def feed_forward(self, x_BxTxD):
        h_BxTxF = Dense(*self.options(), self.config.intermediate_size, name="intermediate")(x_BxTxD)
        return Residual(*self.options(), name="output")(h_BxTxF, x_BxTxD, activated=True)


class Logits(Part):
    """A dense layer, `kernel` and `bias`, whose result is accumulated and left in float32 or wider."""

    features: int = 0

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.normal(), (x.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
        return contracted(x, kernel, ((x.ndim - 1,), (0,)), bias)


def contracted(x, kernel, axes, bias):
    wide = accumulator(x.dtype)
    y = jax.lax.dot_general(x, kernel, (axes, ((), ())), preferred_element_type=wide)
    return y + bias.astype(wide).reshape((1,) * (y.ndim - 1) + (-1,))


class Decoder(Part):
    """The last step of a masked-LM head: logits by the embedding, or by a kernel of its own, plus a bias. The
    head, which has the bias as a parameter, passes it.
    """

    @nn.compact
    def __call__(self, x_BxTxE, embedding_VxE, bias_V):
        if embedding_VxE is None:
            kernel_ExV = self.param(
                "kernel", self.normal(), (x_BxTxE.shape[-1], bias_V.shape[0]), self.param_dtype
            )
            x_BxTxE, kernel_ExV = nn.dtypes.promote_dtype(x_BxTxE, kernel_ExV, dtype=self.dtype)
            return contracted(x_BxTxE, kernel_ExV, ((2,), (0,)), bias_V)
        x_BxTxE, embedding_VxE = nn.dtypes.promote_dtype(x_BxTxE, embedding_VxE, dtype=self.dtype)
        return contracted(x_BxTxE, embedding_VxE, ((2,), (1,)), bias_V)


class Transform(EncoderPart):
    features: int = 0

    @nn.compact
    def __call__(self, x_BxTxD):
        return self.norm("LayerNorm")(self.activation(self.dense(self.features, "dense")(x_BxTxD)))


class Predictions(EncoderPart):
    @nn.compact
    def __call__(self, x_BxTxD, embedding_VxE):
        bias_V = self.param("bias", nn.initializers.zeros, (self.config.vocab_size,), self.param_dtype)
        x_BxTxE = Transform(*self.options(), embedding_VxE.shape[1], name="transform")(x_BxTxD)
        tied = embedding_VxE if self.config.tie_word_embeddings else None
        return Decoder(*self.options(), name="decoder")(x_BxTxE, tied, bias_V)


class MaskedLMHead(EncoderPart):
    """BERT's, which is also DeBERTa's with `legacy`. RoBERTa's has other names and an activation of its
    own.
    """

    @nn.compact
    def __call__(self, x_BxTxD, embedding_VxE):
        return Predictions(*self.options(), name="predictions")(x_BxTxD, embedding_VxE)


def check_head(head: str, config: EncoderConfig) -> None:
    if head not in HEADS:
        raise ValueError(f"`head` is {head!r}; it must be one of {list(HEADS)}.")
    if head == "question_answering" and config.num_labels != 2:
        raise ValueError(
            "`head` is 'question_answering', which has two outputs, start and end, and `labels` are "
            f"{config.num_labels}; name two labels."
        )


def check_token_types(token_type_ids: Any, input_ids: Any, count: int) -> None:
    if token_type_ids is None:
        return
    if count == 0:
        raise ValueError(
            "`token_type_ids` were given to a model without token types (`type_vocab_size`=0); leave them "
            "out."
        )
    if jnp.shape(token_type_ids) != jnp.shape(input_ids):
        raise ValueError(
            f"`token_type_ids` must have the shape of `input_ids`, {jnp.shape(input_ids)}, got "
            f"{jnp.shape(token_type_ids)}."
        )
