"""Which tensor of a GGUF file is which of a Hugging Face file, and in which order its rows are.

llama.cpp turns neighbours where Hugging Face turns the halves of a head (`models/_rope.py`). So the converter
of the architecture `llama` has the rows of query and key in another order, which is undone here row by row,
exactly. In the other architectures llama.cpp turns halves too.
"""

import re

import numpy as np

from ...models.llama import FamilyConfig


# `model_type` of Hugging Face for llama.cpp's architectures, and the other way round.
KINDS = {kind: kind for kind in ("llama", "qwen2", "qwen3", "gemma2")} | {"gemma3": "gemma3_text"}
ARCHITECTURES = {"mistral": "llama", **{kind: architecture for architecture, kind in KINDS.items()}}

_MODULES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
# Gemma has a norm before each half of a layer and one after it.
_GEMMA = {
    **_MODULES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, architecture: str) -> str:
    """llama.cpp's name of a tensor, or of a module, that Hugging Face calls `name`.

    >>> gguf_name("model.layers.3.self_attn.q_proj.weight", "llama"), gguf_name("model.norm", "gemma3")
    ('blk.3.attn_q.weight', 'output_norm')
    """
    modules = _GEMMA if architecture.startswith("gemma") else _MODULES
    stem, last = re.fullmatch(r"(.*?)((?:\.weight|\.bias)?)", name).groups()  # type: ignore[union-attr]
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    if layer is None:
        return modules[stem] + last
    return f"blk.{layer[1]}.{modules[layer[2]]}{last}"


def shift_in_file(name: str, architecture: str) -> float:
    """What the file's values are above those here: scales of Gemma's norms count from 1 in Hugging Face's
    files, and from 0 in llama.cpp's.
    """
    return 1.0 if architecture.startswith("gemma") and name.endswith("norm.weight") else 0.0


def rows_in_file(name: str, architecture: str, config: FamilyConfig) -> np.ndarray | None:
    """For each row of a weight or bias here the row in the file; None where the order is the same.

    `name` is llama.cpp's, of a tensor or a module.
    """
    turned = re.fullmatch(r"blk\.\d+\.attn_([qk])(\.weight|\.bias)?", name)
    if architecture != "llama" or turned is None:
        return None
    heads = config.num_attention_heads if turned[1] == "q" else config.kv_heads
    planes = config.head_width // 2
    return np.arange(heads * 2 * planes).reshape(heads, planes, 2).swapaxes(1, 2).reshape(-1)
