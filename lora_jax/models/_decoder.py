"""What GPT-2 and the Llama family share: the fields of a decoder, its heads, its cache and the checks of its
arguments.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ._cache import Cache
from ._layers import accumulator, check_inputs, chosen
from ._losses import head_losses


class DecoderModel(nn.Module):
    """The fields of a decoder, and what they give: the head, and an empty cache."""

    config: Any
    head: str | None = None  # None: the language model's
    dtype: Any = None
    param_dtype: Any = jnp.float32
    scan: bool = False
    checkpoint: bool = False
    implementation: str | None = None

    def results(self, embedding, x_BxNxD, labels_BxN=None, smoothing=0.0, cap=None):
        """The logits, float32 or wider, by the embedding where they are tied, and by `lm_head` where not; of
        labels their losses.
        """
        tied = self.config.tie_word_embeddings
        logits_of = functools.partial(_logits, axis=1 if tied else 0, dtype=self.dtype, cap=cap)
        head = embedding.embedding
        if not tied:
            std = nn.initializers.normal(self.config.initializer_range)
            shape = (x_BxNxD.shape[-1], self.config.vocab_size)
            head = _Kernel(shape, std, self.param_dtype, name="lm_head")()
        if labels_BxN is None:
            return logits_of(x_BxNxD, head)
        return head_losses(logits_of, x_BxNxD, head, labels_BxN, smoothing)

    def classified(self, input_ids, x_BxTxD):
        """The logits of the classes, (B, labels), at the last token of each row."""
        positions_T, pad = jnp.arange(input_ids.shape[1]), self.config.pad_token_id
        last_B = jnp.full(input_ids.shape[0], input_ids.shape[1] - 1)
        if pad is not None:
            last_B = jnp.max(jnp.where(jnp.asarray(input_ids) == pad, 0, positions_T[None]), axis=-1)
        x_BxD = chosen(x_BxTxD, last_B[:, None])[:, 0]
        std = nn.initializers.normal(self.config.initializer_range)
        kernel = _Kernel((x_BxD.shape[-1], self.config.num_labels), std, self.param_dtype, name="score")()
        return _logits(x_BxD, kernel, axis=0, dtype=self.dtype, cap=None)

    def empty_cache(self, layers: int, heads: int, width: int, batch: int, slots: int, dtype: Any) -> Cache:
        """`heads` of keys and values, `width` numbers each."""
        shape = (*((layers,) if self.scan else ()), batch, slots, heads, width)
        dtype = dtype or self.dtype or self.param_dtype

        def pair() -> tuple[jax.Array, jax.Array]:  # two arrays, so that a cache can be donated
            return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

        pairs = pair() if self.scan else tuple(pair() for _ in range(layers))
        real, positions = jnp.zeros((batch, slots), bool), jnp.zeros((batch, slots), jnp.int32)
        return Cache(pairs, real, positions, jnp.zeros((), jnp.int32))


class _Kernel(nn.Module):
    """The kernel of a dense layer, for who multiplies by it."""

    shape: tuple[int, int]
    kernel_init: Any
    param_dtype: Any

    @nn.compact
    def __call__(self):
        return self.param("kernel", self.kernel_init, self.shape, self.param_dtype)


def _logits(x, head, *, axis, dtype, cap):
    """x · head, contracted over `axis` of the head, and capped where there is a cap."""
    x, head = nn.dtypes.promote_dtype(x, head, dtype=dtype)
    contract = (((x.ndim - 1,), (axis,)), ((), ()))
    logits = jax.lax.dot_general(x, head, contract, preferred_element_type=accumulator(x.dtype))
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def check_head(head, config, input_ids, cache, some_only):
    """Raises for a head that does not exist, or that the other arguments do not go with."""
    if head is None:
        return
    if head != "sequence_classification":
        raise ValueError(
            f"`head` is {head!r}; it must be None, for the language model's, or 'sequence_classification'."
        )
    if cache is not None or some_only:
        raise ValueError(
            "`cache`, `logits_at` and `last_only` go with the language model's head; leave them out."
        )
    if config.pad_token_id is None and jnp.shape(input_ids)[0] > 1:
        raise ValueError(
            f"`input_ids` has {jnp.shape(input_ids)[0]} rows, and `pad_token_id` is None, so that the last "
            "token of each is unknown: set `pad_token_id` in the config, or pass one row at a time."
        )


def check_arguments(input_ids, attention_mask, position_ids, cache, visible, *, limit=None, limited_by=""):
    """Raises for a caller's mistakes. `limit` is of the tokens, and `limited_by` says what sets it."""
    check_inputs(input_ids, attention_mask, position_ids, limit=limit, limited_by=limited_by)
    batch, tokens = jnp.shape(input_ids)
    if cache is not None and cache.mask.shape[0] != batch:
        raise ValueError(
            f"`cache` is for {cache.mask.shape[0]} rows and `input_ids` has {batch}; make it with "
            "`model.init_cache(batch, slots)`."
        )
    if visible is not None:
        if cache is None or position_ids is None:
            raise ValueError(
                "`visible` goes with `cache` and `position_ids`: it says which slots of the cache a token "
                "attends to; pass all three, or none."
            )
        expected = (batch, tokens, cache.mask.shape[1])
        if jnp.shape(visible) != expected or jnp.result_type(visible) != bool:
            raise ValueError(
                f"`visible` must be booleans of shape {expected}, got "
                f"{jnp.result_type(visible)}{jnp.shape(visible)}."
            )
