"""What a sweep tries: the values of some keys of a config, and an adapter for each combination of them.

One program trains all, so that a key can be swept where its value is data to that program: rates, decays and
scales are numbers, a rank is a padded axis, a seed is a key and an order, and examples are arrays. Other keys
(targets, methods, models) change the program itself.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import config as configs
from experiments.config import Config
from experiments.strict_json import nearest


NUMBERS = ("train.lr", "optimizer.weight_decay")
# Of the methods whose adapters can be padded, and scaled by a number that is data.
PADDED = ("method.rank", "method.alpha")
PADDED_METHODS = ("LoRA", "DoRA")
# The keys of `data` that are the program's: what the loss is, and how long a sequence gets. A task's labels
# are too, once its files are read.
FIXED = ("data.task", "data.seq_len")

Over = dict[str, list[Any]]


def parse(items: Sequence[str]) -> Over:
    """The values of each key.

    >>> parse(["train.lr=1e-4,3e-4", "data.train=a.txt,b.txt"])
    {'train.lr': [0.0001, 0.0003], 'data.train': ['a.txt', 'b.txt']}

    Raises `ValueError` for a key that cannot be swept, without values, or with one of them twice.
    """
    found: Over = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not text:
            raise ValueError(f"`--over` takes KEY=VALUE,VALUE, such as train.lr=1e-4,3e-4; got {item!r}.")
        _check_key(key)
        if key in found:
            raise ValueError(f"`--over {key}` is given twice: pass all its values at once, with commas.")
        found[key] = _values(text)
        for place, value in enumerate(found[key]):
            if value in found[key][:place]:
                raise ValueError(f"`--over {item}` has {json.dumps(value)} twice: each value is tried once.")
    return found


def _check_key(key: str) -> None:
    known = (*NUMBERS, *PADDED, "seed")
    if key in known or key == "data" or (key.startswith("data.") and key not in FIXED):
        return
    raise ValueError(
        f"`--over {key}` cannot be swept in one program, which takes {', '.join(known)} and the files and "
        f"limits of data{nearest(key, known) or ''}. Another key changes the program itself: start a sweep "
        f"for each value, with `--set {key}=VALUE` and a --workdir of its own."
    )


def _values(text: str) -> list[Any]:
    try:
        return json.loads(f"[{text}]")
    except json.JSONDecodeError:
        return [_value(word) for word in text.split(",")]


def _value(word: str) -> Any:
    try:
        return json.loads(word)
    except json.JSONDecodeError:
        return word  # so that names of files need no quotes inside quotes


def combinations(over: Over) -> dict[str, dict[str, Any]]:
    """The values of each adapter, by its name.

    >>> list(combinations({"train.lr": [1e-4, 3e-4], "seed": [0]}))
    ['lr=0.0001,seed=0', 'lr=0.0003,seed=0']
    """
    labels = {key: _labels(values) for key, values in over.items()}
    found = {}
    for places in itertools.product(*(range(len(values)) for values in over.values())):
        chosen = list(zip(over, places, strict=True))
        name = ",".join(f"{key.rpartition('.')[2]}={labels[key][place]}" for key, place in chosen)
        found[name] = {key: over[key][place] for key, place in chosen}
    return found


def _labels(values: Sequence[Any]) -> list[str]:
    """A word for each value, which a file may be called: of a path its last part, of a section its place."""
    words = [Path(value).name if isinstance(value, str) else value for value in values]
    if any(isinstance(word, dict | list) for word in words) or len(set(words)) < len(words):
        return [str(place) for place in range(len(values))]
    return [f"{word:.12g}" if isinstance(word, float) else str(word) for word in words]


def settings(values: Mapping[str, Any]) -> list[str]:
    """These values as `--set` takes them."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def configs_of(path: Path, overrides: Sequence[str], over: Over) -> dict[str, Config]:
    """The config of each adapter: what a run of its own would have.

    Raises `ValueError` or `TypeError` for values that a config refuses, or that one program cannot hold.
    """
    found = {
        name: configs.load(path, [*overrides, *settings(values)])
        for name, values in combinations(over).items()
    }
    if len(found) < 2:
        raise ValueError("`--over` gives one adapter: pass several values, or use `run`.")
    first = next(iter(found.values()))
    method = first.method["name"]
    for key in PADDED:
        if key in over and method not in PADDED_METHODS:
            raise ValueError(
                f"`--over {key}` is for the methods {' and '.join(PADDED_METHODS)}, and `method.name` is "
                f"{method}, whose adapters have no padding that adds nothing: start a sweep for each value, "
                f"with `--set {key}=VALUE`."
            )
    if "seed" in over and first.base.architecture is not None:
        raise ValueError(
            "`--over seed` would draw another base for each seed, as `base.architecture` is drawn from it: "
            "train the base once and name it in `base.run` or `base.path`."
        )
    _check_alike(first)
    if first.train.result != "last":
        raise ValueError(
            f'`train.result` is "{first.train.result}", and a sweep keeps what the last step left: leave it '
            "out, or pass `--set train.result=last`."
        )
    for config in found.values():
        for key in FIXED:
            mine, its = (getattr(section.data, key.removeprefix("data.")) for section in (first, config))
            if mine != its:
                raise ValueError(
                    f"`--over data` has {json.dumps(mine)} and {json.dumps(its)} for `{key}`, which all "
                    "adapters of a sweep share."
                )
    return found


def _check_alike(config: Config) -> None:
    """Raises `ValueError` for what a sweep has not, and a run has."""
    train, base = config.train, config.base
    given = {
        "base.adapter": base.adapter,
        "train.patience": train.patience,
    }
    for key, value in given.items():
        if value is not None:
            raise ValueError(
                f"`{key}` is {value!r}, which a sweep does not have: start a `run` for each value, with "
                "`--set`."
            )
