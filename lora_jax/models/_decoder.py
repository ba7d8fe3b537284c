"""What GPT-2 and the Llama family share: the fields of a decoder, its heads, its cache, rows of several
texts, and the checks of its arguments.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ._cache import Cache
from ._layers import accumulator, check_inputs, chosen, Options
from ._losses import head_losses


# The most columns whose logits are made with the head as the first operand; transposing more costs as much.
_FEW = 64


class DecoderModel(nn.Module):
    """The fields of a decoder, and what they give: the head, and an empty cache."""

    config: Any
    head: str | None = None  # None: the language model's
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

    def results(self, embedding, x_BxNxD, labels_BxN=None, smoothing=0.0, cap=None, cached=False):
        """The logits, float32 or wider, by the embedding where they are tied, and by `lm_head` where not; of
        labels their losses.
        """
        tied = self.config.tie_word_embeddings
        few = cached and tied and x_BxNxD.shape[0] * x_BxNxD.shape[1] <= _FEW
        logits_of = functools.partial(_logits, axis=1 if tied else 0, dtype=self.dtype, cap=cap, first=few)
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
        leading = (*((layers,) if self.scan else ()), batch, heads)
        dtype = dtype or self.dtype or self.param_dtype

        def pair() -> tuple[jax.Array, jax.Array]:
            return jnp.zeros((*leading, width, slots), dtype), jnp.zeros((*leading, slots, width), dtype)

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


def _logits(x, head, *, axis, dtype, cap, first=False):
    """x · head, contracted over `axis` of the head, and capped where there is a cap. With `first` the head is
    the first operand, and the barrier keeps it there: XLA's CPU backend packs the second one anew in every
    step.
    """
    x, head = nn.dtypes.promote_dtype(x, head, dtype=dtype)
    product = functools.partial(jax.lax.dot_general, preferred_element_type=accumulator(x.dtype))
    if first:
        logits_VxBxN = product(head, x, (((axis,), (x.ndim - 1,)), ((), ())))
        logits = jnp.moveaxis(jax.lax.optimization_barrier(logits_VxBxN), 0, -1)
    else:
        logits = product(x, head, (((x.ndim - 1,), (axis,)), ((), ())))
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def packed(segment_ids, mask_Bx1xTxS):
    """The mask in which a token attends to its own segment only, (B, 1, T, T), and the positions that begin
    at 0 with each, (B, T). `mask` is that of the padding, or None.
    """
    segment_BxT = jnp.asarray(segment_ids)
    own_Bx1xTxS = segment_BxT[:, None, :, None] == segment_BxT[:, None, None, :]
    columns_1xT = jnp.arange(segment_BxT.shape[1])[None]
    goes_on_BxT = jnp.pad(segment_BxT[:, 1:] == segment_BxT[:, :-1], [(0, 0), (1, 0)])
    first_BxT = jax.lax.cummax(jnp.where(goes_on_BxT, 0, columns_1xT), axis=1)
    mask_Bx1xTxS = own_Bx1xTxS if mask_Bx1xTxS is None else own_Bx1xTxS & mask_Bx1xTxS
    return mask_Bx1xTxS, columns_1xT - first_BxT


def check_head(head, config, input_ids, cache, further):
    """Raises for a head that does not exist, or that the other arguments do not go with. `further`: whether
    there is one that only the language model's has.
    """
    if head is None:
        return
    if head != "sequence_classification":
        raise ValueError(
            f"`head` is {head!r}; it must be None, for the language model's, or 'sequence_classification'."
        )
    if cache is not None or further:
        raise ValueError(
            "`cache`, `segment_ids`, `logits_at` and `last_only` go with the language model's head; leave "
            "them out."
        )
    if config.pad_token_id is None and jnp.shape(input_ids)[0] > 1:
        raise ValueError(
            f"`input_ids` has {jnp.shape(input_ids)[0]} rows, and `pad_token_id` is None, so that the last "
            "token of each is unknown: set `pad_token_id` in the config, or pass one row at a time."
        )


def check_arguments(
    input_ids, attention_mask, position_ids, segment_ids, cache, visible, *, limit=None, limited_by=""
):
    """Raises for a caller's mistakes. `limit` is of the tokens of a text, and `limited_by` says what sets
    it.
    """
    limit = limit if segment_ids is None else None  # a row of several texts may be longer than each
    check_inputs(input_ids, attention_mask, position_ids, limit=limit, limited_by=limited_by)
    batch, tokens = jnp.shape(input_ids)
    if segment_ids is not None:
        _check_segments(segment_ids, (batch, tokens), cache)
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


def _check_segments(segment_ids, shape, cache):
    if cache is not None:
        raise ValueError(
            "`segment_ids` and `cache` do not go together, because a cache holds one text a row: leave "
            "`segment_ids` out, and give each text a row of its own."
        )
    if not jnp.issubdtype(jnp.result_type(segment_ids), jnp.integer):
        raise TypeError(
            f"`segment_ids` must be integers, got {jnp.result_type(segment_ids)}: number the texts of "
            "each row 1, 2, 3, …, with 0 at padding."
        )
    if jnp.shape(segment_ids) != shape:
        raise ValueError(
            f"`segment_ids` must have the shape of `input_ids`, {shape}, got {jnp.shape(segment_ids)}."
        )
