"""DeBERTa's disentangled attention (He et al., ICLR 2021), in which scores depend on distances too.

The letters of the shape suffixes are stated in `_layers.py`; R is rows of the relative embedding.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ._deberta_config import DebertaV2Config
from ._encoder import EncoderPart
from ._layers import accumulator, attention


class SelfAttention(EncoderPart):
    """Disentangled attention: the score of i and j is the sum of three terms, content and content, content
    and distance, distance and content.

    The score is (q_i k_j + q_i K_{δ(i,j)} + k_j Q_{δ(i,j)}) / sqrt(d) (He et al., equation 4). Here δ(i, j)
    is the bucket of the distance i − j, K and Q are the projections of the relative embedding, and d is the
    width of a head times the number of terms. `transformers` takes −δ(j, i) for the second δ, which is the
    same.
    """

    @nn.compact
    def __call__(self, x_BxTxD, mask_Bx1xTxT, distances_RxD, rows_TxT):
        config = self.config
        terms = config.pos_att_type
        project = {name: self._projection(name) for name in ("query_proj", "key_proj", "value_proj")}
        q_BxTxHxK, k_BxTxHxK, v_BxTxHxK = (projection(x_BxTxD) for projection in project.values())
        scale = (q_BxTxHxK.shape[-1] * (1 + len(set(terms)))) ** -0.5

        bias_BxHxTxT = None
        if config.relative_attention and terms:
            distances_1xRxD = self.drop(config.hidden_dropout_prob, distances_RxD)[None]
            if not config.share_att_key:
                project["key_proj"] = self._projection("pos_key_proj") if "c2p" in terms else None
                project["query_proj"] = self._projection("pos_query_proj") if "p2c" in terms else None
            found = []
            if "c2p" in terms:
                found.append(_by_distance(q_BxTxHxK, project["key_proj"](distances_1xRxD)[0], rows_TxT))
            if "p2c" in terms:
                # For each key: the axes of queries and keys change places, and the distance changes its sign.
                by_key = _by_distance(k_BxTxHxK, project["query_proj"](distances_1xRxD)[0], rows_TxT.T)
                found.append(by_key.swapaxes(-1, -2))
            bias_BxHxTxT = scale * functools.reduce(jnp.add, found)

        y_BxTxHxK = attention(
            q_BxTxHxK,
            k_BxTxHxK,
            v_BxTxHxK,
            bias_BxHxTxS=bias_BxHxTxT,
            mask_Bx1xTxS=mask_Bx1xTxT,
            scale=scale,
            dropout=self.random(config.attention_probs_dropout_prob),
            implementation=self.implementation,
            recompute=self.recompute,
        )
        return y_BxTxHxK.reshape(x_BxTxD.shape)

    def _projection(self, name):
        heads, width = self.config.num_attention_heads, self.config.hidden_size
        dense = self.dense(width, name)
        return lambda x: dense(x).reshape(*x.shape[:-1], heads, width // heads)


def _by_distance(x_BxTxHxK, distances_RxHxK, rows_TxT):
    """x_i · P_{δ(i,j)} for every i and j, taken from the products with all rows of P."""
    wide = accumulator(x_BxTxHxK.dtype)
    products_BxHxTxR = jnp.einsum("BTHK,RHK->BHTR", x_BxTxHxK, distances_RxHxK, preferred_element_type=wide)
    return jnp.take_along_axis(products_BxHxTxR, rows_TxT[None, None], axis=-1)


def distance_rows(config: DebertaV2Config, tokens: int) -> np.ndarray:
    """The row of the relative embedding for every query and key, (T, T) integers: the bucket of their
    distance, plus `span`.

    NumPy computes it in float32, as PyTorch does, because rounding decides on which side of a bucket's border
    a distance falls.
    """
    signed = np.arange(1 - tokens, tokens)
    buckets = signed
    if config.position_buckets > 0:
        middle = config.position_buckets // 2
        far = np.maximum(np.abs(signed), middle)
        ratio = np.log((far / middle).astype(np.float32)) / np.log(np.float32((config.furthest - 1) / middle))
        logarithmic = np.sign(signed) * (np.ceil(ratio * np.float32(middle - 1)) + middle)
        buckets = np.where(np.abs(signed) <= middle, signed, logarithmic).astype(np.int64)
    rows = np.clip(buckets + config.span, 0, 2 * config.span - 1).astype(np.int32)
    positions = np.arange(tokens)
    return rows[positions[:, None] - positions[None, :] + tokens - 1]
