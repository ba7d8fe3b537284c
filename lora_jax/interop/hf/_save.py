"""`hf.save` writes a model as a directory that `transformers` loads."""

import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ..._merge import merge
from ..._packed.packed import Packed
from ..._tree.nodes import Adapted, is_node, resolved, Trained
from ...processes import agree, all_or_none, spanning
from .. import _fingerprint
from .._families import family_of_model
from .._files import digest, new_directory, write_json
from .._safetensors import fetch_tensors, Pending, write_tensors
from .._strict import check_writable, DTYPES, report
from .._tensors import layout_of, shapes_of, tensors_of


# The files that `save` copies from `source`: tokenizers of the supported models and defaults of generation.
_CARRIED = (
    "added_tokens.json chat_template.jinja generation_config.json merges.txt special_tokens_map.json "
    "spm.model tokenizer.json tokenizer_config.json vocab.json vocab.txt"
).split()


def save(
    dir: str | Path,
    model: nn.Module,
    params: Mapping,
    *,
    source: str | Path | None = None,
    overwrite: bool = False,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a directory that `transformers` loads, PyTorch's models included.

    ```python
    hf.save("merged", model, lora_jax.merge(frozen, delta), source="path/to/gpt2")

    # The same, merged matrix by matrix while it is written. Neither base nor result need fit in memory.
    model, params = hf.load("path/to/gpt2", place=lambda path, array: array)
    frozen, delta = peft.load("path/to/adapter", model, params)
    hf.save("merged", model, lora_jax.combine(frozen, delta), source="path/to/gpt2")
    ```

    A tied model has no tensor for its head, as `transformers` writes it, and an untied one says so in its
    config. The files carry checksums of themselves and of the config, and, for a combined tree, the
    fingerprint of the base. One tensor at a time is in memory, or one stack of layers.

    Where arrays span several processes, all of them call this with the same arguments, on a file system that
    they share. One tensor at a time is gathered, of stacked leaves one layer. Process 0 writes the bytes that
    a single process would, and an error is raised in all.

    Args:
      dir: appears when it is complete. One that is not empty is an error; `overwrite=True` replaces it if it
        is an earlier export and nothing else.
      model, params: `params` has NumPy or JAX arrays in the layout of `model`, scanned or not, or is what
        `combine` returns. Each tensor keeps its dtype; a packed one has that of its values.
      source: a directory whose tokenizer files and `generation_config.json` are copied.
      shard_bytes: above this size the tensors go into several files and an index.

    Raises:
      ValueError: a leaf that is missing, unexpected, of another shape, or not finite; a `dir` that is not
        replaced; a `source` that is no directory.
      TypeError: a leaf that is no array, as in the two trees that `lorafy` returns.
    """
    with all_or_none(spanning(params)) as writes:
        _save(Path(dir), model, params, source, overwrite, shard_bytes, writes)


def _save(
    directory: Path,
    model: nn.Module,
    params: Mapping,
    source: str | Path | None,
    overwrite: bool,
    shard_bytes: int,
    writes: bool,
) -> None:
    kind, architecture, family = family_of_model(model)
    flat = _checked_leaves(model, params)
    carried = _carried_files(source)
    merged = _Merged()
    pending = []
    for tensor in tensors_of(model, family):
        leaf = flat[tensor.path]
        fetch = functools.partial(
            lambda tensor, leaf: check_writable(tensor.path, tensor.to_theirs(merged(leaf))), tensor, leaf
        )
        names = [tensor.name]
        if not model.config.tie_word_embeddings:
            names += [alias for alias, name in family.aliases.items() if name == tensor.name]
        pending += [Pending(name, tensor.shape, np.dtype(_described(leaf).dtype), fetch) for name in names]
    combined = any(isinstance(leaf, Adapted | Trained) for leaf in flat.values())

    def base() -> dict[str, dict[str, str]]:
        if not combined:
            return {}
        frozen = jax.tree.map(_frozen, params, is_leaf=is_node)
        return {"base": _fingerprint.fingerprint(model, family, frozen)}

    if not writes:
        base()
        fetch_tensors(pending, shard_bytes)
        return

    with new_directory(
        directory,
        overwrite=overwrite,
        mark="config.json",
        files=("model*.safetensors", "model.safetensors.index.json", *_CARRIED),
    ) as new:
        about = {"model_type": kind, "architectures": [architecture], "dtype": _widest(flat.values())}
        write_json(new / "config.json", {**model.config.to_hf(), **about})
        facts = {"beside": {"config.json": digest(new / "config.json")}, **base()}
        write_tensors(new, pending, shard_bytes, facts=facts)
        for file in carried:
            shutil.copyfile(file, new / file.name)


def _checked_leaves(model: nn.Module, params: Mapping) -> dict[str, Any]:
    if not isinstance(params, Mapping):
        raise TypeError(
            f"`params` is a {type(params).__name__}; pass the nested dict that `model.apply` takes."
        )
    flat = traverse_util.flatten_dict(params, sep="/")
    flat = dict(zip(flat, resolved(flat.values()), strict=True))
    for path, leaf in flat.items():
        if not isinstance(leaf, np.ndarray | jax.Array | Adapted | Trained | Packed):
            raise TypeError(
                f"`params` holds a {type(leaf).__name__} at {path!r}, not an array; if it is one half of "
                "what `lorafy` returned, pass `lora_jax.merge(frozen, delta)` or `lora_jax.combine(frozen, "
                "delta)`."
            )
    shapes, described = shapes_of(model), {path: _described(leaf) for path, leaf in flat.items()}
    problems = [f"{path!r} is missing" for path in shapes.keys() - flat.keys()]
    problems += [f"{path!r} is unexpected" for path in flat.keys() - shapes.keys()]
    for path in shapes.keys() & flat.keys():
        if described[path].shape != shapes[path].shape:
            problems.append(f"{path!r} has shape {described[path].shape} and must have {shapes[path].shape}")
        if jnp.dtype(described[path].dtype) not in map(jnp.dtype, DTYPES.values()):
            problems.append(f"{path!r} has dtype {described[path].dtype} and must be floating point")
    report(f"`params` are not those of `model`, whose layers are {layout_of(model)}", problems)
    return flat


def _frozen(leaf: Any) -> Any:
    """The leaf of `frozen` in a leaf of a combined tree."""
    if isinstance(leaf, Adapted):
        return leaf.frozen
    return None if isinstance(leaf, Trained) else leaf


def _described(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype that a leaf has once it is merged."""
    array = leaf.weight if isinstance(leaf, Adapted) else leaf.value if isinstance(leaf, Trained) else leaf
    return jax.ShapeDtypeStruct(tuple(array.shape), array.dtype)


class _Merged:
    """Merges leaves into plain arrays, and keeps the last one: the layers of a stacked leaf come one after
    the other, and it is merged once.
    """

    def __init__(self) -> None:
        self._last: tuple[Any, Any] = (None, None)

    def __call__(self, leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray | jax.Array):
            return leaf
        if isinstance(leaf, Trained):
            return leaf.value
        if self._last[0] is not leaf:
            self._last = (None, None)  # freed before the next is made
            agree()
            adapter = leaf.adapter if isinstance(leaf, Adapted) else None
            self._last = (leaf, merge(_frozen(leaf), adapter))
        return self._last[1]


def _carried_files(source: str | Path | None) -> list[Path]:
    if source is None:
        return []
    if not Path(source).is_dir():
        raise ValueError(
            f"`source` is {str(source)!r}, which is not a directory; pass the one that has the tokenizer's "
            "files."
        )
    return [file for name in _CARRIED if (file := Path(source) / name).is_file()]


def _widest(leaves: Any) -> str:
    # `from_pretrained` casts every tensor to the one dtype of the config, which must be the widest of them.
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(True):
        return str(functools.reduce(jnp.promote_types, {_described(leaf).dtype for leaf in leaves}))
