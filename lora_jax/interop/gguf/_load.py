"""`gguf.load` reads a GGUF file as a model and its parameters."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from ...processes import all_or_none, spanning
from ...sharding import Rules
from .._families import family_of
from .._placing import Placer, shardings_of
from .._strict import check_finite, check_tensors, on_device
from .._tensors import tensors_of
from ._config import architecture_of, settings_of
from ._names import gguf_name, rows_in_file, shift_in_file
from ._packing import packed_groups, packed_leaf
from ._reader import open_gguf


# Tables that the model computes by itself: `_config.py` has looked at the first, old files have the others.
_COMPUTED = ("rope_freqs.weight", "attn_rot_embd.weight")


def load(
    file: str | Path,
    *,
    tie: str = "share",
    scan: bool = False,
    checkpoint: bool = False,
    dtype: Any = None,
    param_dtype: Any = None,
    place: Callable[[str, np.ndarray], Any] = on_device,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    packed: Any = False,
    verify: bool = True,
) -> tuple[nn.Module, dict]:
    """The model in a GGUF file, with its language model's head, and its parameters.

    ```python
    model, params = gguf.load("SmolLM2-135M-Instruct.Q4_1.gguf")
    logits = model.apply({"params": params}, input_ids)

    model, params = gguf.load("model.gguf", scan=True, checkpoint=True, param_dtype=jnp.bfloat16)

    # The weights stay in the file's 4 or 8 bits, and are unpacked where they are used.
    model, params = gguf.load("model.gguf", packed=True)
    frozen, delta = lora_jax.lorafy(params, "(q|v)_proj/kernel")
    logits = lora_jax.adapt(model.apply)({"params": lora_jax.combine(frozen, delta)}, input_ids)
    ```

    The architectures are `llama` (Llama 1 to 3, SmolLM2, Mistral), `qwen2`, `qwen3`, `gemma2` and `gemma3`
    (its text model). Every type that `gguf.dequantize` knows is read, to float32. What llama.cpp has in
    another order is put into that of Hugging Face, so that the parameters are those of `hf.load`, and
    `hf.save` and `peft` take them.

    Args:
      file: the model in one file.
      tie: `"share"` follows the file: without an `output.weight`, the head is the embedding, used twice.
        `"untie"` always gives the head a leaf of its own.
      scan, checkpoint, dtype: of the model; `dtype` is that of the computation.
      param_dtype: the dtype of the parameters; None is float32, in which values are dequantised.
      place, mesh, rules: as in `hf.load`. With a mesh each part is dequantised when its device asks for it.
      packed: True leaves the projections of the layers packed, as `quantize` packs weights: they need
        `adapt`, and everything else takes them as it takes those. Patterns as the targets of `lorafy` choose
        others. Their types must be among `lora_jax.quant.Blocks`'s, one type for a stack; leaves in floating
        point are as always. `place` gets their bytes.
      verify: whether to look for values that are not finite.

    Raises:
      ValueError: not a whole GGUF file of one model; an architecture, a setting or a type that is not
        supported; a tensor that is missing, unexpected, of another shape or not finite; a mesh that does not
        divide a weight.
      ModuleNotFoundError: without the `gguf` package.
    """
    if tie not in ("share", "untie"):
        raise ValueError(f"`tie` is {tie!r}; it must be 'share' or 'untie'.")
    with all_or_none(mesh is not None and spanning(mesh)):
        source = open_gguf(file)
        settings = settings_of(source)
        family, architecture = family_of(settings), architecture_of(source)
        config: Any = family.config.from_hf(settings)
        stored = {name: tensor for name, tensor in source.stored().items() if not name.endswith(_COMPUTED)}
        if config.tie_word_embeddings and tie == "untie":
            config = dataclasses.replace(config, tie_word_embeddings=False)
            if "token_embd.weight" in stored:
                stored["output.weight"] = stored["token_embd.weight"]
        model = family.build(config, None, dtype=dtype, scan=scan, checkpoint=checkpoint)
        tensors = [
            tensor._replace(name=gguf_name(tensor.name, architecture)) for tensor in tensors_of(model, family)
        ]
        check_tensors(
            f"{source.path} does not hold the model that its settings describe",
            {tensor.name: tensor.shape for tensor in tensors},
            stored,
        )
        stored = {
            name: dataclasses.replace(
                tensor,
                order=rows_in_file(name, architecture, config),
                shift=shift_in_file(name, architecture),
            )
            for name, tensor in stored.items()
        }
        model = model.clone(param_dtype=jnp.dtype(param_dtype or jnp.float32))
        placer = Placer(
            (lambda name, array: check_finite(source.path, name, array))
            if verify
            else lambda _, array: array,
            None if param_dtype is None else model.param_dtype,
            place,
            None if mesh is None else shardings_of(model, mesh, rules),
        )
        groups = packed_groups(model, tensors, stored, packed)
        plain = [tensor for tensor in tensors if tensor.path not in groups]
        flat = placer.leaves(plain, stored)
        flat |= {path: packed_leaf(path, group, stored, placer) for path, group in groups.items()}
        return model, traverse_util.unflatten_dict(flat, sep="/")
