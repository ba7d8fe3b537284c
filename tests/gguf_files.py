"""Tiny GGUF files, written with the `gguf` package: random weights of every type, and the real model where it
was fetched.
"""

import os
import re
from pathlib import Path

import numpy as np
import pytest


gguf = pytest.importorskip("gguf", reason="needs the extra `gguf`")

_REPOSITORY = Path(__file__).resolve().parent.parent
REAL = (
    Path(os.environ.get("LORA_JAX_BASES") or _REPOSITORY / "bases")
    / "smollm2-135m"
    / "SmolLM2-135M-Instruct.Q4_1.gguf"
)
needs_real = pytest.mark.skipif(
    not REAL.is_file(), reason="fetch it with `python -m experiments fetch smollm2-135m --to bases`"
)

# Types that files of this family have, and the bytes of a block's scales in half precision.
SCALES = {
    **{"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0]},
    **{"Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]},
    **{"IQ4_NL": [0], "IQ4_XS": [0], "TQ2_0": [64]},
}
PLAIN = ("F32", "F16", "BF16")
PACKABLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
SIZES = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 256,
    "feed_forward_length": 512,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "vocab_size": 96,
}

# The settings of a tokenizer with a token for each character, one for two of them, and one that ends a text.
_TOKENS = [*map(chr, range(33, 126)), "Ġ", "Ġt", "<|im_end|>"]
CHARACTERS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": _TOKENS,
    "tokenizer.ggml.token_type": [1] * 95 + [3],
    "tokenizer.ggml.merges": ["Ġ t"],
    "tokenizer.ggml.eos_token_id": 95,
    "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
}


def data_of(shape, kind, seed):
    """Random data of a type as the writer takes it. Blocks are random bytes, with scales of usual size."""
    rng = np.random.default_rng(seed)
    if kind in PLAIN:
        array = rng.normal(size=shape, scale=0.1).astype(np.float32)
        return gguf.quantize(array, gguf.GGMLQuantizationType[kind])
    per_block, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rows, blocks = shape[0], shape[1] // per_block
    data = rng.integers(0, 256, (rows, blocks, width), np.uint8)
    bits = {"Q4_0": 4, "Q4_1": 4, "IQ4_NL": 7, "TQ2_0": 1, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8, "Q3_K": 8}
    typical = 0.2 / 2 ** bits.get(kind, 10)
    for at in SCALES.get(kind, ()):
        scale = rng.uniform(0.5, 1, (rows, blocks, 1)).astype(np.float16) * np.float16(typical)
        data[..., at : at + 2] = scale.astype(np.float16).view(np.uint8)
    return data.reshape(rows, -1)


def shapes(settings, *, bias=(), tied=True, norms=False, gemma=False):
    """Of every tensor, with NumPy's order of axes: (out, in)."""
    width, inner = settings["embedding_length"], settings["feed_forward_length"]
    heads, kv = settings["attention.head_count"], settings["attention.head_count_kv"]
    head = settings.get("attention.key_length", width // heads)
    found = {"token_embd.weight": (settings["vocab_size"], width), "output_norm.weight": (width,)}
    if not tied:
        found["output.weight"] = (settings["vocab_size"], width)
    layer = {
        **{"attn_q": (heads * head, width), "attn_k": (kv * head, width), "attn_v": (kv * head, width)},
        **{"attn_output": (width, heads * head), "attn_norm": (width,), "ffn_norm": (width,)},
        **{"ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)},
    }
    if norms:
        layer |= {"attn_q_norm": (head,), "attn_k_norm": (head,)}
    if gemma:
        layer |= {"post_attention_norm": (width,), "post_ffw_norm": (width,)}
    for i in range(settings["block_count"]):
        found |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
        found |= {f"blk.{i}.{name}.bias": layer[name][:1] for name in bias}
    return found


def write(
    file,
    architecture="llama",
    *,
    kinds=("F32",),
    changes=None,
    told=None,
    extra=None,
    also=None,
    drop="",
    **layout,
):
    """Writes a model and returns what is in it, by name. `kinds` go round over the matrices. `changes` are of
    the architecture's settings (None removes one), `told` those that the tensors do not follow, `extra` of
    others. Tensors whose names match `drop` are left out; `also` has more.
    """
    settings = {**SIZES, "rope.freq_base": 20000.0, "attention.layer_norm_rms_epsilon": 1e-5}
    settings = {key: value for key, value in {**settings, **(changes or {})}.items() if value is not None}
    writer = gguf.GGUFWriter(str(file), architecture)
    own = {f"{architecture}.{key}": value for key, value in {**settings, **(told or {})}.items()}
    for key, value in {**own, **(extra or {})}.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}.get(type(value))
        (add or {str: writer.add_string, list: writer.add_array}[type(value)])(key, value)
    tensors, matrices = {}, 0
    for seed, (name, shape) in enumerate(shapes({**SIZES, **settings}, **layout).items()):
        kind = "F32"
        if len(shape) == 2:
            kind, matrices = kinds[matrices % len(kinds)], matrices + 1
        tensors[name] = (data_of(shape, kind, seed), kind)
        if "norm" in name:
            tensors[name] = (1 + tensors[name][0], kind)
    tensors = {name: entry for name, entry in tensors.items() if not (drop and re.fullmatch(drop, name))}
    tensors |= {name: (array, "F32") for name, array in (also or {}).items()}
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def values(tensors, name):
    """What `gguf` makes of a tensor, with the rows in the order of the file."""
    data, kind = tensors[name]
    return gguf.dequantize(data, gguf.GGMLQuantizationType[kind])


def halves(array, heads):
    """llama.cpp's neighbours as Hugging Face's halves: rows 0, 2, 4, … of each head and then 1, 3, 5, …"""
    per_head = np.split(array, heads)
    return np.concatenate([part for head in per_head for part in (head[::2], head[1::2])])
