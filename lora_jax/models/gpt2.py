"""GPT-2 (Radford et al. 2019) in Flax linen, equal to `transformers`' PyTorch `GPT2LMHeadModel`.

Parameter names follow Hugging Face, with Flax's words for the leaves: `h/0/attn/c_attn/kernel`,
`wte/embedding`, `ln_f/scale`. With `scan` the layers are stacked: `h/attn/c_attn/kernel` has shape (layers,
in, out), and `stack_layers` and `unstack_layers` convert one layout to the other. The modules know nothing of
LoRA.

Left out: cross-attention, classification and double heads, token types, output of attention weights. The
letters of the shape suffixes and the dtype policy are stated in `_layers.py`.
"""

import functools

import chex
import flax.linen as nn
import jax.numpy as jnp

from . import _rules
from ._cache import advance, Cache as Cache, write
from ._decoder import check_arguments, check_head, DecoderModel, packed
from ._gpt2_config import GPT2Config as GPT2Config
from ._layers import ACTIVATIONS, attention, chosen, LayerNorm, Part, repeated
from ._losses import check_labels


class _Part(Part):
    def residual_normal(self):
        # Each layer adds to the residual stream twice. 1/sqrt(2L) keeps the variance of the stream at the
        # start (section 2.3).
        return nn.initializers.normal(self.config.initializer_range / (2 * self.config.n_layer) ** 0.5)

    def norm(self, name):
        return LayerNorm(self.config.layer_norm_epsilon, self.dtype, self.param_dtype, name=name)


class Attention(_Part):
    @nn.compact
    def __call__(self, x_BxTxD, layer, slots, mask_Bx1xTxS, start):
        batch, tokens, width = x_BxTxD.shape
        heads = self.config.n_head
        qkv = jnp.split(self.dense(3 * width, "c_attn")(x_BxTxD), 3, axis=-1)
        q_BxTxHxK, k_BxSxHxK, v_BxSxHxK = (part.reshape(batch, tokens, heads, width // heads) for part in qkv)

        if slots is not None:
            k_BxSxHxK, v_BxSxHxK = slots = write(slots, (k_BxSxHxK, v_BxSxHxK), start)

        scale = (width // heads) ** -0.5 if self.config.scale_attn_weights else 1.0
        if self.config.scale_attn_by_inverse_layer_idx:
            # The queries are divided, because the layer's number is traced under `scan`, and a fused kernel
            # needs a static scale.
            q_BxTxHxK = q_BxTxHxK / (layer + 1).astype(q_BxTxHxK.dtype)
        y_BxTxHxK = attention(
            q_BxTxHxK,
            k_BxSxHxK,
            v_BxSxHxK,
            mask_Bx1xTxS=mask_Bx1xTxS,
            causal=slots is None,  # with slots, the mask is causal itself
            cached=slots is not None,
            scale=scale,
            dropout=self.random(self.config.attn_pdrop),
            implementation=self.implementation,
            recompute=self.recompute,
        )
        y_BxTxD = self.dense(width, "c_proj", kernel_init=self.residual_normal())(
            y_BxTxHxK.reshape(batch, tokens, width)
        )
        return self.drop(self.config.resid_pdrop, y_BxTxD), slots


class MLP(_Part):
    @nn.compact
    def __call__(self, x_BxTxD):
        width = x_BxTxD.shape[-1]
        h_BxTxF = self.dense(self.config.n_inner or 4 * width, "c_fc")(x_BxTxD)
        project = self.dense_of(
            ACTIVATIONS[self.config.activation_function],
            width,
            "c_proj",
            kernel_init=self.residual_normal(),
        )
        return self.drop(self.config.resid_pdrop, project(h_BxTxF))


class Block(_Part):
    """One layer, norm first. It takes and returns the residual stream, which `scan` carries, and its slots,
    over which `scan` maps.
    """

    @nn.compact
    def __call__(self, x_BxTxD, layer, slots, mask_Bx1xTxS, start):
        attend = Attention(*self.options(), name="attn")
        y_BxTxD, slots = attend(self.norm("ln_1")(x_BxTxD), layer, slots, mask_Bx1xTxS, start)
        x_BxTxD = x_BxTxD + y_BxTxD
        x_BxTxD = x_BxTxD + MLP(*self.options(), name="mlp")(self.norm("ln_2")(x_BxTxD))
        chex.assert_shape(x_BxTxD, y_BxTxD.shape)
        return x_BxTxD, slots


class GPT2(DecoderModel):
    """GPT-2 with its language-model head, or with `head="sequence_classification"`.

    ```python
    model = GPT2(GPT2Config.named("gpt2"))
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    logits = model.apply({"params": params}, input_ids, attention_mask)      # (batch, time, vocabulary)

    cache = model.init_cache(batch=2, slots=64)  # decoding: first the whole prompt,
    logits, cache = model.apply({"params": params}, prompt, prompt_mask, cache=cache, last_only=True)
    logits, cache = model.apply({"params": params}, logits.argmax(-1), cache=cache)   # then token by token
    ```

    **Call.** `input_ids` (B, T) integers; `attention_mask` (B, T) integers or booleans, 0 at padding on
    either side; `position_ids` (B, T) or (1, T). Positions default to 0, 1, 2, …, padding counted, as in
    `transformers`. Returns logits (B, T, V) in float32, or float64 in a float64 model. The model is in
    evaluation mode unless `deterministic=False`, which needs `rngs={"dropout": key}`.

    **Logits of some columns.** `logits_at`, (B, N) integers, names the columns of this call whose logits are
    computed, (B, N, V): prompts and padding need none. A column may come twice; -1 is the last one. A column
    that does not exist gives NaN. `last_only` is `logits_at` with the last column of each row, (B, 1, V).

    **Losses.** With `labels`, (B, N) integers, the result is the cross-entropy of each column that has
    logits, (B, N), smoothed by `label_smoothing`, and no array of all logits is made. The label of a column
    is the token that it predicts; at a negative one (-100) the loss is 0.

    **Several texts in a row.** `segment_ids`, (B, T) integers, numbers the texts of each row 1, 2, 3, …, with
    0 at padding: a token attends to those before it that have its number, and to no other. Positions then
    default to 0, 1, 2, … from the first token of each text, so that logits and gradients are those of each
    text in a row of its own. A row may be longer than the model. A text may not: it gives NaN to its row.

    **With the head of classes** the logits are (B, N), those of the last token that is not
    `config.pad_token_id`, as in `transformers`; without a padding token, of the last token of the only row.
    It takes no cache and no segments.

    **With a `cache`** the mask is that of the new tokens, and each attends to every real token before it.
    Positions default to the number of real tokens before, and `(logits, cache)` is returned. Writing past the
    last slot cannot raise inside `jit`; it gives NaN logits, as a position or token id out of range does.
    `visible`, booleans (B, T, S), restricts the slots that each new token attends to, its own among them. So
    tokens of one call that are alternatives of each other, as the beams of a search, share the slots of a
    row. It needs `position_ids`, and the caller makes sure that there are slots.

    **Fields.** `scan`: one traced layer with stacked parameters, so that compile time does not grow with
    depth. `checkpoint`: each layer is recomputed in the backward pass. `dtype`, `param_dtype`: see
    `_layers.py`. `implementation`: of `jax.nn.dot_product_attention`, "xla" or "cudnn" (fused, needs an
    NVIDIA GPU and a 16-bit `dtype`).

    Raises:
      ValueError: an argument of another shape; a sequence longer than the model.
      TypeError: an argument of another dtype.
    """

    partition_rules = _rules.GPT2

    config: GPT2Config

    @nn.compact
    def __call__(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        *,
        segment_ids=None,
        cache: Cache | None = None,
        visible=None,
        logits_at=None,
        last_only: bool = False,
        labels=None,
        label_smoothing: float = 0.0,
        deterministic: bool = True,
    ):
        config = self.config
        check_arguments(
            input_ids,
            attention_mask,
            position_ids,
            segment_ids,
            cache,
            visible,
            limit=config.n_positions,
            limited_by=f"`n_positions`={config.n_positions}",
        )
        some_only = last_only or logits_at is not None
        check_head(self.head, config, input_ids, cache, some_only or segment_ids is not None)
        mask_BxT = None if attention_mask is None else jnp.asarray(attention_mask) != 0
        mask_Bx1xTxS = None if mask_BxT is None else mask_BxT[:, None, None, :]
        if cache is not None:
            mask_Bx1xTxS, position_ids, cache = advance(
                cache, mask_BxT, input_ids.shape, position_ids, limit=config.n_positions
            )
            mask_Bx1xTxS = mask_Bx1xTxS if visible is None else mask_Bx1xTxS & visible[:, None]
        elif segment_ids is not None:
            mask_Bx1xTxS, restarting_BxT = packed(segment_ids, mask_Bx1xTxS)
            position_ids = restarting_BxT if position_ids is None else position_ids
        elif position_ids is None:
            position_ids = jnp.arange(input_ids.shape[1])[None]

        embed = functools.partial(
            nn.Embed,
            features=config.n_embd,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=nn.initializers.normal(config.initializer_range),
        )
        wte = embed(config.vocab_size, name="wte")
        x_BxTxD = wte(input_ids) + embed(config.n_positions, name="wpe")(position_ids)
        x_BxTxD = nn.Dropout(config.embd_pdrop)(x_BxTxD, deterministic=deterministic)

        slots, start = (None, None) if cache is None else (cache.layers, cache.length - input_ids.shape[1])
        options = self.options(deterministic)
        layers = repeated(
            Block, options, config.n_layer, scan=self.scan, checkpoint=self.checkpoint, shared=2, name="h"
        )
        x_BxTxD, slots = layers(x_BxTxD, jnp.arange(config.n_layer), slots, mask_Bx1xTxS, start)

        x_BxNxD = chosen(x_BxTxD, logits_at, last_only)
        x_BxNxD = LayerNorm(config.layer_norm_epsilon, self.dtype, self.param_dtype, name="ln_f")(x_BxNxD)
        check_labels(labels, label_smoothing, x_BxNxD.shape[:2], self.head, cache)
        if self.head is not None:
            return self.classified(input_ids, x_BxNxD)
        found = self.results(wte, x_BxNxD, labels, label_smoothing, cached=cache is not None)
        return found if cache is None else (found, cache._replace(layers=slots))

    def init_cache(self, batch: int, slots: int, dtype=None) -> Cache:
        """An empty cache for `batch` rows of at most `slots` tokens, padding included.

        `dtype` is that of the keys and values: None is the model's `dtype`, or its `param_dtype`.

        Raises:
          ValueError: more slots than the model has positions.
        """
        config = self.config
        if not 0 < slots <= config.n_positions:
            raise ValueError(
                f"`slots` is {slots}; it must be between 1 and the model's "
                f"`n_positions`={config.n_positions}."
            )
        width = config.n_embd // config.n_head
        return self.empty_cache(config.n_layer, config.n_head, width, batch, slots, dtype)
