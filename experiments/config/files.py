"""A config as JSON: read from its file, compared with another, and kept beside a run."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.config.experiment import Config
from experiments.strict_json import build


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config in the JSON file `path`, with what it takes from the one that it is `like`, after
    `overrides` of the form `train.lr=1e-4`.

    Raises `ValueError` or `TypeError` naming the key, the value and what was expected, and the file where it
    is the other one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no config file `{path}`.")
    tree = _read(path)
    if isinstance(tree, dict) and "like" in tree:
        tree = _like(path, build(str, tree["like"], "like"), tree)
    for item in overrides:
        tree = _override(tree, item)
    return build(Config, tree)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"`{path}` is not valid JSON: {error}") from error


def _like(path: Path, name: str, own: dict[str, Any]) -> dict[str, Any]:
    """The config in the file `name` beside `path`, with what `own` says in its place."""
    other = path.parent / name
    if not other.is_file():
        raise FileNotFoundError(
            f"`like` is {name} in `{path}`, and there is no file `{other}`: give its path from this file's "
            "directory."
        )
    whole = _read(other)
    if isinstance(whole, dict) and "like" in whole:
        raise ValueError(
            f"`like` is {name} in `{path}`, which has a `like` itself: name a config that says everything "
            "without one."
        )
    try:
        build(Config, whole)
    except (ValueError, TypeError) as error:
        raise type(error)(f"in `{other}`, which `{path}` is like: {error}") from error
    sections = {key: _section(whole.get(key), value) for key, value in own.items() if key != "like"}
    return {**whole, **sections}


def _section(whole: Any, own: Any) -> Any:
    """`own` in place of `whole`; or key by key, where both are objects and no other kind is named."""
    if not isinstance(whole, dict) or not isinstance(own, dict):
        return own
    kind = next((tag for tag in ("name", "task") if tag in own), None)
    return own if kind is not None and own[kind] != whole.get(kind) else {**whole, **own}


def _override(tree: Any, item: str) -> Any:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ValueError(f"`--set` takes key=value, such as train.lr=1e-4; got {item!r}.")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text  # so that --set base.path=gpt2-medium needs no quotes inside quotes

    def put(node: Any, names: list[str]) -> Any:
        if not names:
            return value
        if node is not None and not isinstance(node, dict):
            raise ValueError(f"`--set {item}`: `{key}` goes below a value that has no keys.")
        return {**(node or {}), names[0]: put((node or {}).get(names[0]), names[1:])}

    return put(tree, key.split("."))


def to_json(config: Config) -> dict[str, Any]:
    """Everything the config says, defaults included, as JSON: what a work directory keeps and a resume
    compares.
    """
    return json.loads(json.dumps(dataclasses.asdict(config)))


def without_defaults(section: Any) -> Any:
    """What the config says beyond the defaults, as JSON: the same in a later version, whose new keys mean
    by default what was done before.
    """
    if not dataclasses.is_dataclass(section):
        return json.loads(json.dumps(section))
    made = lambda field: (
        field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    )
    values = ((field, getattr(section, field.name)) for field in dataclasses.fields(section))
    return {field.name: without_defaults(value) for field, value in values if value != made(field)}


def with_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """`to_json` of an older version's, with the keys that have come since; as it is where it is no config
    any more.
    """
    try:
        return to_json(build(Config, tree))
    except (ValueError, TypeError):
        return tree


def without_mesh(tree: dict[str, Any]) -> dict[str, Any]:
    """A config's JSON without its `mesh`: where arrays lie changes no result beyond rounding."""
    return {name: value for name, value in tree.items() if name != "mesh"}


def difference(old: Any, new: Any, key: str = "") -> str | None:
    """The first key on which two resolved configs differ, with both values; None when they agree."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            found = difference(old.get(name), new.get(name), f"{key}.{name}" if key else name)
            if found:
                return found
        return None
    return None if old == new else f"`{key}` was {json.dumps(old)} and is now {json.dumps(new)}"
