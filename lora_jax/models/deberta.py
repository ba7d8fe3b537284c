"""DeBERTa-v2 and v3 (He et al., ICLR 2021; v3: 2023) in Flax linen, equal to `transformers`' PyTorch classes,
with their heads.

Parameter names follow Hugging Face without the prefix `deberta`, with Flax's words for the leaves:
`encoder/layer/0/attention/self/query_proj/kernel`, `encoder/rel_embeddings/embedding`. With `scan` the layers
are stacked, as `stack_layers(params, "encoder/layer")` stacks them. The modules know nothing of LoRA.

Left out: multiple choice, a mask per query, output of attention weights. Letter beyond those of `_layers.py`:
R rows of the relative embedding, two sides of `span` each.
"""

import flax.linen as nn
import jax.numpy as jnp

from ._deberta_config import DebertaV2Config as DebertaV2Config
from ._disentangled import distance_rows, SelfAttention
from ._encoder import (
    check_head,
    check_token_types,
    Decoder,
    EncoderLayer,
    EncoderModel,
    EncoderPart,
    Logits,
    MaskedLMHead,
    Residual,
)
from ._layers import ACTIVATIONS, check_inputs, layer_norm, LayerNorm, repeated


class Embeddings(EncoderPart):
    @nn.compact
    def __call__(self, input_ids, token_type_ids, position_ids, mask_BxT):
        config = self.config
        words = self.embed(config.vocab_size, config.embedding_width, "word_embeddings")
        x_BxTxD = words(input_ids)
        if config.position_biased_input:
            x_BxTxD = x_BxTxD + self.embed(
                config.max_position_embeddings, config.embedding_width, "position_embeddings"
            )(position_ids)
        if config.type_vocab_size:
            x_BxTxD = x_BxTxD + self.embed(
                config.type_vocab_size, config.embedding_width, "token_type_embeddings"
            )(token_type_ids)
        if config.embedding_width != config.hidden_size:
            x_BxTxD = self.dense(config.hidden_size, "embed_proj", use_bias=False)(x_BxTxD)
        x_BxTxD = _zero_padding(self.norm("LayerNorm")(x_BxTxD), mask_BxT)
        return self.drop(config.hidden_dropout_prob, x_BxTxD), words.embedding


class Attention(EncoderPart):
    @nn.compact
    def __call__(self, x_BxTxD, *shared):
        y_BxTxD = SelfAttention(*self.options(), name="self")(x_BxTxD, *shared)
        return Residual(*self.options(), name="output")(y_BxTxD, x_BxTxD)


class Layer(EncoderLayer):
    """One layer, with the arguments and results of `repeated`; its slots are not used."""

    @nn.compact
    def __call__(self, x_BxTxD, number, slots, joined, mask_Bx1xTxT, distances_RxD, rows_TxT):
        x_BxTxD = Attention(*self.options(), name="attention")(x_BxTxD, mask_Bx1xTxT, distances_RxD, rows_TxT)
        x_BxTxD = self.feed_forward(x_BxTxD)
        if joined is not None:
            # Every layer computes this and only the first uses it, so that `scan` has one layer to trace.
            y_BxTxD, scale_D, bias_D, mask_BxT = joined
            y_BxTxD = layer_norm(
                x_BxTxD + y_BxTxD, scale_D, bias_D, self.config.layer_norm_eps, x_BxTxD.dtype
            )
            x_BxTxD = jnp.where(number == 0, _zero_padding(y_BxTxD, mask_BxT), x_BxTxD)
        return x_BxTxD, slots


class Convolution(EncoderPart):
    """The convolution beside the first layer, with the same input. It returns act(conv(x)), and the scale and
    bias of the norm that the first layer applies to the sum with its own result.
    """

    @nn.compact
    def __call__(self, x_BxTxD, mask_BxT):
        config = self.config
        convolve = nn.Conv(
            config.hidden_size,
            (config.conv_kernel_size,),
            padding=config.conv_kernel_size // 2,
            feature_group_count=config.conv_groups,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.normal(),
            name="conv",
        )
        y_BxTxD = self.drop(config.hidden_dropout_prob, _zero_padding(convolve(x_BxTxD), mask_BxT))
        scale_D, bias_D = LayerNorm(
            config.layer_norm_eps, self.dtype, self.param_dtype, name="LayerNorm"
        ).affine(x_BxTxD.shape[-1])
        return ACTIVATIONS[config.conv_act](y_BxTxD), scale_D, bias_D, mask_BxT


class Encoder(EncoderPart):
    scan: bool = False
    checkpoint: bool = False

    @nn.compact
    def __call__(self, x_BxTxD, mask_BxT):
        config = self.config
        distances_RxD = rows_TxT = joined = mask_Bx1xTxT = None
        if config.relative_attention:
            distances_RxD = self.embed(2 * config.span, config.hidden_size, "rel_embeddings").embedding
            rows_TxT = jnp.asarray(distance_rows(config, x_BxTxD.shape[1]))
        if "layer_norm" in config.norm_rel_ebd:
            norm = self.norm("LayerNorm")
            # The norm's parameters belong to the model even if there is nothing to normalise.
            distances_RxD = norm(
                distances_RxD
                if config.relative_attention
                else jnp.zeros((1, config.hidden_size), x_BxTxD.dtype)
            )
        if config.conv_kernel_size:
            joined = Convolution(*self.options(), name="conv")(x_BxTxD, mask_BxT)
        if mask_BxT is not None:
            mask_Bx1xTxT = (mask_BxT[:, :, None] & mask_BxT[:, None, :])[:, None]
        count = config.num_hidden_layers
        layers = repeated(
            Layer, self.options(), count, scan=self.scan, checkpoint=self.checkpoint, shared=4, name="layer"
        )
        return layers(x_BxTxD, jnp.arange(count), None, joined, mask_Bx1xTxT, distances_RxD, rows_TxT)[0]


def _zero_padding(x_BxTxD, mask_BxT):
    return (
        x_BxTxD if mask_BxT is None else jnp.where(mask_BxT[..., None], x_BxTxD, jnp.zeros((), x_BxTxD.dtype))
    )


class Pooler(EncoderPart):
    """The state that is classified, from that of the first token, `[CLS]`."""

    @nn.compact
    def __call__(self, x_BxTxD):
        x_BxD = self.dense(self.config.hidden_size, "dense")(
            self.drop(self.config.pooler_dropout, x_BxTxD[:, 0])
        )
        return ACTIVATIONS[self.config.pooler_hidden_act](x_BxD)


class PredictionHead(EncoderPart):
    """The authors' head, which is always tied."""

    @nn.compact
    def __call__(self, x_BxTxD, embedding_VxD):
        bias_V = self.param("bias", nn.initializers.zeros, (self.config.vocab_size,), self.param_dtype)
        x_BxTxD = self.norm("LayerNorm")(
            self.activation(self.dense(self.config.hidden_size, "dense")(x_BxTxD))
        )
        return Decoder(*self.options(), name="decoder")(x_BxTxD, embedding_VxD, bias_V)


class Predictions(EncoderPart):
    @nn.compact
    def __call__(self, x_BxTxD, embedding_VxD):
        return PredictionHead(*self.options(), name="lm_head")(x_BxTxD, embedding_VxD)


class DebertaV2(EncoderModel):
    """DeBERTa-v2 or v3 with one of the heads of `transformers`.

    ```python
    config = DebertaV2Config.named("deberta-v3-base", labels=("no", "yes"))
    model = DebertaV2(config, head="sequence_classification")
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    logits = model.apply({"params": params}, input_ids, attention_mask)      # (batch, labels)
    ```

    **Call.** `input_ids` (B, T) integers; `attention_mask` (B, T) integers or booleans, 0 at padding on
    either side; `position_ids` (B, T) or (1, T), 0, 1, 2, … by default and used only with
    `position_biased_input`; `token_type_ids` (B, T), for a model that has token types. Returns float32 logits
    (float64 in a float64 model): masked_lm (B, T, V), sequence_classification (B, N), one label being a
    regression, token_classification (B, T, N), question_answering (B, T, 2), start and end. `head="features"`
    returns the states of the last layer (B, T, D), in the dtype of the computation. The model is in
    evaluation mode unless `deterministic=False`, which needs `rngs={"dropout": key}`.

    **Fields.** `scan`: one traced layer with stacked parameters, so that compile time does not grow with
    depth. `checkpoint`: each layer is recomputed in the backward pass. `dtype`, `param_dtype`: see
    `_layers.py`. `implementation`: of `jax.nn.dot_product_attention`, to which the terms of position are a
    bias: "xla" or "cudnn".

    Raises:
      ValueError: an argument of another shape; a sequence longer than a model with absolute positions
        (without them no length is too long); a `head` that does not exist.
      TypeError: an argument of another dtype.
    """

    config: DebertaV2Config

    @nn.compact
    def __call__(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        token_type_ids=None,
        *,
        deterministic: bool = True,
    ):
        config = self.config
        check_head(self.head, config)
        limit = config.positions
        check_inputs(
            input_ids,
            attention_mask,
            position_ids,
            limit=limit,
            limited_by=f"`max_position_embeddings`={limit}",
        )
        check_token_types(token_type_ids, input_ids, config.type_vocab_size)
        mask_BxT = None if attention_mask is None else jnp.asarray(attention_mask) != 0
        if position_ids is None:
            position_ids = jnp.arange(input_ids.shape[1])[None]
        if token_type_ids is None:
            token_type_ids = jnp.zeros((1, 1), jnp.int32)

        options = self.options(deterministic)
        x_BxTxD, embedding_VxE = Embeddings(*options, name="embeddings")(
            input_ids, token_type_ids, position_ids, mask_BxT
        )
        x_BxTxD = Encoder(*options, self.scan, self.checkpoint, name="encoder")(x_BxTxD, mask_BxT)

        if self.head == "features":
            return x_BxTxD
        if self.head == "masked_lm":
            head = (
                MaskedLMHead(*options, name="cls")
                if config.legacy
                else Predictions(*options, name="lm_predictions")
            )
            return head(x_BxTxD, embedding_VxE)
        if self.head == "question_answering":
            return Logits(*options, 2, name="qa_outputs")(x_BxTxD)
        rate = config.hidden_dropout_prob
        if self.head == "sequence_classification":
            x_BxTxD = Pooler(*options, name="pooler")(x_BxTxD)
            rate = rate if config.cls_dropout is None else config.cls_dropout
        drop = nn.Dropout(rate, deterministic=deterministic)
        return Logits(*options, config.num_labels, name="classifier")(drop(x_BxTxD))
