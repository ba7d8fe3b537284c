"""How each model's weights are split over a mesh with the axes `data`, `fsdp` and `tensor`
(`lora_jax.sharding`).

Weights into a block are column-parallel and those out of it row-parallel, so that one reduction a sublayer
suffices; fsdp takes the other axis. Embeddings are split by feature, because GPT-2's vocabulary, 50257 = 29 ·
1733, divides by no usual mesh. Leaves without a row are on every device: norms, biases, small heads.
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

LLAMA = (
    ("self_attn/(q_proj|k_proj|v_proj)/kernel|mlp/(gate_proj|up_proj)/kernel", _INTO),
    ("self_attn/o_proj/kernel|mlp/down_proj/kernel", _OUT_OF),
    ("embed_tokens/embedding", _EMBEDDING),
    ("lm_head/kernel", _DECODER),
)

# BERT, RoBERTa and DeBERTa. Their token types, of which there are one or two, are not split.
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
