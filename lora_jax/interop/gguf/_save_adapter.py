"""`gguf.save_adapter` writes adapters as llama.cpp reads them."""

import os
import uuid
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from ... import arithmetic
from ...processes import agree, all_or_none, spanning
from .._adapters import b_for, common_alpha, Part
from .._exports import checked_trees, NOTHING_ADAPTED, parts_of, trained_whole
from .._families import family_of_model
from .._strict import check_writable
from ._names import ARCHITECTURES, gguf_name, rows_in_file
from ._reader import gguf_package


def save_adapter(
    file: str | Path, model: nn.Module, frozen: Any, delta: Any, *, overwrite: bool = False
) -> None:
    """Writes the adapters as the GGUF file that llama.cpp takes beside the base: `llama-cli -m base.gguf
    --lora adapter.gguf`.

    ```python
    model, params = gguf.load("base.gguf", packed=True)
    frozen, delta = lora_jax.lorafy(params, "(q|k|v|o)_proj/kernel", method=LoRA(rank=8))
    gguf.save_adapter("adapter.gguf", model, frozen, delta)
    ```

    llama.cpp adds (alpha / rank) · B·A to a weight, with the rank of each and one alpha: where adapters
    differ in alpha, or are rsLoRA, B takes the difference. Other methods are written as the LoRA that
    computes the same (`lora_jax.arithmetic.as_lora`). Arrays are written in float32, and the rows of B in
    llama.cpp's order.

    Where arrays span several processes, all of them call this, as with `hf.save`.

    Args:
      file: appears when it is complete.
      model, frozen, delta: the model, from `gguf.load` or `hf.load`, and the two trees of `lorafy`, or later
        states of them.

    Raises:
      ValueError: a file that exists, unless `overwrite=True`; nothing is adapted; what llama.cpp's adapters
        cannot hold: DoRA, weights that train themselves, the adapter of an embedding that is the head too;
        values that are not finite.
      TypeError: a model that llama.cpp has no architecture for here; a combined tree, or the two trees in the
        other order.
      ModuleNotFoundError: without the `gguf` package.
    """
    with all_or_none(spanning(frozen, delta)) as writes:
        _save(Path(file), model, frozen, delta, overwrite, writes)


def _save(file: Path, model: nn.Module, frozen: Any, delta: Any, overwrite: bool, writes: bool) -> None:
    package = gguf_package()
    if writes and file.exists() and (file.is_dir() or not overwrite):
        raise ValueError(
            f"{file} exists; choose another name"
            + ("." if file.is_dir() else ", or replace it with `overwrite=True`.")
        )
    agree()
    kind, _, family = family_of_model(model)
    if kind not in ARCHITECTURES or getattr(model, "head", None) is not None:
        head = "" if kind not in ARCHITECTURES else f" with the head {model.head!r}"
        raise TypeError(
            f"`model` is of the kind {kind!r}{head}, whose adapters are not written for llama.cpp; those of "
            f"{', '.join(sorted(ARCHITECTURES))} are, with the language model's head."
        )
    frozen, delta = arithmetic.as_lora(*checked_trees(model, family, frozen, delta))
    whole = sorted(trained_whole(model, family, delta))
    if whole:
        raise ValueError(
            f"`delta` trains {whole[0]!r} itself, and {len(whole) - 1} more: llama.cpp's adapters hold "
            "low-rank updates of matrices alone. Write the merged model, `hf.save(dir, model, merge(frozen, "
            "delta))`, and convert that."
        )
    parts = parts_of(model, family, delta)
    if not parts:
        raise ValueError(NOTHING_ADAPTED)
    alpha = common_alpha(parts) or 1.0  # llama.cpp takes zero for a scale of one
    tensors: dict[str, np.ndarray] = {}
    for part in parts:
        tensors |= _tensors(part, alpha, ARCHITECTURES[kind], model)
    for name, array in tensors.items():
        check_writable(name, array)
    if writes:
        _write(package, file, ARCHITECTURES[kind], alpha, tensors)


def _tensors(part: Part, alpha: float, architecture: str, model: nn.Module) -> dict[str, np.ndarray]:
    """A (r, in) and B (out, r), by llama.cpp's names."""
    if part.module.tied or part.module.kind == "embedding" and model.config.tie_word_embeddings:
        raise ValueError(
            "`delta` adapts the embedding, which is the head too: llama.cpp aborts on such an adapter. Adapt "
            "other weights, or write the merged model, `hf.save(dir, model, merge(frozen, delta))`, and "
            "convert that."
        )
    name = gguf_name(part.module.name, architecture)
    a, b = part.arrays["a"], b_for(part, part.arrays["b"], alpha)
    if part.module.kind == "embedding":
        a = a.T  # its rows are looked up
    order = rows_in_file(name, architecture, model.config)
    if order is not None:
        b = b[np.argsort(order)]
    arrays = {"lora_a": a, "lora_b": b}
    return {
        f"{name}.weight.{last}": np.ascontiguousarray(array, np.float32) for last, array in arrays.items()
    }


def _write(package: Any, file: Path, architecture: str, alpha: float, tensors: dict[str, np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    writer = package.GGUFWriter(new, architecture)
    try:
        writer.add_type(package.GGUFType.ADAPTER)
        writer.add_string(package.Keys.Adapter.TYPE, "lora")
        writer.add_float32(package.Keys.Adapter.LORA_ALPHA, float(alpha))
        for name, array in tensors.items():
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(new, file)
    finally:
        new.unlink(missing_ok=True)
