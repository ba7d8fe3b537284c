"""A GGUF file as the readers here use it: its settings, and its tensors, not read yet."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..._extras import brought_by
from ._header import check_header


def gguf_package() -> Any:
    """The `gguf` package. The error where it is missing names the extra that brings it."""
    with brought_by("gguf", "lora_jax.interop.gguf"):
        import gguf
    return gguf


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """An open file. Its fields and tensors are those of `gguf.GGUFReader`."""

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, Any]

    def value(self, key: str, default: Any = None) -> Any:
        """A setting. A number in single precision is the shortest decimal that stands for it, as it was
        before it was stored.
        """
        if key not in self.fields:
            return default
        field = self.fields[key]
        value = field.contents()
        if field.types[0].name == "FLOAT32":
            return float(str(np.float32(value)))
        return value

    def length(self, key: str) -> int:
        """How many entries a list has; 0 where it is missing. A vocabulary is not read for that."""
        return len(self.fields[key].data) if key in self.fields else 0

    def stored(self) -> dict[str, "Stored"]:
        return {name: Stored(self.path, tensor) for name, tensor in self.tensors.items()}


def open_gguf(file: str | Path) -> GGUFFile:
    """Raises `ValueError` for anything but one whole GGUF file of a model."""
    package, path = gguf_package(), Path(file)
    check_header(path, package)
    try:
        reader = package.GGUFReader(path)
        found = GGUFFile(path, reader.fields, {tensor.name: tensor for tensor in reader.tensors})
        parts, kind = found.value("split.count", 0), found.value("general.type", "model")
    except Exception as error:  # of whatever class: NumPy's, UnicodeDecodeError, KeyError, …
        raise ValueError(f"{path} is damaged ({error}); download it again.") from error
    if parts > 1:
        raise ValueError(
            f"{path} is one of {parts} parts of a model; join them first, with llama.cpp's `llama-gguf-split "
            "--merge FIRST-PART OUT.gguf`, and pass the file that it writes."
        )
    if kind != "model":
        raise ValueError(
            f"{path} holds a GGUF of type {kind!r} (`general.type`), not a model; pass the model's file."
        )
    return found


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file. Its values are in float32, whatever it is stored in.

    `order`: the row of the file for each row here, where llama.cpp has them in another order. `shift`: how
    much the file's values are above those here.
    """

    file: Path
    tensor: Any
    order: np.ndarray | None = None
    shift: float = 0.0

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(size) for size in self.tensor.shape[::-1])

    @property
    def dtype(self) -> str:
        return "F32"

    def read(self) -> Any:
        """The values: of float32 in the file's own order a read-only map of the file, else `Values`, which
        are made when they are used.
        """
        data = self.tensor.data.view(np.ndarray)
        if self.tensor.tensor_type.name == "F32" and self.order is None and not self.shift:
            return data if data.flags.aligned else data.copy()
        self.check_readable()
        return Values(self)

    def rows(self) -> np.ndarray:
        """The bytes, row by row, in the order of the rows here."""
        data = self.tensor.data.view(np.ndarray)
        return data if self.order is None else data[self.order]

    def check_readable(self) -> None:
        """Raises `ValueError` if `gguf` cannot dequantise the type."""
        package, kind = gguf_package(), self.tensor.tensor_type
        try:
            if kind.name not in ("F32", "F16"):
                block = np.zeros((1, package.GGML_QUANT_SIZES[kind][1]), np.uint8)
                package.dequantize(block, kind)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.file} stores {self.name!r} as {kind.name}, which the `gguf` package cannot "
                "dequantise; convert the file to another type with llama.cpp's `llama-quantize`."
            ) from error


@dataclasses.dataclass(frozen=True)
class Values:
    """The values of a tensor, dequantised when they are indexed, and then only in the rows that it takes.

    `turned`: with the axes of a matrix exchanged.
    """

    stored: Stored
    turned: bool = False

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape[:: -1 if self.turned else 1]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    @property
    def T(self) -> "Values":
        return dataclasses.replace(self, turned=not self.turned)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[()], dtype)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        index = (*index, *[slice(None)] * (len(self.shape) - len(index)))
        rows, *others = index[::-1] if self.turned else index
        data, order = self.stored.tensor.data.view(np.ndarray), self.stored.order
        with np.errstate(all="ignore"):  # of a damaged file; whoever verifies looks at the values
            if data.ndim == 1:
                values = gguf_package().dequantize(data, self.stored.tensor.tensor_type)
                values = (values if order is None else values[order])[rows]
            else:
                chosen = data[rows] if order is None else data[order[rows]]
                values = gguf_package().dequantize(chosen, self.stored.tensor.tensor_type)[:, *others]
        values = values - np.float32(self.stored.shift) if self.stored.shift else values
        return values.T if self.turned else values
