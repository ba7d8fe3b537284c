"""From JSON to frozen dataclasses, refusing whatever the dataclasses do not say.

A config key that is spelled wrong must not leave a default in its place, so every key has to be a field,
every field without a default has to be given, and every value has to have the field's type. Errors name the
key with its dots (`train.lr`), as `--set` takes it. Left out: everything JSON cannot hold.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union


class _UnknownKey(ValueError):
    """A key that its object does not have. The words are those of `_unknown`, where the whole is known."""

    def __init__(self, prefix: str, name: str, known: tuple[str, ...]):
        super().__init__(prefix, name, known)
        self.prefix, self.name, self.known = prefix, name, known


def build(kind: Any, value: Any, key: str = "") -> Any:
    """The value of type `kind` that the JSON `value` describes.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Train:
    ...     lr: float
    ...     steps: int = 10
    >>> build(Train, {"lr": 1})
    Train(lr=1.0, steps=10)
    """
    try:
        return _build(kind, value, key)
    except _UnknownKey as error:
        raise ValueError(_unknown(kind, key, error)) from None


def _unknown(kind: Any, key: str, error: _UnknownKey) -> str:
    prefix = f"{key}." if key else ""
    elsewhere = [f"{prefix}{name}" for name in _keys(kind) if name.rpartition(".")[2] == error.name]
    meant = (
        f"; did you mean {' or '.join(f'`{name}`' for name in elsewhere)}?"
        if elsewhere
        else nearest(error.name, error.known, error.prefix)
    )
    return f"unknown key `{error.prefix}{error.name}`{meant} (known: {', '.join(error.known)})."


def _keys(kind: Any) -> list[str]:
    """Every key below a dataclass with its dots, one of several dataclasses included. The keys of a free
    object are those that its field names as `keys` in its metadata.
    """
    kinds = [option for option in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(option)]
    found = {}
    for option in kinds:
        hints = typing.get_type_hints(option)
        for field in dataclasses.fields(option):
            below = [
                *_keys(hints[field.name]),
                *(field.metadata["keys"]() if "keys" in field.metadata else ()),
            ]
            found |= dict.fromkeys([field.name, *(f"{field.name}.{name}" for name in below)])
    return list(found)


def _build(kind: Any, value: Any, key: str) -> Any:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, key)
    if origin in (Union, types.UnionType):
        return _build_union(typing.get_args(kind), value, key)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ValueError(
                f"{_name(key)} must be {_one_of(choices)}, got {_show(value)}{nearest(value, choices) or '.'}"
            )
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong(key, "a list", value)
        return tuple(_build(typing.get_args(kind)[0], item, f"{key}[{n}]") for n, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(key, "an object", value)
        return {name: _build(typing.get_args(kind)[1], item, f"{key}.{name}") for name, item in value.items()}
    if kind is Any:
        return value
    return _build_scalar(kind, value, key)


def _build_scalar(kind: type, value: Any, key: str) -> Any:
    # A bool is an int to Python, and 3.0 is not an int to a reader: both are refused rather than converted.
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is type(None) and value is None:
        return None
    if type(value) is not kind:
        names = {
            int: "an integer",
            float: "a number",
            bool: "true or false",
            str: "a string",
            type(None): "null",
        }
        raise _wrong(key, names[kind], value)
    return value


def _build_union(kinds: tuple[Any, ...], value: Any, key: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if len(kinds) == 1:
        return _build(kinds[0], value, key)
    if all(dataclasses.is_dataclass(kind) for kind in kinds):
        return _build_tagged(kinds, value, key)
    errors = []
    for kind in kinds:
        try:
            return _build(kind, value, key)
        except TypeError as error:
            errors.append(error)
    raise errors[0]


def _build_tagged(kinds: tuple[Any, ...], value: Any, key: str) -> Any:
    """One of several dataclasses, told apart by their first field, a `Literal` of the values that are its."""
    tag = dataclasses.fields(kinds[0])[0].name
    values = {kind: typing.get_args(typing.get_type_hints(kind)[tag]) for kind in kinds}
    by_tag = {value: kind for kind in kinds for value in values[kind]}
    if not isinstance(value, Mapping):
        raise _wrong(key, "an object", value)
    if tag not in value:
        raise ValueError(f"{_name(key)} lacks the key `{tag}`, which must be {_one_of(by_tag)}.")
    chosen = _build(Literal[tuple(by_tag)], value[tag], f"{key}.{tag}")
    return _build_dataclass(by_tag[chosen], value, key)


def _build_dataclass(kind: Any, value: Any, key: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(key, "an object", value)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in fields:
            raise _UnknownKey(prefix, name, tuple(fields))
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise ValueError(f"missing key `{prefix}{name}`.")
    return kind(**{name: _build(hints[name], item, f"{prefix}{name}") for name, item in value.items()})


def nearest(word: Any, known: Any, prefix: str = "") -> str:
    """`; did you mean \\`lr\\`?` where something known is close to `word`, else nothing."""
    close = difflib.get_close_matches(str(word), [str(name) for name in known], n=1, cutoff=0.5)
    return f"; did you mean `{prefix}{close[0]}`?" if close else ""


def _name(key: str) -> str:
    return f"`{key}`" if key else "the config"


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_of(choices: Any) -> str:
    return "one of " + ", ".join(_show(choice) for choice in choices)


def _wrong(key: str, expected: str, value: Any) -> TypeError:
    kinds = {
        "NoneType": "null",
        "dict": "an object",
        "list": "a list",
        "str": "a string",
        "bool": "a boolean",
    }
    kind = kinds.get(type(value).__name__, type(value).__name__)
    return TypeError(f"{_name(key)} must be {expected}, got {_show(value)} ({kind}).")
