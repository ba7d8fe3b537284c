"""The pickle in a PyTorch file, read opcode by opcode, and written.

Python's unpickler is not used, because it calls functions, sets attributes and hashes values as the file
says. `unpickled` knows the opcodes that make dicts, lists, tuples, numbers, text and tensors, and refuses
every other. Left out: dtypes younger than bfloat16, sparse, quantised and complex tensors, and attributes on
tensors and dicts.
"""

import collections
import dataclasses
import math
import pickletools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np


STORAGE_DTYPES: dict[str, np.dtype] = {
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
STORAGE_NAMES = {dtype: word for word, dtype in STORAGE_DTYPES.items()}
_KNOWN = {
    *STORAGE_DTYPES,
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
}
_FIX = "load it with PyTorch where you trust it, and save `{name: tensor}` only"
# Bounds on the values that a small file may stand for. Real files are far below.
_MOST_VALUES = 10_000_000
_MOST_REPEATED = 2**26


class Refused(ValueError):
    """An error whose text is complete. Those of the zip and pickle formats get a sentence around them."""


@dataclasses.dataclass(frozen=True, slots=True)
class Name:
    """A function or class that a pickle names, `module.name`: only a word here, never looked up."""

    word: str


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Storage:
    array: np.ndarray  # flat, read-only


def unpickled(file: Path, content: bytes, storage_of: Callable[[Any], Storage]) -> Any:
    """The value that a pickle describes. Only functions of this file are called."""
    stack: list[Any] = []
    outer: list[list[Any]] = []  # the stacks below each mark
    memo: dict[int, Any] = {}
    argument: Any  # the opcode decides its type
    for opcode, argument, position in pickletools.genops(content):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case (
                "NONE"
                | "BININT"
                | "BININT1"
                | "BININT2"
                | "LONG1"
                | "BINFLOAT"
                | "SHORT_BINUNICODE"
                | "BINUNICODE"
            ):
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
                    (_extend if opcode.name == "APPENDS" else _fill)(stack[-1], items)
            case "APPEND":
                item = stack.pop()
                _extend(stack[-1], [item])
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _fill(stack[-1], [key, value])
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
            case "BUILD":  # only for the attribute of `Module.state_dict()` that has the versions of modules
                if not isinstance(stack.pop(), dict) or not isinstance(stack[-1], collections.OrderedDict):
                    raise ValueError("it sets the state of something that has none")
            case "STOP":
                if len(stack) != 1 or outer or position != len(content) - 1:
                    raise ValueError("its pickle ends with something left over")
                return stack[0]
            case other:
                raise Refused(
                    f"{file} has the opcode {other} in its pickle, which no state dict needs; {_FIX}."
                )
    raise ValueError("its pickle has no end")


def _known(file: Path, module: Any, name: Any) -> Name:
    if type(module) is not str or type(name) is not str:
        raise ValueError("it asks for something without a name")
    word = f"{module}.{name}"
    if word not in _KNOWN:
        raise Refused(f"{file} asks for {word!r}, and code that files ask for is never run; {_FIX}.")
    return Name(word)


def _extend(container: Any, items: list[Any]) -> None:
    if not isinstance(container, list):
        raise ValueError(f"it puts items of a list into a {type(container).__name__}")
    container.extend(items)


def _fill(container: Any, items: list[Any]) -> None:
    if not isinstance(container, dict):
        raise ValueError(f"it puts items of a dict into a {type(container).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # No other type is hashed, because the hash of nested tuples can take for ever.
        if type(key) not in (str, int, float, bool):
            raise ValueError(f"a dict has a {type(key).__name__} as a key")
        if key in container:
            raise ValueError(f"a dict has {key!r} twice")
        container[key] = value


def _made(name: Any, arguments: Any) -> Any:
    """The result of a function that a pickle may name, for the arguments that PyTorch gives it."""
    match name, arguments:
        case Name("collections.OrderedDict"), ():
            return collections.OrderedDict()
        # A mark may be `neg`: such a tensor, which PyTorch has yet to negate, is refused.
        case Name("torch._utils._rebuild_tensor_v2"), (
            Storage(array),
            offset,
            tuple(size),
            tuple(stride),
            bool(),
            collections.OrderedDict(),
            *marks,
        ) if marks in ([], [{}]):
            return _view(array, offset, size, stride)
        case Name("torch._utils._rebuild_parameter"), (
            np.ndarray() as array,
            bool(),
            collections.OrderedDict(),
        ):
            return array
        case Name("torch._utils._rebuild_parameter_with_state"), (
            np.ndarray() as array,
            bool(),
            collections.OrderedDict(),
            _,
        ):
            return array
        case Name("torch.Size"), (tuple(size),) if all(type(length) is int for length in size):
            return size
        case Name("torch.device"), (str(kind), *index) if all(type(number) is int for number in index):
            return ":".join([kind, *map(str, index)])
        case Name("torch.serialization._get_layout"), (str(layout),):
            return layout
    raise ValueError(
        f"it calls {name.word if isinstance(name, Name) else type(name).__name__!r} with arguments that are "
        "not a plain tensor's"
    )


def _view(array: np.ndarray, offset: Any, size: tuple, stride: tuple) -> np.ndarray:
    """The tensor in a storage, after a check that it lies within."""
    if len(size) != len(stride) or not all(
        type(number) is int and number >= 0 for number in (offset, *size, *stride)
    ):
        raise ValueError(
            "a tensor has an offset, a size and strides that are not natural numbers, as many of one as of "
            "the other"
        )
    count = math.prod(size)
    end = offset + (
        sum((length - 1) * step for length, step in zip(size, stride, strict=True)) + 1 if count else 0
    )
    if end > array.size or count > max(array.size, _MOST_REPEATED):
        raise ValueError(
            f"a tensor with offset {offset}, size {size} and strides {stride} does not fit into its storage "
            f"of {array.size}"
        )
    steps = tuple(step * array.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(array[offset:], size, steps, writeable=False)


def check_values(contents: Any) -> None:
    """Raises `ValueError` where a name or a storage is among the values, a value holds itself, or a few dicts
    stand for millions of values.
    """
    counts: dict[int, int | None] = {}

    def count(value: Any) -> int:
        if isinstance(value, Name | Storage):
            raise ValueError(
                f"it holds a {value.word if isinstance(value, Name) else 'storage'!r} as a value"
            )
        if not isinstance(value, dict | list | tuple):
            return 1
        if id(value) not in counts:
            counts[id(value)] = None
            counts[id(value)] = 1 + sum(map(count, value.values() if isinstance(value, dict) else value))
        found = counts[id(value)]
        if found is None or found > _MOST_VALUES:
            raise ValueError(
                "it has a value that holds itself" if found is None else f"it has over {_MOST_VALUES} values"
            )
        return found

    count(contents)


def pickled(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The state dict in pickle's protocol 2, which `weights_only=True` takes."""
    parts = [b"\x80\x02}("]
    for key, (name, array) in enumerate(arrays.items()):
        strides = [
            math.prod(max(length, 1) for length in array.shape[axis + 1 :]) for axis in range(array.ndim)
        ]
        storage = [
            _text("storage"),
            _global(STORAGE_NAMES[array.dtype]),
            _text(str(key)),
            _text("cpu"),
            _integer(array.size),
        ]
        hooks = _global("collections.OrderedDict") + b")R"
        sizes = [_tuple(map(_integer, array.shape)), _tuple(map(_integer, strides))]
        tensor = _tuple([_tuple(storage) + b"Q", _integer(0), *sizes, b"\x89", hooks])
        parts += [_text(name), _global("torch._utils._rebuild_tensor_v2"), tensor, b"R"]
    return b"".join([*parts, b"u."])


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def _integer(number: int) -> bytes:
    return (
        b"J" + number.to_bytes(4, "little") if number < 2**31 else b"\x8a\x08" + number.to_bytes(8, "little")
    )


def _tuple(items) -> bytes:
    return b"".join([b"(", *items, b"t"])


def _global(word: str) -> bytes:
    module, _, name = word.rpartition(".")
    return f"c{module}\n{name}\n".encode()
