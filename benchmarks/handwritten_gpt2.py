"""GPT-2 with LoRA written into the model by hand: the yardstick that `adapt` is measured against.

It is what an expert would write who may edit the model: the same linen modules, layer norm, attention, head
and dtype policy as `lora_jax.models.GPT2`, and beside each adapted projection `s·(x A) B`, where s multiplies
the narrow `x A`. For query and value of the fused projection the two low-rank outputs are added to the split
q and v, so that the key is not touched. A and B are in a collection of their own, `lora`, so that gradients
of nothing else are taken.

Left out: dropout, the cache of decoding, padding masks, which the measured training step does not use.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_jax.models import GPT2Config
from lora_jax.models.gpt2 import ACTIVATIONS, attention, LayerNorm


class _Part(nn.Module):
    config: GPT2Config
    dtype: Any
    adapted: str  # "qv" or "all"
    rank: int
    scale: float
    recompute: bool = True

    def low_rank(self, x_BxTxI, name, features):
        a_IxR = self.variable("lora", f"{name}_a", jnp.zeros, (x_BxTxI.shape[-1], self.rank)).value
        b_RxO = self.variable("lora", f"{name}_b", jnp.zeros, (self.rank, features)).value
        h_BxTxR = x_BxTxI @ a_IxR.astype(x_BxTxI.dtype)
        return (h_BxTxR * jnp.asarray(self.scale, h_BxTxR.dtype)) @ b_RxO.astype(x_BxTxI.dtype)

    def dense(self, x, name, features):
        """A projection, adapted if all are."""
        x = x if self.dtype is None else x.astype(self.dtype)
        y = nn.Dense(features, dtype=self.dtype, name=name)(x)
        return y + self.low_rank(x, name, features) if self.adapted == "all" else y


class _Attention(_Part):
    @nn.compact
    def __call__(self, x_BxTxD):
        batch, tokens, width = x_BxTxD.shape
        heads = self.config.n_head
        q_BxTxD, k_BxTxD, v_BxTxD = jnp.split(self.dense(x_BxTxD, "c_attn", 3 * width), 3, axis=-1)
        if self.adapted == "qv":
            q_BxTxD = q_BxTxD + self.low_rank(x_BxTxD, "q", width)
            v_BxTxD = v_BxTxD + self.low_rank(x_BxTxD, "v", width)
        parts = (part.reshape(batch, tokens, heads, width // heads) for part in (q_BxTxD, k_BxTxD, v_BxTxD))
        scale = (width // heads) ** -0.5
        y_BxTxHxK = attention(*parts, causal=True, scale=scale, recompute=self.recompute)
        return self.dense(y_BxTxHxK.reshape(batch, tokens, width), "c_proj", width)


class _MLP(_Part):
    @nn.compact
    def __call__(self, x_BxTxD):
        def project(part, h_BxTxF):
            h_BxTxF = ACTIVATIONS[part.config.activation_function](h_BxTxF)
            return part.dense(h_BxTxF, "c_proj", part.config.n_embd)

        # As in the model: GELU is computed again in the backward pass, unless the whole layer is.
        project = nn.remat(project) if self.recompute else project
        return project(self, self.dense(x_BxTxD, "c_fc", 4 * self.config.n_embd))


class _Block(_Part):
    @nn.compact
    def __call__(self, x_BxTxD, _):
        options = (self.config, self.dtype, self.adapted, self.rank, self.scale, self.recompute)
        norm = partial(LayerNorm, self.config.layer_norm_epsilon, self.dtype)
        x_BxTxD = x_BxTxD + _Attention(*options, name="attn")(norm(name="ln_1")(x_BxTxD))
        x_BxTxD = x_BxTxD + _MLP(*options, name="mlp")(norm(name="ln_2")(x_BxTxD))
        return x_BxTxD, None


class _Unrolled(nn.Module):
    block: Callable
    layers: int

    @nn.compact
    def __call__(self, x_BxTxD, _):
        for i in range(self.layers):
            x_BxTxD, _ = self.block(name=str(i))(x_BxTxD, None)
        return x_BxTxD, None


class HandwrittenGPT2(nn.Module):
    """`apply({"params": base, "lora": factors}, input_ids)`; the base's tree is that of
    `lora_jax.models.GPT2`.
    """

    config: GPT2Config
    dtype: Any = None
    adapted: str = "qv"
    rank: int = 4
    scale: float = 8.0
    scan: bool = False
    checkpoint: bool = False

    @nn.compact
    def __call__(self, input_ids):
        config = self.config
        embed = partial(nn.Embed, features=config.n_embd, dtype=self.dtype)
        wte = embed(config.vocab_size, name="wte")
        x_BxTxD = wte(input_ids) + embed(config.n_positions, name="wpe")(jnp.arange(input_ids.shape[1])[None])

        block = nn.remat(_Block, prevent_cse=not self.scan) if self.checkpoint else _Block
        options = (config, self.dtype, self.adapted, self.rank, self.scale, not self.checkpoint)
        if self.scan:
            axes = {"params": 0, "lora": 0}
            scanned = nn.scan(block, variable_axes=axes, split_rngs={"params": True}, length=config.n_layer)
            x_BxTxD, _ = scanned(*options, name="h")(x_BxTxD, None)
        else:
            x_BxTxD, _ = _Unrolled(partial(block, *options), config.n_layer, name="h")(x_BxTxD, None)

        x_BxTxD = LayerNorm(config.layer_norm_epsilon, self.dtype, name="ln_f")(x_BxTxD)
        x_BxTxD, embedding_VxD = nn.dtypes.promote_dtype(x_BxTxD, wte.embedding, dtype=self.dtype)
        contract_D = (((2,), (1,)), ((), ()))
        return jax.lax.dot_general(x_BxTxD, embedding_VxD, contract_D, preferred_element_type=jnp.float32)
