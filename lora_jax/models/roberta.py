"""RoBERTa (Liu et al. 2019) in Flax linen, equal to `transformers`' PyTorch classes, with their heads.

Parameter names follow Hugging Face without the prefix `roberta`, with Flax's words for the leaves:
`encoder/layer/0/attention/self/query/kernel`, `embeddings/word_embeddings/embedding`. With `scan` the layers
are stacked, as `stack_layers(params, "encoder/layer")` stacks them. The modules know nothing of LoRA.

Left out: use as a decoder, cross-attention, multiple choice, output of attention weights.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from ._bert_layers import encoded, Pooler
from ._encoder import check_head, Decoder, EncoderModel, EncoderPart, Logits
from ._layers import check_inputs
from ._roberta_config import RobertaConfig as RobertaConfig


class ClassificationHead(EncoderPart):
    """Logits from the state of the first token, `<s>`."""

    @nn.compact
    def __call__(self, x_BxTxD):
        drop = functools.partial(self.drop, self.config.head_dropout)
        x_BxD = jnp.tanh(self.dense(self.config.hidden_size, "dense")(drop(x_BxTxD[:, 0])))
        return Logits(*self.options(), self.config.num_labels, name="out_proj")(drop(x_BxD))


class LMHead(EncoderPart):
    @nn.compact
    def __call__(self, x_BxTxD, embedding_VxD):
        bias_V = self.param("bias", nn.initializers.zeros, (self.config.vocab_size,), self.param_dtype)
        # Always the exact gelu, whatever the layers' activation is.
        x_BxTxD = jax.nn.gelu(self.dense(self.config.hidden_size, "dense")(x_BxTxD), approximate=False)
        x_BxTxD = self.norm("layer_norm")(x_BxTxD)
        tied = embedding_VxD if self.config.tie_word_embeddings else None
        return Decoder(*self.options(), name="decoder")(x_BxTxD, tied, bias_V)


class Roberta(EncoderModel):
    """RoBERTa with one of the heads of `transformers`.

    ```python
    model = Roberta(RobertaConfig.named("roberta-base", labels=("no", "yes")), head="sequence_classification")
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    logits = model.apply({"params": params}, input_ids, attention_mask)      # (batch, labels)
    ```

    **Call.** `input_ids` (B, T) integers; `attention_mask` (B, T) integers or booleans, 0 at padding on
    either side; `position_ids` (B, T) or (1, T); `token_type_ids` (B, T). Positions default to `pad_token_id`
    + 1, + 2, … over the tokens that are not `pad_token_id`, whatever the mask says, as in `transformers`;
    token types default to 0. Returns float32 logits (float64 in a float64 model): masked_lm (B, T, V),
    sequence_classification (B, N), one label being a regression, token_classification (B, T, N),
    question_answering (B, T, 2), start and end. `head="features"` returns the states of the last layer (B, T,
    D) and the pooled first one (B, D), in the dtype of the computation. The model is in evaluation mode
    unless `deterministic=False`, which needs `rngs={"dropout": key}`.

    **Fields.** `scan`: one traced layer with stacked parameters, so that compile time does not grow with
    depth. `checkpoint`: each layer is recomputed in the backward pass. `dtype`, `param_dtype`: see
    `_layers.py`. `implementation`: of `jax.nn.dot_product_attention`, "xla" or "cudnn".

    Raises:
      ValueError: an argument of another shape; a sequence longer than the model; a `head` that does not
      exist. TypeError: an argument of another dtype.
    """

    config: RobertaConfig

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
        room = config.positions
        limited_by = (
            f"has room for {room}: `max_position_embeddings`={config.max_position_embeddings} less the "
            "padding's"
        )
        check_inputs(
            input_ids,
            attention_mask,
            position_ids,
            limit=None if position_ids is not None else room,
            limited_by=limited_by,
        )
        if position_ids is None:
            real = (jnp.asarray(input_ids) != config.pad_token_id).astype(jnp.int32)
            position_ids = jnp.cumsum(real, axis=1) * real + config.pad_token_id

        options = self.options(deterministic)
        x_BxTxD, embedding_VxD = encoded(
            self, options, input_ids, attention_mask, position_ids, token_type_ids
        )

        if self.head == "features":
            return x_BxTxD, Pooler(*options, name="pooler")(x_BxTxD)
        if self.head == "masked_lm":
            return LMHead(*options, name="lm_head")(x_BxTxD, embedding_VxD)
        if self.head == "sequence_classification":
            return ClassificationHead(*options, name="classifier")(x_BxTxD)
        if self.head == "question_answering":
            return Logits(*options, 2, name="qa_outputs")(x_BxTxD)
        drop = nn.Dropout(config.head_dropout, deterministic=deterministic)
        return Logits(*options, config.num_labels, name="classifier")(drop(x_BxTxD))
