"""The tensors of a `.pt` or `.bin` file by name, wherever in it the state dict is."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from . import _torch_files
from ._files import read_json


# What trainers wrap around a state dict; the first that is there is meant.
_WRAPPERS = ("model_state_dict", "state_dict", "model")
_WORDS = {
    np.dtype(np.float16): "F16",
    np.dtype(jnp.bfloat16): "BF16",
    np.dtype(np.float32): "F32",
    np.dtype(np.float64): "F64",
}


class Read(NamedTuple):
    """A tensor of the file, described like one that is not read yet."""

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
    """Raises `ValueError` for a file that does not hold one flat dict of tensors, among whatever else."""
    content = _torch_files.read(file)
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{file} holds a {type(content).__name__}, not a state dict; save `{{name: tensor}}`"
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
            f"save `{{name: tensor}}`, alone or under one of {list(_WRAPPERS)}"
        )
    return {name: Read(name, array) for name, array in content.items()}


def stored_binaries(dir: Path, stem: str) -> dict[str, Read]:
    """Every tensor of `stem.bin`, or of the shards that `stem.bin.index.json` lists."""
    whole, index = dir / f"{stem}.bin", dir / f"{stem}.bin.index.json"
    if whole.is_file():
        return tensors(whole)
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise ValueError(f"{index} has no `weight_map` from tensors to files")
    found: dict[str, Read] = {}
    for shard in sorted(set(places.values())):
        # The index is a stranger's: it may name files beside it and no others.
        if Path(shard).name != shard or not (dir / shard).is_file():
            raise ValueError(f"{index} names the file {shard!r}, which is not in {dir}")
        found |= tensors(dir / shard)
    lost = sorted(places.keys() ^ found.keys())
    if lost:
        raise ValueError(f"{index} and its files do not agree about {lost[0]!r}")
    return found
