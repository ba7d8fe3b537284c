"""Adapter files of llama.cpp, read with the `gguf` package and applied by hand."""

import numpy as np
from gguf_files import gguf as package


# Where each tensor of the file is in the parameters, by the last words of both.
MODULES = {
    **{f"attn_{theirs}": f"self_attn/{ours}_proj" for theirs, ours in zip(("q", "k", "v", "output"), "qkvo")},
    **{f"ffn_{name}": f"mlp/{name}_proj" for name in ("gate", "up", "down")},
}


def path_of(name):
    """Ours of a tensor of the file."""
    if name == "token_embd.weight":
        return "embed_tokens/embedding"
    if name == "output.weight":
        return "lm_head/kernel"
    _, layer, module, _ = name.split(".")
    return f"layers/{layer}/{MODULES[module]}/kernel"


def read(file):
    """The two arrays for each tensor, the alpha and the settings, through `gguf`'s reader."""
    reader = package.GGUFReader(file)
    settings = {name: field.contents() for name, field in reader.fields.items()}
    arrays = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    assert all(array.dtype == np.float32 for array in arrays.values())
    names = {name.rpartition(".")[0] for name in arrays}
    assert set(arrays) == {f"{name}.{last}" for name in names for last in ("lora_a", "lora_b")}
    pairs = {name: (arrays[f"{name}.lora_a"], arrays[f"{name}.lora_b"]) for name in names}
    return pairs, settings.pop("adapter.lora.alpha"), settings


def applied(weight, name, a, b, alpha):
    """As llama.cpp does: the rank is that of B; of the token embedding, rows of A are looked up."""
    update = a @ b.T if name == "token_embd.weight" else b @ a
    return weight + alpha / b.shape[1] * update


def in_file_order(array, heads):
    """Hugging Face's halves of a head as llama.cpp's neighbours."""
    halves = np.split(array, 2 * heads)
    pairs = [np.stack(halves[2 * head : 2 * head + 2], 1) for head in range(heads)]
    return np.concatenate([pair.reshape(-1, array.shape[1]) for pair in pairs])
