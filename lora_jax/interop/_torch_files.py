"""PyTorch's files (`.bin`, `.pt`; a zip of a pickle and of bytes), read and written without PyTorch and without running a pickle.

No unpickler is at work here: it would call, set attributes and hash as the file says. `_contents` follows the pickle's opcodes,
of which it knows those that make dicts, lists, tuples, numbers, text and tensors, and refuses every other. A file that `write` made
carries facts and its own SHA-256, so that `facts_of` finds any bit that has changed since. Left out: files of PyTorch before
1.6, big-endian ones, dtypes younger than bfloat16, sparse, quantised and complex tensors, and attributes on tensors and dicts.
"""

import collections
import contextlib
import dataclasses
import math
import os
import pickletools
import re
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ._files import NO_DIGITS, checked_facts, digest, json_of

_DTYPES = {
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": np.dtype(jnp.bfloat16),
    "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.BoolStorage": np.dtype(bool),
}
_STORAGES = {dtype: word for word, dtype in _DTYPES.items()}
_KNOWN = {
    *_DTYPES,
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
}
_ZIP = b"PK\x03\x04"
_COMMENT = b"lora_jax sha256 "
_ALIGNED = 64  # to what PyTorch aligns its tensors in the file
_SAVE = "load it with PyTorch where you trust it, and save `{name: tensor}` only"
# Bounds on what a small file may stand for; real ones are far below.
_MOST_VALUES = 10_000_000
_MOST_REPEATED = 2**26


class _Refused(ValueError):
    """What is said of a file in full, beside the errors of the zip and pickle formats."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Name:
    """What a pickle calls `module.name`: here a word, which stands for nothing."""

    word: str


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    array: np.ndarray  # flat, read-only


def read(file: Path) -> Any:
    """What `torch.save` wrote: dicts, lists, tuples, numbers and text as they were, and each tensor or parameter as a read-only array.

    A device or layout is its name, a `torch.Size` a tuple. Tensors that shared memory share it still.

    Raises `ValueError` for a file that is damaged, or that asks for anything else, which would be code to run.
    """
    with _opened(file) as (archive, root):
        record = f"{root}/byteorder"  # younger than the format
        order = archive.read(record) if record in archive.namelist() else b"little"
        if order != b"little":
            raise _Refused(f"{file} has the byte order {order[:16]!r} and must have b'little'; save it again on a little-endian machine")
        storages: dict[str, _Storage] = {}

        def storage_of(identity: Any) -> _Storage:
            match identity:
                case ("storage", _Name(word), str(key), str(), int(count)) if word in _DTYPES:
                    if key not in storages:
                        storages[key] = _Storage(np.frombuffer(archive.read(f"{root}/data/{key}"), _DTYPES[word]))
                    array = storages[key].array
                    if array.dtype == _DTYPES[word] and array.size == count:
                        return storages[key]
            raise ValueError("a storage is not described as PyTorch does, or has another size than described")

        contents = _contents(file, archive.read(f"{root}/data.pkl"), storage_of)
        _check_values(contents)
        return contents


def write(file: Path, tensors: Mapping[str, np.ndarray], *, facts: dict[str, Any]) -> None:
    """A state dict, `{name: tensor}`, as `torch.load(file, weights_only=True)` reads it; it appears complete or not at all."""
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    for name, array in arrays.items():
        if array.dtype not in _STORAGES:
            raise ValueError(f"`tensors` has {name!r} with dtype {array.dtype}, which must be one of {[str(dtype) for dtype in _STORAGES]}")
    new = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with open(new, "xb") as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            _add(archive, stream, "data.pkl", _pickle(arrays))
            _add(archive, stream, "byteorder", b"little")
            for key, array in enumerate(arrays.values()):
                _add(archive, stream, f"data/{key}", array.reshape(-1).view(np.uint8))
            _add(archive, stream, "version", b"3\n")
            _add(archive, stream, "lora_jax.json", json_of(facts).encode())
            archive.comment = _COMMENT + NO_DIGITS.encode()
        digits_at = new.stat().st_size - len(NO_DIGITS)
        digits = digest(new, digits_at=digits_at)
        with open(new, "r+b") as stream:
            stream.seek(digits_at)
            stream.write(digits.encode())
        os.replace(new, file)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def facts_of(file: Path, *, verify: bool = True) -> dict[str, Any] | None:
    """The facts that `write` was given, after a check of every bit of the file; None for a file without a checksum of ours.

    `verify=False` accepts a file that was changed on purpose.
    """
    with _opened(file) as (archive, root):
        record = f"{root}/lora_jax.json"
        facts = archive.read(record).decode() if record in archive.namelist() else None
        carried = re.fullmatch(re.escape(_COMMENT) + b"([0-9a-f]{64})", archive.comment)
    digits = carried and carried[1].decode()
    return checked_facts(file, facts, digits, file.stat().st_size - len(NO_DIGITS), verify=verify)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[tuple[zipfile.ZipFile, str]]:
    """The zip and the name of its one folder; what goes wrong inside the block is the file's fault."""
    with open(file, "rb") as stream:
        start = stream.read(len(_ZIP))
        if start[:1] == b"\x80":
            raise _Refused(f"{file} has the format that PyTorch wrote before 1.6; load it with PyTorch where you trust it, and save it again")
        if start != _ZIP:
            raise _Refused(f"{file} is not a PyTorch file: it begins with {start!r}, not with {_ZIP!r}; copy or download it again")
        try:
            with zipfile.ZipFile(stream) as archive:
                yield archive, _root(file, archive)
        except _Refused:
            raise
        # A damaged or hostile file makes `zipfile` and `pickletools` raise nearly anything.
        except Exception as error:
            raise ValueError(f"{file} is damaged, or no plain PyTorch file ({type(error).__name__}: {error}); copy or download it again") from error


def _root(file: Path, archive: zipfile.ZipFile) -> str:
    records = archive.infolist()
    names = {record.filename for record in records}
    if len(names) != len(records):
        raise ValueError("it has two records of one name")
    # Compressed, or lying over each other, a few bytes could fill the memory.
    if any(record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size for record in records):
        raise _Refused(f"{file} is a compressed zip, which PyTorch does not write; save it again with `torch.save`")
    if sum(record.file_size for record in records) > file.stat().st_size:
        raise ValueError("its records are larger than itself")
    roots = [name[: -len("/data.pkl")] for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise _Refused(f"{file} is a zip with {len(roots)} records `*/data.pkl`, not the one that `torch.save` writes")
    return roots[0]


def _contents(file: Path, pickle: bytes, storage_of: Callable[[Any], _Storage]) -> Any:
    """What a pickle describes. The only things called are the functions of this file."""
    stack: list[Any] = []
    outer: list[list[Any]] = []  # the stacks below each mark
    memo: dict[int, Any] = {}
    for opcode, argument, position in pickletools.genops(pickle):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "NONE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "SHORT_BINUNICODE" | "BINUNICODE":
                stack.append(argument)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[opcode.name]())
            case "MARK":
                outer.append(stack)
                stack = []
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple([stack.pop() for _ in range(int(opcode.name[-1]))][::-1]))
            case "TUPLE" | "APPENDS" | "SETITEMS":
                items, stack = stack, outer.pop()
                if opcode.name == "TUPLE":
                    stack.append(tuple(items))
                else:
                    _fill(stack[-1], items, list if opcode.name == "APPENDS" else dict)
            case "APPEND":
                item = stack.pop()
                _fill(stack[-1], [item], list)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _fill(stack[-1], [key, value], dict)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_known(file, *argument.split(" ")))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_known(file, module, name))
            case "BINPERSID":
                stack.append(storage_of(stack.pop()))
            case "REDUCE":
                arguments, name = stack.pop(), stack.pop()
                stack.append(_made(name, arguments))
            case "BUILD":  # only for what hangs on the dict of `Module.state_dict()`: versions of modules
                if not isinstance(stack.pop(), dict) or not isinstance(stack[-1], collections.OrderedDict):
                    raise ValueError("it sets the state of something that has none")
            case "STOP":
                if len(stack) != 1 or outer or position != len(pickle) - 1:
                    raise ValueError("its pickle ends with something left over")
                return stack[0]
            case other:
                raise _Refused(f"{file} has the opcode {other} in its pickle, which no state dict needs; {_SAVE}")
    raise ValueError("its pickle has no end")


def _known(file: Path, module: Any, name: Any) -> _Name:
    if type(module) is not str or type(name) is not str:
        raise ValueError("it asks for something without a name")
    word = f"{module}.{name}"
    if word not in _KNOWN:
        raise _Refused(f"{file} asks for {word!r}, and code that files ask for is never run; {_SAVE}")
    return _Name(word)


def _fill(container: Any, items: list[Any], kind: type) -> None:
    if not isinstance(container, kind):
        raise ValueError(f"it puts items of a {kind.__name__} into a {type(container).__name__}")
    if kind is list:
        container.extend(items)
        return
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Nothing else is hashed: the hash of a tuple of tuples can take for ever.
        if type(key) not in (str, int, float, bool):
            raise ValueError(f"a dict has a {type(key).__name__} as a key")
        if key in container:
            raise ValueError(f"a dict has {key!r} twice")
        container[key] = value


def _made(name: Any, arguments: Any) -> Any:
    """What the functions that a pickle may name would return, each for the arguments that PyTorch gives it."""
    match name, arguments:
        case _Name("collections.OrderedDict"), ():
            return collections.OrderedDict()
        # Marks: `neg`, of a tensor that PyTorch has yet to negate.
        case _Name("torch._utils._rebuild_tensor_v2"), (
            _Storage(array), offset, tuple(size), tuple(stride), bool(), collections.OrderedDict(), *marks
        ) if marks in ([], [{}]):
            return _view(array, offset, size, stride)
        case _Name("torch._utils._rebuild_parameter"), (np.ndarray() as array, bool(), collections.OrderedDict()):
            return array
        case _Name("torch._utils._rebuild_parameter_with_state"), (np.ndarray() as array, bool(), collections.OrderedDict(), _):
            return array
        case _Name("torch.Size"), (tuple(size),) if all(type(length) is int for length in size):
            return size
        case _Name("torch.device"), (str(kind), *index) if all(type(number) is int for number in index):
            return ":".join([kind, *map(str, index)])
        case _Name("torch.serialization._get_layout"), (str(layout),):
            return layout
    raise ValueError(f"it calls {name.word if isinstance(name, _Name) else type(name).__name__!r} with arguments that are not a plain tensor's")


def _view(array: np.ndarray, offset: Any, size: tuple, stride: tuple) -> np.ndarray:
    """A tensor of a storage; never one of bytes outside it."""
    if len(size) != len(stride) or not all(type(number) is int and number >= 0 for number in (offset, *size, *stride)):
        raise ValueError("a tensor has an offset, a size and strides that are not natural numbers, as many of one as of the other")
    count = math.prod(size)
    end = offset + (sum((length - 1) * step for length, step in zip(size, stride, strict=True)) + 1 if count else 0)
    if end > array.size or count > max(array.size, _MOST_REPEATED):
        raise ValueError(f"a tensor with offset {offset}, size {size} and strides {stride} does not fit into its storage of {array.size}")
    steps = tuple(step * array.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(array[offset:], size, steps, writeable=False)


def _check_values(contents: Any) -> None:
    """No part of the machinery among the values, nothing that holds itself, and no few dicts that stand for millions."""
    counts: dict[int, int | None] = {}

    def count(value: Any) -> int:
        if isinstance(value, _Name | _Storage):
            raise ValueError(f"it holds a {value.word if isinstance(value, _Name) else 'storage'!r} as a value")
        if not isinstance(value, dict | list | tuple):
            return 1
        if id(value) not in counts:
            counts[id(value)] = None
            counts[id(value)] = 1 + sum(map(count, value.values() if isinstance(value, dict) else value))
        found = counts[id(value)]
        if found is None or found > _MOST_VALUES:
            raise ValueError("it has a value that holds itself" if found is None else f"it has over {_MOST_VALUES} values")
        return found

    count(contents)


def _add(archive: zipfile.ZipFile, stream, name: str, data: Any) -> None:
    record = zipfile.ZipInfo(f"archive/{name}")  # of 1980, so that equal tensors give equal files
    record.create_system, record.external_attr = 3, 0o644 << 16
    room = -(stream.tell() + zipfile.sizeFileHeader + len(record.filename) + 4) % _ALIGNED
    record.extra = b"FB" + room.to_bytes(2, "little") + b"Z" * room
    archive.writestr(record, data)


def _pickle(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The state dict in pickle's protocol 2, which is what `weights_only=True` takes."""
    parts = [b"\x80\x02}("]
    for key, (name, array) in enumerate(arrays.items()):
        strides = [math.prod(max(length, 1) for length in array.shape[axis + 1 :]) for axis in range(array.ndim)]
        storage = [_text("storage"), _global(_STORAGES[array.dtype]), _text(str(key)), _text("cpu"), _integer(array.size)]
        hooks = _global("collections.OrderedDict") + b")R"
        sizes = [_tuple(map(_integer, array.shape)), _tuple(map(_integer, strides))]
        tensor = _tuple([_tuple(storage) + b"Q", _integer(0), *sizes, b"\x89", hooks])
        parts += [_text(name), _global("torch._utils._rebuild_tensor_v2"), tensor, b"R"]
    return b"".join([*parts, b"u."])


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def _integer(number: int) -> bytes:
    return b"J" + number.to_bytes(4, "little") if number < 2**31 else b"\x8a\x08" + number.to_bytes(8, "little")


def _tuple(items) -> bytes:
    return b"".join([b"(", *items, b"t"])


def _global(word: str) -> bytes:
    module, _, name = word.rpartition(".")
    return f"c{module}\n{name}\n".encode()
