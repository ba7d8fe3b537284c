"""The header of a GGUF file, walked before the `gguf` package reads it.

That package believes every length. A damaged one keeps it busy until memory is full, and a file that was cut
off fails somewhere in NumPy. Here both are errors that say what is wrong.
"""

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np


# The bytes of a value, by the number of its type: u8, i8, u16, i16, u32, i32, f32, bool, then u64, i64, f64.
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY, _U32 = 8, 9, 4


def check_header(file: Path, package: Any) -> None:
    """Raises `ValueError` unless `file` is a whole GGUF file. `package` is `gguf`, which knows the types."""
    if not file.is_file():
        found = "is a directory; pass the .gguf file in it" if file.is_dir() else "is no file"
        raise ValueError(f"`file` is {str(file)!r}, which {found}.")
    size = file.stat().st_size
    data = np.memmap(file, np.uint8, mode="r") if size else np.zeros(0, np.uint8)
    if data[:4].tobytes() != b"GGUF":
        raise ValueError(f"{file} is not a GGUF file: it does not begin with 'GGUF'; download it again.")
    walk = _Walk(file, data, 4)
    version = walk.number("<I")
    if version & 0xFFFF == 0 and version:
        raise ValueError(f"{file} was written for big-endian machines; convert it with llama.cpp.")
    if version not in (2, 3):
        raise ValueError(f"{file} is GGUF of version {version}; versions 2 and 3 are read.")
    tensors, keys = walk.number("<Q"), walk.number("<Q")
    alignment = 32
    for _ in range(keys):
        name, kind = walk.text(), walk.number("<I")
        if name == "general.alignment" and kind == _U32:
            alignment = walk.number("<I")
        else:
            walk.skip_value(kind)
    infos = [walk.tensor() for _ in range(tensors)]
    start = walk.at + -walk.at % max(alignment, 1)
    for name, dims, kind, offset in infos:
        try:
            per_block, width = package.GGML_QUANT_SIZES[package.GGMLQuantizationType(kind)]
        except ValueError:
            raise ValueError(
                f"{file} stores {name!r} in type {kind}, which the installed `gguf` package does not know: "
                "pip install --upgrade gguf."
            ) from None
        if dims[:1] and dims[0] % per_block:
            raise ValueError(f"{file} is damaged: {name!r} has rows of {dims[0]}, no whole blocks.")
        end = start + offset + math.prod(dims) // per_block * width
        if end > size:
            raise ValueError(
                f"{file} was cut off: {name!r} ends at byte {end}, and the file has {size} bytes; download "
                "it again."
            )


class _Walk:
    """A place in a header, and what it takes to go on."""

    def __init__(self, file: Path, data: np.ndarray, at: int) -> None:
        self.file, self.data, self.at = file, data, at

    def skip(self, count: int) -> None:
        if self.at + count > len(self.data):
            raise ValueError(
                f"{self.file} was cut off or is damaged: its header goes on at byte {self.at + count}, and "
                f"the file has {len(self.data)} bytes; download it again."
            )
        self.at += count

    def number(self, form: str) -> int:
        start = self.at
        self.skip(struct.calcsize(form))
        return struct.unpack(form, self.data[start : self.at].tobytes())[0]

    def text(self) -> str:
        length = self.number("<Q")
        start = self.at
        self.skip(length)
        return self.data[start : self.at].tobytes().decode("utf-8", "replace")

    def skip_value(self, kind: int) -> None:
        if kind == _STRING:
            self.skip(self.number("<Q"))
        elif kind == _ARRAY:
            inner, count = self.number("<I"), self.number("<Q")
            if inner in _WIDTHS:
                self.skip(_WIDTHS[inner] * count)
            elif inner == _STRING:
                for _ in range(count):
                    self.skip(self.number("<Q"))
            else:
                raise ValueError(f"{self.file} is damaged: an array of type {inner}; download it again.")
        elif kind in _WIDTHS:
            self.skip(_WIDTHS[kind])
        else:
            raise ValueError(f"{self.file} is damaged: a value of type {kind}; download it again.")

    def tensor(self) -> tuple[str, list[int], int, int]:
        """A tensor's name, dimensions, type and offset."""
        name, count = self.text(), self.number("<I")
        dims = [self.number("<Q") for _ in range(count)]
        return name, dims, self.number("<I"), self.number("<Q")
