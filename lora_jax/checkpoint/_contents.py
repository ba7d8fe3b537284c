"""What one checkpoint holds: what it says of itself, and its arrays by path, checked against what was saved
and against what is wanted.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .._paths import component
from ..processes import KINDS, together
from . import _checksum, _storage
from ._storage import Damaged


# The format on the disk. In format 1 the checksums were not computed on the devices.
FORMAT = 2
# A damaged checkpoint is passed over, unless another process has met something worse.
_KINDS: tuple[type[Exception], ...] = (Damaged, *KINDS)


def complete(facts: Mapping[str, Any], arrays: dict[str, dict[str, jax.Array]], sums: Any) -> dict[str, Any]:
    """`facts` with what they say of the arrays, and a digest of all. `sums`: the arrays' `checksums`, which
    are computed here if they are None.
    """
    found = {
        **facts,
        "arrays": {part: _described(own) for part, own in arrays.items()},
        "sums": _digits(checksums(arrays) if sums is None else sums),
    }
    return {**found, "facts": _digest(found)}


def facts_of(path: Path) -> dict[str, Any]:
    """What the checkpoint at `path` says of itself.

    Raises:
      Damaged: it has changed since it was saved.
      ValueError: it has another format.
    """
    found = _storage.read_facts(path)
    if found.pop("facts", None) != _digest(found) or found.get("step") != int(path.name):
        raise Damaged("what it says of itself has changed since it was saved")
    if found.get("format") != FORMAT:
        raise ValueError(
            f"`{path.parent}` holds checkpoints of format {found.get('format', 1)}, and this "
            f"version of lora_jax reads {FORMAT}: "
            "resume the run with the version that began it, or use another directory."
        )
    return found


def read(
    path: Path, wanted: dict[str, Any], identity: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The facts and the arrays of the checkpoint at `path`, with the structures, shapes, dtypes and shardings
    of `wanted`.

    Raises:
      Damaged: on one process or on all.
      ValueError: the identity is another; an array differs in name, shape or dtype.
    """
    like = {part: _shapes(named(tree)) for part, tree in wanted.items()}

    def checked() -> dict[str, Any]:
        found = facts_of(path)
        _check_identity(path.parent, found["identity"], identity)
        _check_arrays(path, found["arrays"], like)
        return found

    found = together(checked, _KINDS)
    arrays = together(lambda: _storage.read_arrays(path, like), _KINDS)
    # The arrays may span processes, so that every process takes part, also one whose own are damaged.
    sums = _digits(checksums({part: arrays[part] for part in wanted}))

    def compared() -> None:
        if any(sums[part] != found["sums"][part] for part in wanted):
            raise Damaged("its arrays do not have the checksum that they were saved with")

    together(compared, _KINDS)
    return found, {part: _refill(tree, arrays[part]) for part, tree in wanted.items()}


def named(tree: Any) -> dict[str, jax.Array]:
    """Arrays by path. Joined by `.`, since Orbax makes file names of the names."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [".".join(component(entry) for entry in path) or "value" for path, _ in flat]
    repeated = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else None
    if repeated:
        raise ValueError(f"two arrays have the same path {sorted(repeated)[0]!r}; rename one.")
    return dict(zip(names, (leaf for _, leaf in flat), strict=True))


def checksums(arrays: dict[str, dict[str, jax.Array]]) -> dict[str, dict[str, jax.Array]]:
    return {
        part: {name: _checksum.checksum(leaf) for name, leaf in own.items()} for part, own in arrays.items()
    }


def _check_identity(directory: Path, found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"`{directory}` holds a run with another {name} (saved: {found.get(name)}, now: "
                f"{wanted.get(name)}): "
                f"resume it with the {name} it started from, or use another directory."
            )


def _check_arrays(path: Path, stored: Mapping[str, Any], like: dict[str, Any]) -> None:
    for part, shapes in like.items():
        want, have = _described(shapes), stored[part]
        for name in sorted(want.keys() ^ have.keys()):
            where = "missing from" if name in want else "unexpected in"
            raise ValueError(
                f"{part} {name!r} is {where} the checkpoint of step {path.name} in `{path.parent}`."
            )
        for name, expected in want.items():
            if have[name] != expected:
                raise ValueError(
                    f"{part} {name!r} has shape and dtype {tuple(have[name])} in the checkpoint, "
                    f"expected {tuple(expected)}."
                )


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _digits(sums: dict[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    """The checksums as JSON has them, 32 hexadecimal digits each; fetched all at once."""
    return jax.tree.map(lambda words: words.astype(">u4").tobytes().hex(), jax.device_get(sums))


def _described(arrays: Mapping[str, Any]) -> dict[str, list]:
    """Shape and dtype by name, as JSON has them."""
    return {name: [list(leaf.shape), str(np.dtype(leaf.dtype))] for name, leaf in arrays.items()}


def _refill(tree: Any, arrays: dict[str, jax.Array]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(tree), [arrays[name] for name in named(tree)])


def _shapes(arrays: dict[str, jax.Array]) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, leaf in arrays.items()
    }
