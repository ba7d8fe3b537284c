"""Tensors in safetensors, in one file or in shards with an index: read through memory maps, written one
tensor at a time.

A file that is written with `facts` carries them and its own SHA-256 in its metadata, so that `facts_of` finds
any bit that has changed since. The same tensors and facts give the same bytes. The `safetensors` library
reads every file first and decides whether its header is valid. Left out: dtypes that NumPy does not have, of
four and six bits.
"""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open, SafetensorError

from ._files import checked_facts, digest as digest, json_of, NO_DIGITS, read_weight_map, write_json


_DTYPES = {
    "BOOL": np.dtype(bool),
    **{f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits // 8}") for kind in "UI" for bits in (8, 16, 32, 64)},
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "BF16": np.dtype(jnp.bfloat16),
    **{f"F{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    "C64": np.dtype(np.complex64),
}
_WORDS = {dtype: word for word, dtype in _DTYPES.items()}

# The digits come before all that differs between files, so that they are always in the same place.
_START = '{"__metadata__":{"format":"pt","sha256":"'
_DIGITS_AT = 8 + len(_START)


class Stored(NamedTuple):
    """A tensor in a file, not read yet."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' word: F32, BF16, …
    offset: int  # of its first byte in the file

    def read(self) -> np.ndarray:
        """A read-only view of the file, whose pages are read as they are used."""
        if self.dtype not in _DTYPES:
            raise ValueError(
                f"{self.file}: {self.name!r} has dtype {self.dtype}, which NumPy does not have; it must have "
                f"one of {list(_DTYPES)}."
            )
        dtype = _DTYPES[self.dtype]
        try:
            if math.prod(self.shape) == 0:  # an empty map is an error
                return np.frombuffer(b"", dtype).reshape(self.shape)
            array = np.memmap(self.file, dtype, mode="r", offset=self.offset, shape=self.shape).view(
                np.ndarray
            )
        except (ValueError, OverflowError) as error:
            raise ValueError(
                f"{self.file}: {self.name!r} of shape {self.shape} cannot be read ({error}); copy or "
                "download it again."
            ) from error
        # Old writers did not pad the header, and code that computes may rely on aligned arrays.
        return array if array.flags.aligned else array.copy()


class Pending(NamedTuple):
    """A tensor to be written, not fetched yet, so that only one is in memory at a time."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def stored_tensors(directory: Path, stem: str = "model") -> dict[str, Stored]:
    """Every tensor of `stem.safetensors`, or of the shards that `stem.safetensors.index.json` lists, by
    name.
    """
    whole, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if whole.is_file():
        return {stored.name: stored for stored in _header(whole)[1]}
    if not index.is_file():
        found = sorted(entry.name for entry in directory.iterdir())
        binary = any(name.endswith((".bin", ".pt")) for name in found)
        fix = " Write the .bin files as safetensors with transformers' `save_pretrained`." if binary else ""
        raise ValueError(f"{directory} has neither {whole.name} nor {index.name}; found there: {found}.{fix}")

    files = read_weight_map(index)
    stored = {}
    for shard in sorted(set(files.values())):
        for tensor in _header(directory / shard)[1]:
            if files.get(tensor.name) != shard:
                raise ValueError(
                    f"{directory / shard} holds {tensor.name!r}, which {index.name} does not place there; "
                    "copy or download both again."
                )
            stored[tensor.name] = tensor
    lost = sorted(set(files) - set(stored))
    if lost:
        raise ValueError(
            f"{index} lists {lost[0]!r} in {files[lost[0]]!r}, which does not hold it; copy or download both "
            "again."
        )
    return stored


def write_tensors(
    directory: Path,
    tensors: list[Pending],
    shard_bytes: int,
    stem: str = "model",
    facts: dict[str, Any] | None = None,
) -> None:
    """Writes one file, or shards of at most `shard_bytes` (a larger tensor has a shard of its own) and their
    index.

    With `facts`, a JSON object, each file carries its checksum and these facts, to which the digest of the
    index is added under `beside`. With None the file is like any other tool's.
    """
    _check_pending(tensors)
    shards = _shards(tensors, shard_bytes)
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
            "weight_map": {
                tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard
            },
        }
        file = directory / f"{stem}.safetensors.index.json"
        write_json(file, index)
        if facts is not None:
            facts = {**facts, "beside": {**facts.get("beside", {}), file.name: digest(file)}}
    for name, shard in zip(names, shards, strict=True):
        _write(directory / name, shard, facts)


def fetch_tensors(tensors: list[Pending], shard_bytes: int) -> None:
    """Fetches the tensors in the order in which `write_tensors` does, and keeps none. The other processes
    call this while one writes.
    """
    for shard in _shards(tensors, shard_bytes):
        for tensor in shard:
            tensor.fetch()


def facts_of(file: Path, *, verify: bool = True) -> dict[str, Any] | None:
    """The facts that `write_tensors` was given, after a check of every bit of the file; None for a file
    without a checksum of ours.

    `verify=False` reads only the header, and accepts a file that was changed on purpose.
    """
    metadata, _ = _header(file)
    return checked_facts(file, metadata.get("lora_jax"), metadata.get("sha256"), _DIGITS_AT, verify=verify)


def _shards(tensors: list[Pending], shard_bytes: int) -> list[list[Pending]]:
    shards: list[list[Pending]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + tensor.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    # Larger items first, as the library has them: each tensor then begins at a multiple of its item's size.
    return [sorted(shard, key=lambda tensor: -tensor.dtype.itemsize) for shard in shards]


def _check_pending(tensors: list[Pending]) -> None:
    names = set()
    for tensor in tensors:
        if tensor.name in names or tensor.name == "__metadata__":
            raise ValueError(
                f"`tensors` has the name {tensor.name!r} "
                + ("twice." if tensor.name in names else "which the format keeps for itself.")
                + " Give each tensor a name of its own."
            )
        if tensor.dtype not in _WORDS:
            raise ValueError(
                f"{tensor.name!r} has dtype {tensor.dtype!r}, which safetensors does not have; it must have "
                f"one of {list(_DTYPES)}."
            )
        names.add(tensor.name)


def _write(file: Path, tensors: list[Pending], facts: dict[str, Any] | None) -> None:
    # `transformers` refuses files that do not say which framework's conventions they follow.
    metadata = (
        {"format": "pt"}
        if facts is None
        else {"format": "pt", "sha256": NO_DIGITS, "lora_jax": json_of(facts)}
    )
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": _WORDS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    try:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{file}: the name {error.object[max(0, error.start - 40) : error.end]!r} is not Unicode text "
            f"({error.reason})."
        ) from error
    text += b" " * (-len(text) % 8)

    hashed = hashlib.sha256()
    with open(file, "wb") as stream:
        for part in (len(text).to_bytes(8, "little"), text):
            stream.write(part)
            hashed.update(part)
        for tensor in tensors:
            _append(stream, hashed, tensor)
        if facts is not None:
            stream.seek(_DIGITS_AT)
            stream.write(hashed.hexdigest().encode())


def _append(stream, hashed, tensor: Pending) -> None:
    # A function, so that its array is freed before the next is fetched.
    array = np.asarray(tensor.fetch())
    if array.shape != tensor.shape or array.dtype != tensor.dtype:
        raise ValueError(
            f"{tensor.name!r} was announced as {tensor.dtype} of shape {tensor.shape} and came as "
            f"{array.dtype} of shape {array.shape}."
        )
    # As bytes, because `write` does not take the buffers of bfloat16 arrays.
    data = array.reshape(-1).view(np.uint8)
    stream.write(data)
    hashed.update(data)


def _header(file: Path) -> tuple[dict[str, str], list[Stored]]:
    """The metadata and the tensors of a file that the library accepts."""
    try:
        with safe_open(file, framework="np"):
            pass
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length).decode(), object_pairs_hook=_distinct)
        metadata = header.pop("__metadata__", None) or {}
        entries = [
            (name, tuple(entry["shape"]), entry["dtype"], 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
        ]
    # `TypeError`, because the library also takes `["F32", [1], [0, 4]]` for the description of a tensor.
    except (SafetensorError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is not a complete safetensors file ({error}); copy or download it again."
        ) from error
    return metadata, [Stored(file, *entry) for entry in entries]


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # JSON's readers keep the last of two tensors with one name, and say nothing.
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has the name {next(name for name in names if names.count(name) > 1)!r} twice")
    return found
