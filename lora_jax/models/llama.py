"""The Llama family (Touvron et al. 2023) in Flax linen, equal to `transformers`' PyTorch classes: Llama 1 to
3, SmolLM2, Mistral, Qwen2 and 2.5, dense Qwen3, Gemma 2 and the text model of Gemma 3.

Parameter names follow Hugging Face without the prefix `model`, with Flax's words for the leaves:
`layers/0/self_attn/q_proj/kernel`, `embed_tokens/embedding`, `norm/scale`. With `scan` the layers are
stacked, as `stack_layers(params, "layers")` stacks them. The modules know nothing of LoRA.

Left out: mixtures of experts, images, token classification, output of attention weights. Letters beyond those
of `_layers.py`: G heads of keys and values.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from . import _rules
from ._cache import advance, Cache, write
from ._decoder import check_arguments, check_head, DecoderModel, packed
from ._layers import accumulator, ACTIVATIONS, attention, chosen, Part, repeated
from ._llama_config import (
    FamilyConfig as FamilyConfig,
    Gemma2Config as Gemma2Config,
    Gemma3TextConfig as Gemma3TextConfig,
    LlamaConfig as LlamaConfig,
    MistralConfig as MistralConfig,
    Qwen2Config as Qwen2Config,
    Qwen3Config as Qwen3Config,
)
from ._losses import check_labels
from ._rope import turned, turns


# What no token has: the position of one that the cache has no slot for, and the window of a layer that has
# none.
_NOWHERE = 2**30


class RMSNorm(nn.Module):
    """y = scale · x / sqrt(mean(x²) + epsilon) over the last axis (Zhang & Sennrich 2019). With `from_one`,
    the parameter is scale − 1.
    """

    epsilon: float
    from_one: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        start = nn.initializers.zeros if self.from_one else nn.initializers.ones
        scale_D = self.param("scale", start, (x.shape[-1],), self.param_dtype)
        out_dtype = nn.dtypes.canonicalize_dtype(x, scale_D, dtype=self.dtype)
        return rms_norm(x, scale_D, self.epsilon, self.from_one, out_dtype)


@functools.partial(jax.checkpoint, static_argnums=(2, 3, 4))
def rms_norm(x, scale_D, epsilon, from_one, out_dtype):
    wide = accumulator(out_dtype)
    x, scale = x.astype(wide), scale_D.astype(wide).reshape((1,) * (x.ndim - 1) + (-1,))
    normal = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)
    return (normal * (1 + scale if from_one else scale)).astype(out_dtype)


class _Part(Part):
    def norm(self, name):
        config = self.config
        return RMSNorm(config.rms_norm_eps, config.gemma, self.dtype, self.param_dtype, name=name)


class Attention(_Part):
    @nn.compact
    def __call__(self, x_BxTxD, layer, slots, mask_Bx1xTxS, behind_Bx1xTxS, turns_RxBxTxK, start):
        config = self.config
        batch, tokens, width = x_BxTxD.shape

        def heads(count, name):
            y = self.dense(count * config.head_width, name, use_bias=config.input_bias)(x_BxTxD)
            return y.reshape(batch, tokens, count, config.head_width)

        q_BxTxHxK = heads(config.num_attention_heads, "q_proj")
        k_BxSxGxK, v_BxSxGxK = heads(config.kv_heads, "k_proj"), heads(config.kv_heads, "v_proj")
        if config.norms_heads:
            q_BxTxHxK, k_BxSxGxK = self.norm("q_norm")(q_BxTxHxK), self.norm("k_norm")(k_BxSxGxK)
        cos_BxTxK, sin_BxTxK = self._of_layer(turns_RxBxTxK, layer)
        q_BxTxHxK, k_BxSxGxK = (turned(x, cos_BxTxK, sin_BxTxK) for x in (q_BxTxHxK, k_BxSxGxK))
        if slots is not None:
            k_BxSxGxK, v_BxSxGxK = slots = write(slots, (k_BxSxGxK, v_BxSxGxK), start)
        if behind_Bx1xTxS is not None:
            windows_L = jnp.asarray([_NOWHERE if size is None else size for size in config.windows])
            near_Bx1xTxS = behind_Bx1xTxS < windows_L[layer]
            mask_Bx1xTxS = near_Bx1xTxS if mask_Bx1xTxS is None else near_Bx1xTxS & mask_Bx1xTxS
        y_BxTxHxK = attention(
            q_BxTxHxK,
            k_BxSxGxK,
            v_BxSxGxK,
            mask_Bx1xTxS=mask_Bx1xTxS,
            causal=slots is None,  # with slots, the mask is causal itself
            cached=slots is not None,
            scale=config.attention_scale,
            cap=config.attention_cap,
            dropout=self.random(config.attention_dropout),
            implementation=self.implementation,
            recompute=self.recompute,
        )
        y_BxTxF = y_BxTxHxK.reshape(batch, tokens, -1)
        return self.dense(width, "o_proj", use_bias=config.output_bias)(y_BxTxF), slots

    def _of_layer(self, turns_RxBxTxK, layer):
        """Those of this layer. Where there are two, the first are of layers with a window."""
        if len(self.config.ropes) == 1:
            return tuple(x[0] for x in turns_RxBxTxK)
        second_L = jnp.asarray([int(size is None) for size in self.config.windows])
        return tuple(x[second_L[layer]] for x in turns_RxBxTxK)


class MLP(_Part):
    """down(activation(gate(x)) · up(x)) (Shazeer 2020)."""

    @nn.compact
    def __call__(self, x_BxTxD):
        config = self.config
        gate_BxTxF, up_BxTxF = (
            self.dense(config.intermediate_size, name, use_bias=config.inner_bias)(x_BxTxD)
            for name in ("gate_proj", "up_proj")
        )
        gated = lambda gate, up: ACTIVATIONS[config.hidden_act](gate) * up
        project = self.dense_of(gated, x_BxTxD.shape[-1], "down_proj", use_bias=config.inner_bias)
        return project(gate_BxTxF, up_BxTxF)


class Block(_Part):
    """One layer, norm first. It takes and returns the residual stream, which `scan` carries, and its slots,
    over which `scan` maps. Gemma's has a norm after each half too.
    """

    @nn.compact
    def __call__(self, x_BxTxD, layer, slots, *shared):
        attend, mlp = Attention(*self.options(), name="self_attn"), MLP(*self.options(), name="mlp")
        y_BxTxD, slots = attend(self.norm("input_layernorm")(x_BxTxD), layer, slots, *shared)
        if not self.config.gemma:
            x_BxTxD = x_BxTxD + y_BxTxD
            return x_BxTxD + mlp(self.norm("post_attention_layernorm")(x_BxTxD)), slots
        x_BxTxD = x_BxTxD + self.norm("post_attention_layernorm")(y_BxTxD)
        y_BxTxD = mlp(self.norm("pre_feedforward_layernorm")(x_BxTxD))
        return x_BxTxD + self.norm("post_feedforward_layernorm")(y_BxTxD), slots


class Llama(DecoderModel):
    """A decoder of the Llama family, which its config names, with the language model's head or with
    `head="sequence_classification"`.

    ```python
    model = Llama(LlamaConfig.named("smollm2-135m"))
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    logits = model.apply({"params": params}, input_ids, attention_mask)      # (batch, time, vocabulary)

    cache = model.init_cache(batch=2, slots=64)  # decoding: first the whole prompt,
    logits, cache = model.apply({"params": params}, prompt, prompt_mask, cache=cache, last_only=True)
    logits, cache = model.apply({"params": params}, logits.argmax(-1), cache=cache)   # then token by token
    ```

    Args:
      input_ids: (B, T) integers. No text is too long, since rotary positions have no table: beyond
        `max_position_embeddings` the model computes what `transformers` computes.
      attention_mask: (B, T), 0 at padding, on either side. With a cache, of the new tokens.
      position_ids: (B, T) or (1, T). Default: 0, 1, 2, …, padding counted; with a cache, from the number of
        real tokens before; with segments, from the first token of each.
      segment_ids: (B, T) integers, for rows of several texts: these are numbered 1, 2, 3, …, with 0 at
        padding, and a token attends to those before it that have its number. Logits and gradients are those
        of each text in a row of its own. Not with a cache.
      cache: of `init_cache`; each new token attends to every real one before it. A write past the last slot
        gives NaN.
      visible: (B, T, S) booleans, the slots that each new token attends to. Needs `cache` and
        `position_ids`.
      logits_at: (B, N) integers, the columns whose logits are computed; -1 is the last one, and one that
        does not exist gives NaN.
      last_only: `logits_at` with the last column of each row.
      labels: (B, N) integers, the token that each column with logits predicts; -100 for none. The result is
        then their cross-entropy, and no array of all logits is made.
      label_smoothing: of `labels`, in [0, 1).
      deterministic: False drops attention out, and needs `rngs={"dropout": key}`.

    Returns:
      Logits in float32, or float64 in a float64 model: (B, T, V), or (B, N, V) of the columns that were
      named; with a cache, `(logits, cache)`; with `labels`, losses (B, N). With the head of classes (B,
      labels), those of the last token that is not `config.pad_token_id`; it takes no cache and no segments.

    Windows are counted in columns, padding included, and with a cache in positions. The fields, `scan` and
    `checkpoint` among them, are those of `GPT2`.

    Raises:
      ValueError: an argument of another shape.
      TypeError: an argument of another dtype.
    """

    partition_rules = _rules.LLAMA

    config: FamilyConfig

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
        check_arguments(input_ids, attention_mask, position_ids, segment_ids, cache, visible)
        some_only = last_only or logits_at is not None
        check_head(self.head, config, input_ids, cache, some_only or segment_ids is not None)
        columns_1xT = jnp.arange(input_ids.shape[1])[None]
        mask_BxT = None if attention_mask is None else jnp.asarray(attention_mask) != 0
        mask_Bx1xTxS = None if mask_BxT is None else mask_BxT[:, None, None, :]
        if cache is not None:
            mask_Bx1xTxS, position_ids, cache = advance(
                cache, mask_BxT, input_ids.shape, position_ids, limit=_NOWHERE
            )
            mask_Bx1xTxS = mask_Bx1xTxS if visible is None else mask_Bx1xTxS & visible[:, None]
        elif segment_ids is not None:
            mask_Bx1xTxS, restarting_BxT = packed(segment_ids, mask_Bx1xTxS)
            position_ids = restarting_BxT if position_ids is None else position_ids
        elif position_ids is None:
            position_ids = columns_1xT
        here, there = (columns_1xT, columns_1xT) if cache is None else (position_ids, cache.positions)
        windowed = any(size is not None for size in config.windows)
        behind_Bx1xTxS = (here[:, :, None] - there[:, None, :])[:, None] if windowed else None

        embedding = nn.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=nn.initializers.normal(config.initializer_range),
            name="embed_tokens",
        )
        x_BxTxD = embedding(input_ids)
        if config.gemma:
            x_BxTxD = x_BxTxD * jnp.asarray(config.hidden_size**0.5, x_BxTxD.dtype)

        slots, start = (None, None) if cache is None else (cache.layers, cache.length - input_ids.shape[1])
        options = self.options(deterministic)
        layers = repeated(
            Block,
            options,
            config.num_hidden_layers,
            scan=self.scan,
            checkpoint=self.checkpoint,
            shared=4,
            name="layers",
        )
        turns_RxBxTxK = _turns(config, jnp.asarray(position_ids), x_BxTxD.dtype)
        numbers_L = jnp.arange(config.num_hidden_layers)
        x_BxTxD, slots = layers(x_BxTxD, numbers_L, slots, mask_Bx1xTxS, behind_Bx1xTxS, turns_RxBxTxK, start)

        x_BxNxD = chosen(x_BxTxD, logits_at, last_only)
        x_BxNxD = RMSNorm(config.rms_norm_eps, config.gemma, self.dtype, self.param_dtype, name="norm")(
            x_BxNxD
        )
        check_labels(labels, label_smoothing, x_BxNxD.shape[:2], self.head, cache)
        if self.head is not None:
            return self.classified(input_ids, x_BxNxD)
        cap, cached = config.logit_cap, cache is not None
        found = self.results(embedding, x_BxNxD, labels, label_smoothing, cap, cached)
        return found if cache is None else (found, cache._replace(layers=slots))

    def init_cache(self, batch: int, slots: int, dtype=None) -> Cache:
        """An empty cache for `batch` rows of at most `slots` tokens, padding included.

        `dtype` is that of the keys and values: None is the model's `dtype`, or its `param_dtype`.

        Raises:
          ValueError: `slots` is not positive.
        """
        if slots < 1:
            raise ValueError(f"`slots` is {slots}; it must be at least 1, room for one token.")
        config = self.config
        return self.empty_cache(
            config.num_hidden_layers, config.kv_heads, config.head_width, batch, slots, dtype
        )


def _turns(config, position_BxT, dtype):
    """Cosines and sines, each (R, B, T, K/2), R being the number of the model's rotary positions. NaN where a
    token has no slot.
    """
    both = [turns(rope, config.head_width, config.positions, position_BxT, dtype) for rope in config.ropes]
    lost = (position_BxT == _NOWHERE)[None, ..., None]
    return tuple(jnp.where(lost, jnp.nan, jnp.stack(parts)) for parts in zip(*both, strict=True))
