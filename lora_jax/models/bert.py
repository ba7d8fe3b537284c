"""BERT (Devlin et al. 2019) in Flax linen, equal to `transformers`' PyTorch classes, with their heads.

Parameter names follow Hugging Face without the prefix `bert`, with Flax's words for the leaves:
`encoder/layer/0/attention/self/query/kernel`, `cls/predictions/transform/dense/kernel`. With `scan` the
layers are stacked, as `stack_layers(params, "encoder/layer")` stacks them. The modules know nothing of LoRA.

Left out: use as a decoder, cross-attention, next-sentence prediction, multiple choice, output of attention
weights.
"""

import flax.linen as nn
import jax.numpy as jnp

from ._bert_config import BertConfig as BertConfig
from ._bert_layers import encoded, Pooler
from ._encoder import check_head, EncoderModel, Logits, MaskedLMHead
from ._layers import check_inputs


class Bert(EncoderModel):
    """BERT with one of the heads of `transformers`.

    ```python
    model = Bert(BertConfig.named("bert-base-uncased", labels=("no", "yes")), head="sequence_classification")
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    logits = model.apply({"params": params}, input_ids, attention_mask)      # (batch, labels)
    ```

    **Call.** `input_ids` (B, T) integers; `attention_mask` (B, T) integers or booleans, 0 at padding on
    either side; `position_ids` (B, T) or (1, T); `token_type_ids` (B, T), 1 in the second of two texts.
    Positions default to 0, 1, 2, … from the first column on, padding or not, as in `transformers`; token
    types default to 0. Returns float32 logits (float64 in a float64 model): masked_lm (B, T, V),
    sequence_classification (B, N), one label being a regression, token_classification (B, T, N),
    question_answering (B, T, 2), start and end. `head="features"` returns the states of the last layer (B, T,
    D) and the pooled first one (B, D), in the dtype of the computation. The model is in evaluation mode
    unless `deterministic=False`, which needs `rngs={"dropout": key}`.

    **Fields.** `scan`: one traced layer with stacked parameters, so that compile time does not grow with
    depth. `checkpoint`: each layer is recomputed in the backward pass. `dtype`, `param_dtype`: see
    `_layers.py`. `implementation`: of `jax.nn.dot_product_attention`, "xla" or "cudnn".

    Raises:
      ValueError: an argument of another shape; a sequence longer than the model; a `head` that does not
        exist.
      TypeError: an argument of another dtype.
    """

    config: BertConfig

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
        check_inputs(
            input_ids,
            attention_mask,
            position_ids,
            limit=None if position_ids is not None else config.max_position_embeddings,
            limited_by=f"has room for `max_position_embeddings`={config.max_position_embeddings}",
        )
        if position_ids is None:
            position_ids = jnp.arange(input_ids.shape[1])[None]

        options = self.options(deterministic)
        x_BxTxD, embedding_VxD = encoded(
            self, options, input_ids, attention_mask, position_ids, token_type_ids
        )

        if self.head == "features":
            return x_BxTxD, Pooler(*options, name="pooler")(x_BxTxD)
        if self.head == "masked_lm":
            return MaskedLMHead(*options, name="cls")(x_BxTxD, embedding_VxD)
        if self.head == "question_answering":
            return Logits(*options, 2, name="qa_outputs")(x_BxTxD)
        if self.head == "sequence_classification":
            x_BxTxD = Pooler(*options, name="pooler")(x_BxTxD)
        drop = nn.Dropout(config.head_dropout, deterministic=deterministic)
        return Logits(*options, config.num_labels, name="classifier")(drop(x_BxTxD))
