"""Files as such: tensors in safetensors, whole or in shards, JSON, and directories that appear complete or not at all."""

import contextlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


class Stored(NamedTuple):
    """A tensor in a file, not read yet."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' word: F32, BF16, …

    def read(self) -> np.ndarray:
        with _open(self.file) as file:
            return file.get_tensor(self.name)


class Pending(NamedTuple):
    """A tensor to be written, not fetched yet, so that one shard at a time is in memory."""

    name: str
    bytes: int
    fetch: Callable[[], np.ndarray]


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, or a `ValueError` that says what is wrong with the file or what lies in its place."""
    if not file.is_file():
        found = sorted(entry.name for entry in file.parent.iterdir()) if file.parent.is_dir() else "no such directory"
        raise ValueError(f"{file} is missing; found there: {found}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}, not an object")
    return content


def stored_tensors(dir: Path, stem: str = "model") -> dict[str, Stored]:
    """Every tensor of `stem.safetensors`, or of the shards that `stem.safetensors.index.json` lists, by name."""
    whole, index = dir / f"{stem}.safetensors", dir / f"{stem}.safetensors.index.json"
    if whole.is_file():
        return {stored.name: stored for stored in _headers(whole)}
    if not index.is_file():
        found = sorted(entry.name for entry in dir.iterdir())
        binary = any(name.endswith((".bin", ".pt")) for name in found)
        hint = "; write the .bin files as safetensors with transformers' `save_pretrained`" if binary else ""
        raise ValueError(f"{dir} has neither {whole.name} nor {index.name}; found there: {found}{hint}")

    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise ValueError(f"{index} has no `weight_map` from tensors to files")
    shards = sorted(set(places.values()))
    for shard in shards:
        # The index is a stranger's: it may name files beside it and no others.
        if Path(shard).name != shard or not (dir / shard).is_file():
            raise ValueError(f"{index} names the file {shard!r}, which is not in {dir}")
    stored = {}
    for shard in shards:
        for tensor in _headers(dir / shard):
            if places.get(tensor.name) != shard:
                raise ValueError(f"{dir / shard} holds {tensor.name!r}, which {index.name} does not place there")
            stored[tensor.name] = tensor
    lost = sorted(set(places) - set(stored))
    if lost:
        raise ValueError(f"{index} lists {lost[0]!r} in {places[lost[0]]!r}, which does not hold it")
    return stored


def write_tensors(dir: Path, tensors: list[Pending], shard_bytes: int, stem: str = "model") -> None:
    """Writes one file, or shards of at most `shard_bytes` (a larger tensor has a shard of its own) and their index."""
    shards: list[list[Pending]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(other.bytes for other in shards[-1]) + tensor.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)

    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        index = {
            "metadata": {"total_size": sum(tensor.bytes for tensor in tensors)},
            "weight_map": {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
        }
        write_json(dir / f"{stem}.safetensors.index.json", index)
    for name, shard in zip(names, shards, strict=True):
        # `transformers` refuses files that do not say which framework's conventions they follow.
        save_file({tensor.name: tensor.fetch() for tensor in shard}, dir / name, metadata={"format": "pt"})
        # The library makes it readable by its owner alone; an export is served by others.
        (dir / name).chmod(dir.stat().st_mode & 0o666)


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_directory(dir: Path, *, overwrite: bool, mark: str = "config.json") -> Iterator[Path]:
    """A directory to fill, which takes the name `dir` when the block ends and vanishes if the block raises.

    `overwrite` replaces an earlier export, recognised by the file `mark` in it, and never any other directory: with a
    wrong path, what would be lost is somebody's home.
    """
    dir = Path(dir).absolute()
    if dir.is_file():
        raise ValueError(f"{dir} is a file; choose a directory")
    if dir.is_dir() and any(dir.iterdir()):
        if not overwrite:
            raise ValueError(f"{dir} is not empty; choose another directory, or replace it with `overwrite=True`")
        if not (dir / mark).is_file():
            raise ValueError(f"{dir} is not empty and has no {mark}: not an earlier export, so it is not replaced")
    dir.parent.mkdir(parents=True, exist_ok=True)
    new = dir.with_name(f".{dir.name}.{uuid.uuid4().hex}")
    old = new.with_name(new.name + ".old")
    new.mkdir()
    try:
        yield new
        if dir.exists():
            dir.rename(old)
        new.rename(dir)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not dir.exists():
            old.rename(dir)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _headers(file: Path) -> list[Stored]:
    with _open(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}
        return [Stored(file, name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()]


@contextlib.contextmanager
def _open(file: Path):
    try:
        with safe_open(file, framework="np") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{file} is not a complete safetensors file ({error}); copy or download it again") from error
