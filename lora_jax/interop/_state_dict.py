"""The tensors of a `.pt` or `.bin` file by name, wherever the file has its state dict."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from . import _torch_files
from ._files import read_weight_map


# What trainers wrap around a state dict. The first that a file has is read.
_WRAPPERS = ("model_state_dict", "state_dict", "model")
_WORDS = {
    np.dtype(np.float16): "F16",
    np.dtype(jnp.bfloat16): "BF16",
    np.dtype(np.float32): "F32",
    np.dtype(np.float64): "F64",
}


class Read(NamedTuple):
    """A tensor that has been read, with the same interface as `Stored`, one that has not."""

    name: str
    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> str:
        """safetensors' word for it."""
        return _WORDS.get(self.array.dtype, str(self.array.dtype))

    def read(self) -> np.ndarray:
        return self.array


def tensors(file: Path) -> dict[str, Read]:
    """The state dict of a file, which may hold other things beside it. Raises `ValueError` if it is not one
    flat dict of tensors.
    """
    content = _torch_files.read(file)
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{file} holds a {type(content).__name__}, not a state dict; save `{{name: tensor}}`."
        )
    wrong = next(
        (
            name
            for name, value in content.items()
            if not isinstance(name, str) or not isinstance(value, np.ndarray)
        ),
        None,
    )
    if wrong is not None:
        raise ValueError(
            f"{file} has a {type(content[wrong]).__name__} under {wrong!r}, where a tensor was expected; "
            f"save `{{name: tensor}}`, alone or under one of {list(_WRAPPERS)}."
        )
    return {name: Read(name, array) for name, array in content.items()}


def stored_binaries(directory: Path, stem: str) -> dict[str, Read]:
    """Every tensor of `stem.bin`, or of the shards that `stem.bin.index.json` lists."""
    whole, index = directory / f"{stem}.bin", directory / f"{stem}.bin.index.json"
    if whole.is_file():
        return tensors(whole)
    files = read_weight_map(index)
    found: dict[str, Read] = {}
    for shard in sorted(set(files.values())):
        found |= tensors(directory / shard)
    lost = sorted(files.keys() ^ found.keys())
    if lost:
        raise ValueError(
            f"{index} and its files do not agree about {lost[0]!r}; copy or download them again."
        )
    return found
