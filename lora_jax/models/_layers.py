"""What the transformer models share: activations, attention, layer norm and repeated layers.

Letters of the shape suffixes, here and in every model: B batch, T tokens of this call (queries), N of them
whose logits are wanted, S slots (keys and values), H heads, K width of one head, D width of the model, F
inner width, V vocabulary, L layers.

Every model has this dtype policy:

* Parameters are created in `param_dtype`, and used in the dtype that they have.
* The computation runs in `dtype`. `None` means the dtype of the parameters, so that a float64 or a bfloat16
  tree needs no other setting.
* Attention scores, softmax and the statistics of layer norm are float32 (float64 in a float64 model). So are
  the logits: they are accumulated there and never rounded to bfloat16, where neighbouring logits would tie.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import _kept


# By Hugging Face's names. `gelu_new`, `gelu_fast` and `gelu_pytorch_tanh` are one tanh approximation.
ACTIVATIONS: dict[str, Callable] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_fast": partial(jax.nn.gelu, approximate=True),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def accumulator(dtype) -> jnp.dtype:
    """The dtype to accumulate in: float32, or `dtype` itself if that is wider."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


class LayerNorm(nn.Module):
    """y = scale · (x − mean) / sqrt(var + epsilon) + bias over the last axis (Ba et al. 2016, equation 4).

    It is written out, because linen's `LayerNorm` mixes bfloat16 with float32 implicitly, which strict dtype
    promotion forbids. Linen also takes the variance as E[x²] − E[x]² by default, which loses digits where the
    mean is large.
    """

    epsilon: float
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def affine(self, width):
        """The scale and the bias, for a caller that applies `layer_norm` itself."""
        scale_D = self.param("scale", nn.initializers.ones, (width,), self.param_dtype)
        return scale_D, self.param("bias", nn.initializers.zeros, (width,), self.param_dtype)

    def __call__(self, x):
        scale_D, bias_D = self.affine(x.shape[-1])
        return layer_norm(
            x,
            scale_D,
            bias_D,
            self.epsilon,
            nn.dtypes.canonicalize_dtype(x, scale_D, bias_D, dtype=self.dtype),
        )


@partial(jax.checkpoint, static_argnums=(3, 4))
def layer_norm(x, scale_D, bias_D, epsilon, out_dtype):
    wide = accumulator(out_dtype)
    x = x.astype(wide)
    centred = x - x.mean(-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)
    row = (1,) * (x.ndim - 1) + (-1,)
    y = normal * scale_D.astype(wide).reshape(row) + bias_D.astype(wide).reshape(row)
    return y.astype(out_dtype)


# The fields of a part, in order.
Options = tuple[Any, Any, Any, bool, str | None, bool]


class Part(nn.Module):
    """The fields that every part of a model has, and the layers that parts are made of."""

    config: Any
    dtype: Any = None
    param_dtype: Any = jnp.float32
    deterministic: bool = True
    implementation: str | None = None
    recompute: bool = True  # parts, in the backward pass; not where a whole layer is

    def options(self) -> Options:
        """The fields, to be passed to the parts of this part."""
        return (
            *(self.config, self.dtype, self.param_dtype, self.deterministic),
            *(self.implementation, self.recompute),
        )

    def normal(self):
        return nn.initializers.normal(self.config.initializer_range)

    def dense(self, features, name, *, kernel_init=None, use_bias=True, layer=nn.Dense):
        return layer(
            features,
            use_bias=use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=kernel_init or self.normal(),
            name=name,
        )

    def dense_of(self, activation, features, name, **options):
        """A dense layer whose input is `activation` of its arguments. The backward pass computes that input
        again, element by element, in place of keeping it: beside the arguments, which are kept, it is the
        widest array of a layer. No product of an adapter is computed again.
        """
        made = nn.remat(_DenseOf, policy=_kept.POLICY) if self.recompute else _DenseOf
        return self.dense(features, name, layer=partial(made, activation=activation), **options)

    def embed(self, rows, features, name):
        return nn.Embed(
            rows,
            features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=self.normal(),
            name=name,
        )

    def drop(self, rate, x):
        return nn.Dropout(rate)(x, deterministic=self.deterministic)

    def random(self, rate):
        """The dropout of this rate as a function, or `None` if nothing would be dropped."""
        return partial(self.drop, rate) if rate > 0 and not self.deterministic else None


class _DenseOf(nn.Dense):
    activation: Callable = staticmethod(lambda x: x)

    def __call__(self, *inputs):
        return super().__call__(self.activation(*inputs))


class _Unrolled(nn.Module):
    """The layers one after the other, named "0", "1", …, with the arguments of the scanned block."""

    block: Callable
    layers: int

    @nn.compact
    def __call__(self, x_BxTxD, numbers_L, slots, *shared):
        filled = []
        for i in range(self.layers):
            own = None if slots is None else slots[i]
            x_BxTxD, own = self.block(name=str(i))(x_BxTxD, numbers_L[i], own, *shared)
            filled.append(own)
        return x_BxTxD, None if slots is None else tuple(filled)


def repeated(block, options, layers, *, scan, checkpoint, shared, name):
    """`layers` times `block(*options)` as one module, `(x, numbers_L, slots, *shared) -> (x, slots)`.

    Each block gets its number and its slots of the cache (`None` without one). All get the same further
    arguments; `shared` is how many these are. With `scan` one block is traced, and parameters and slots have
    a leading axis of layers.
    """
    # Under `scan` the loop itself keeps XLA from merging the recomputation with the forward pass.
    block = nn.remat(block, prevent_cse=not scan) if checkpoint else block
    if not scan:
        return _Unrolled(partial(block, *options), layers, name=name)
    scanned = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, 0) + (nn.broadcast,) * shared,
        length=layers,
    )
    return scanned(*options, name=name)


def chosen(x_BxTxD, logits_at=None, last_only=False):
    """The hidden states of the columns whose logits are wanted, (B, N, D); all of them where none are named.

    `logits_at` is (B, N) integers: N columns of each row, in any order, some perhaps twice. A negative one
    counts from the end, as in NumPy, and one that no column has gives NaN. `last_only` is the column -1 of
    every row.

    It is a gather whose slices are whole hidden states, and backwards a scatter of as many. The products of
    the head, forwards and backwards, then have N columns in place of T.

    Raises:
      ValueError: `logits_at` has another shape, or comes with `last_only`.
      TypeError: `logits_at` is not of integers.
    """
    batch, tokens, _ = x_BxTxD.shape
    if logits_at is None:
        return x_BxTxD[:, -1:] if last_only else x_BxTxD
    if last_only:
        raise ValueError(
            "`logits_at` and `last_only` both say which logits are wanted; leave `last_only` out, and name "
            "the last column as -1."
        )
    if not jnp.issubdtype(jnp.result_type(logits_at), jnp.integer):
        raise TypeError(
            f"`logits_at` must be integers, the columns whose logits are wanted, got "
            f"{jnp.result_type(logits_at)}: of a mask of {tokens} columns, pass the numbers of those that "
            "count, as many for each row."
        )
    if jnp.ndim(logits_at) != 2 or jnp.shape(logits_at)[0] != batch:
        raise ValueError(
            f"`logits_at` must have shape (batch, columns) with a batch of {batch}, as `input_ids` has, got "
            f"{jnp.shape(logits_at)}."
        )
    return jnp.take_along_axis(x_BxTxD, jnp.asarray(logits_at)[:, :, None], axis=1, mode="fill")


def check_inputs(input_ids, attention_mask, position_ids, *, limit, limited_by):
    """Raises `ValueError` or `TypeError` for a caller's mistakes. Our own shapes are checked by `chex`."""
    if jnp.ndim(input_ids) != 2 or not jnp.issubdtype(jnp.result_type(input_ids), jnp.integer):
        found = f"{jnp.result_type(input_ids)}{jnp.shape(input_ids)}"
        raise TypeError(f"`input_ids` must be integers of shape (batch, time), got {found}.")
    batch, tokens = jnp.shape(input_ids)
    if limit is not None and tokens > limit:
        raise ValueError(f"`input_ids` has {tokens} tokens and the model {limited_by}; shorten it.")
    if attention_mask is not None:
        if jnp.issubdtype(jnp.result_type(attention_mask), jnp.floating):
            raise TypeError(
                "`attention_mask` is floating point; pass 1 at tokens and 0 at padding, not a bias to add."
            )
        if jnp.shape(attention_mask) != (batch, tokens):
            raise ValueError(
                f"`attention_mask` must have the shape of `input_ids`, {(batch, tokens)}, got "
                f"{jnp.shape(attention_mask)}."
            )
    if position_ids is not None and jnp.shape(position_ids) not in [(batch, tokens), (1, tokens)]:
        raise ValueError(f"`position_ids` must have shape {(batch, tokens)}, got {jnp.shape(position_ids)}.")


def attention(
    q_BxTxHxK,
    k_BxSxHxK,
    v_BxSxHxK,
    *,
    bias_BxHxTxS=None,
    mask_Bx1xTxS=None,
    causal=False,
    cached=False,
    scale=1.0,
    cap=None,
    dropout=None,
    implementation=None,
    recompute=True,
):
    """softmax(scale · q kᵀ + bias, masked) v, for every head; returns (B, T, H, K) in the dtype of `q`.

    `mask` is boolean, true where a query attends; its T axis may be 1 (a mask of keys only). A query that
    attends to no key, such as a padding token on the left, gets the mean of all values, as in PyTorch, and
    not NaN. There may be fewer heads of keys and values, each for as many queries in a row (Ainslie et al.
    2023). `cap` squeezes the scores to cap · tanh(scores / cap). `dropout` is a function of the attention
    weights. With `cached`, keys and values come as a cache has them, (B, H, K, S) and (B, H, S, K), and
    neither is transposed. With an `implementation` it is `jax.nn.dot_product_attention`'s of that name, where
    it can be: it has no cap and no dropout, and takes its softmax in float32 even of float64 scores. With
    `recompute` the backward pass computes the weights again.

    The heads come before the tokens in both products. Each of q, k, v and the result is then transposed once,
    and once again on the way back, and no array of scores is: XLA copies an operand whose batch axes are not
    the first. So the queries that share a head of keys are more rows of its product, not one more axis.
    """
    batch, _, _, width = q_BxTxHxK.shape
    if not cached:
        chex.assert_shape([k_BxSxHxK, v_BxSxHxK], (batch, None, None, width))
    if mask_Bx1xTxS is not None:
        chex.assert_rank(mask_Bx1xTxS, 4)
        chex.assert_type(mask_Bx1xTxS, bool)

    wide = accumulator(q_BxTxHxK.dtype)
    if implementation is not None and dropout is None and cap is None and wide == jnp.float32:
        if cached:
            k_BxSxHxK, v_BxSxHxK = k_BxSxHxK.transpose(0, 3, 1, 2), v_BxSxHxK.transpose(0, 2, 1, 3)
        # It promotes bfloat16 to its float32 accumulator implicitly, which strict dtype promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            return jax.nn.dot_product_attention(
                q_BxTxHxK,
                k_BxSxHxK,
                v_BxSxHxK,
                bias=bias_BxHxTxS,
                mask=mask_Bx1xTxS,
                is_causal=causal,
                scale=scale,
                implementation=implementation,
            )

    def attended(q_BxTxHxK, k_BxSxHxK, v_BxSxHxK, bias_BxHxTxS, mask_Bx1xTxS):
        options = (causal, cached, scale, cap, dropout)
        return _attended(q_BxTxHxK, k_BxSxHxK, v_BxSxHxK, bias_BxHxTxS, mask_Bx1xTxS, *options)

    if recompute and dropout is None:  # Scores and weights are not kept.
        attended = jax.checkpoint(attended)
    return attended(q_BxTxHxK, k_BxSxHxK, v_BxSxHxK, bias_BxHxTxS, mask_Bx1xTxS)


def _attended(q_BxTxHxK, k, v, bias_BxHxTxS, mask_Bx1xTxS, causal, cached, scale, cap, dropout):
    batch, tokens, heads, width = q_BxTxHxK.shape
    wide = accumulator(q_BxTxHxK.dtype)
    keys = "BGKS" if cached else "BGSK"
    k, v_BxGxSxK = (k, v) if cached else (x.transpose(0, 2, 1, 3) for x in (k, v))
    shared, slots = v_BxGxSxK.shape[1:3]
    # Rows M: the tokens of the first head of queries that share one of keys, then those of the next.
    q_BxGxMxK = q_BxTxHxK.transpose(0, 2, 1, 3).reshape(batch, shared, -1, width)
    scores_BxGxMxS = jnp.einsum(f"BGMK,{keys}->BGMS", q_BxGxMxK, k, preferred_element_type=wide)
    scores_BxHxTxS = scale * scores_BxGxMxS.reshape(batch, heads, tokens, slots)
    if cap is not None:
        scores_BxHxTxS = cap * jnp.tanh(scores_BxHxTxS / cap)
    if bias_BxHxTxS is not None:
        scores_BxHxTxS = scores_BxHxTxS + bias_BxHxTxS.astype(wide)
    allowed = jnp.ones((1, 1, 1, 1), bool) if mask_Bx1xTxS is None else mask_Bx1xTxS
    if causal:
        allowed = allowed & jnp.tril(jnp.ones((1, 1, tokens, slots), bool))
    weights_BxHxTxS = jax.nn.softmax(jnp.where(allowed, scores_BxHxTxS, jnp.finfo(wide).min / 2))
    weights_BxHxTxS = weights_BxHxTxS.astype(v_BxGxSxK.dtype)
    if dropout is not None:
        weights_BxHxTxS = dropout(weights_BxHxTxS)
    weights_BxGxMxS = weights_BxHxTxS.reshape(batch, shared, -1, slots)
    y_BxGxMxK = jnp.einsum("BGMS,BGSK->BGMK", weights_BxGxMxS, v_BxGxSxK)
    return y_BxGxMxK.reshape(batch, heads, tokens, width).transpose(0, 2, 1, 3)
