"""How each model's weights lie on a mesh with the axes `data`, `fsdp` and `tensor` (`lora_jax.sharding`).

Column-parallel into a block, row-parallel out of it, so that one reduction a sublayer suffices; fsdp takes
the other axis. Embeddings are split by feature: GPT-2's vocabulary, 50257 = 29 * 1733, divides by no mesh one
would build. What has no row is everywhere: norms, biases, small heads.
"""

from jax.sharding import PartitionSpec as P


_INTO, _OUT_OF = P("fsdp", "tensor"), P("tensor", "fsdp")
_EMBEDDING, _DECODER = P(None, ("fsdp", "tensor")), P(("fsdp", "tensor"), None)

GPT2 = (
    ("attn/c_attn/kernel|mlp/c_fc/kernel", _INTO),
    ("attn/c_proj/kernel|mlp/c_proj/kernel", _OUT_OF),
    ("wte/embedding|wpe/embedding", _EMBEDDING),
    ("lm_head/kernel", _DECODER),
)

# RoBERTa's and DeBERTa's; token types, one or two of them, have no place in it.
ENCODER = (
    (
        "self/(query|key|value|query_proj|key_proj|value_proj|pos_key_proj|pos_query_proj)/kernel|intermediate/dense/kernel",
        _INTO,
    ),
    ("output/dense/kernel", _OUT_OF),
    ("conv/conv/kernel", P(None, "fsdp", "tensor")),
    ("(lm_head|transform|pooler|classifier)/dense/kernel", _INTO),
    ("(word_embeddings|position_embeddings|rel_embeddings)/embedding", _EMBEDDING),
    ("decoder/kernel", _DECODER),
)
