"""Checkpoints of a training run, with Orbax: adapter, optimiser state, step, data position and random key.

The base is never stored, nor what a method keeps beside it in `frozen`: that is made again by the same `lorafy`, with the same key.
It is known by a fingerprint, and so is whatever else must not change between the two halves of a run: `identity` holds a short text
for each, and a checkpoint of another identity is refused, by name. Arrays are stored under their paths, not by the shape of a pytree
class, so that a checkpoint outlives changes of the classes around them. Each carries a checksum, by which a damaged one is known.
Left out: where and how often to save, which is the trainer's business.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from ._paths import component, named_leaves


class State(NamedTuple):
    """What a run needs to go on. `step`: updates done; `position`: (epoch, batch within it) of the next batch."""

    delta: Any
    opt_state: Any
    step: int
    position: tuple[int, int]
    key: jax.Array


def fingerprint(params: Any) -> str:
    """32 hexadecimal digits that change with any name, shape, dtype or value of `params`.

    >>> import jax.numpy as jnp
    >>> fingerprint({"w": jnp.zeros(2)}) == fingerprint({"w": jnp.zeros(2)}) != fingerprint({"v": jnp.zeros(2)})
    True
    """
    digest = hashlib.sha256()
    # Sorted, because two containers of the same arrays may flatten in different orders.
    for path, leaf in sorted(named_leaves(params), key=lambda item: item[0]):
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{path}\0{array.dtype}\0{array.shape}\0".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:32]


class Checkpoints:
    """The checkpoints in one directory, which is created by the first `save`.

    ```python
    with Checkpoints("run/checkpoints", identity={"base": fingerprint(params)}) as checkpoints:
        if checkpoints.latest() is not None:
            state = checkpoints.restore(delta, opt_state)     # shapes and shardings of these two are kept
        checkpoints.save(State(delta, opt_state, step, position, key))
    ```

    `identity`: what must be the same on resume, a short text each. `keep`: how many to keep, the newest ones.
    """

    def __init__(self, directory: str | Path, *, identity: Mapping[str, str], keep: int = 2):
        self._directory = Path(directory).absolute()
        self._identity = dict(identity)
        self._keep = keep
        self._opened: ocp.CheckpointManager | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _manager(self) -> ocp.CheckpointManager:
        if self._opened is None:
            # Written before `save` returns: a step that is reported as saved is on the disk.
            options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, enable_async_checkpointing=False)
            handlers = {"arrays": ocp.StandardCheckpointHandler(), "facts": ocp.JsonCheckpointHandler()}
            self._opened = ocp.CheckpointManager(self._directory, options=options, item_handlers=handlers)
        return self._opened

    def latest(self) -> int | None:
        """The newest complete step, or None; looking creates nothing."""
        return self._manager().latest_step() if self._directory.is_dir() else None

    def save(self, state: State) -> None:
        """Writes `state` under its step, atomically and with a checksum, then forgets the oldest beyond `keep`."""
        arrays = {"delta": _named(state.delta), "opt_state": _named(state.opt_state), "key": jax.random.key_data(state.key)}
        facts = {
            "step": state.step,
            "position": list(state.position),
            "key_impl": str(jax.random.key_impl(state.key)),
            "identity": self._identity,
            "arrays": {part: _described(arrays[part]) for part in ("delta", "opt_state")},
            "values": fingerprint(arrays),
        }
        facts["facts"] = _digest(facts)
        parts = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), facts=ocp.args.JsonSave(facts))
        # `force`: the trainer decides when to save, not the manager's own interval.
        self._manager().save(state.step, args=parts, force=True)

    def restore(self, delta: Any, opt_state: Any, *, step: int | None = None) -> State:
        """The newest intact state, or that of `step`, with the structure, shapes, dtypes and shardings of `delta` and `opt_state`.

        A checkpoint that is cut short, or of which a bit has changed, is passed over with a warning and put aside, as `7.damaged`
        beside where it was; so the run goes on from the one before it.

        Raises `ValueError` for another identity, for arrays that differ in name, shape or dtype, naming the first, and where no
        checkpoint is intact.
        """
        steps = [step] if step is not None else sorted(self._steps(), reverse=True)
        if not steps:
            raise ValueError(f"`{self._directory}` holds no checkpoint")
        damaged: list[tuple[int, str]] = []
        for found in steps:
            try:
                state = self._read(found, delta, opt_state)
            except _Damaged as error:
                damaged.append((found, str(error)))
                continue
            self._put_aside(damaged, found)
            return state
        listed = "; ".join(f"step {number}: {reason}" for number, reason in damaged)
        raise ValueError(f"`{self._directory}` holds no intact checkpoint ({listed}): take one from a copy, or start again in another directory")

    def _steps(self) -> list[int]:
        return list(self._manager().all_steps()) if self._directory.is_dir() else []

    def _read(self, step: int, delta: Any, opt_state: Any) -> State:
        facts = self._facts(step)
        self._check_identity(facts["identity"])
        impl = facts["key_impl"]
        key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=impl)))
        like = {"delta": _shapes(_named(delta)), "opt_state": _shapes(_named(opt_state)), "key": key}
        self._check_arrays(step, facts["arrays"], like)
        try:
            arrays = self._manager().restore(step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(like))).arrays
        except Exception as error:  # whatever the reader meets in a file that is cut short
            raise _Damaged(f"its arrays cannot be read ({type(error).__name__})") from error
        if fingerprint(arrays) != facts["values"]:
            raise _Damaged("its arrays do not have the checksum that they were saved with")
        return State(
            delta=_refill(delta, arrays["delta"]),
            opt_state=_refill(opt_state, arrays["opt_state"]),
            step=facts["step"],
            position=tuple(facts["position"]),
            key=jax.random.wrap_key_data(jax.numpy.asarray(arrays["key"]), impl=impl),
        )

    def _facts(self, step: int) -> dict[str, Any]:
        try:
            facts = dict(self._manager().restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore())).facts)
        except Exception as error:
            raise _Damaged(f"what it says of itself cannot be read ({type(error).__name__})") from error
        if facts.pop("facts", None) != _digest(facts) or facts.get("step") != step:
            raise _Damaged("what it says of itself has changed since it was saved")
        return facts

    def _check_identity(self, found: Mapping[str, str]) -> None:
        for name in [*self._identity, *(name for name in found if name not in self._identity)]:
            if found.get(name) != self._identity.get(name):
                raise ValueError(
                    f"`{self._directory}` holds a run with another {name} (saved: {found.get(name)}, now: {self._identity.get(name)}): "
                    f"resume it with the {name} it started from, or use another directory"
                )

    def _check_arrays(self, step: int, stored: Mapping[str, Any], like: dict[str, Any]) -> None:
        for part in ("delta", "opt_state"):
            want, have = _described(like[part]), stored[part]
            for name in sorted(want.keys() ^ have.keys()):
                where = "missing from" if name in want else "unexpected in"
                raise ValueError(f"{part} {name!r} is {where} the checkpoint of step {step} in `{self._directory}`")
            for name, expected in want.items():
                if have[name] != expected:
                    raise ValueError(f"{part} {name!r} has shape and dtype {tuple(have[name])} in the checkpoint, expected {tuple(expected)}")

    def _put_aside(self, damaged: list[tuple[int, str]], intact: int) -> None:
        for number, reason in damaged:
            warnings.warn(f"the checkpoint of step {number} in `{self._directory}` is damaged: {reason}; going on from step {intact}", stacklevel=3)
            names = (self._directory / f"{number}.damaged{mark}" for mark in ("", *(f".{count}" for count in range(1, 1000))))
            (self._directory / str(number)).rename(next(name for name in names if not name.exists()))
        if damaged:
            self.__exit__()  # the manager remembers the steps that were there


class _Damaged(Exception):
    """Why a checkpoint is not intact."""


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _described(arrays: Mapping[str, Any]) -> dict[str, list]:
    """Shape and dtype by name, as JSON has them."""
    return {name: [list(leaf.shape), str(np.dtype(leaf.dtype))] for name, leaf in arrays.items()}


def _named(tree: Any) -> dict[str, jax.Array]:
    """Arrays by path. Joined by `.`, since Orbax makes file names of the names."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [".".join(component(entry) for entry in path) or "value" for path, _ in flat]
    repeated = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else None
    if repeated:
        raise ValueError(f"two arrays have the same path {sorted(repeated)[0]!r}; rename one")
    return dict(zip(names, (leaf for _, leaf in flat), strict=True))


def _refill(tree: Any, arrays: dict[str, jax.Array]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(tree), [arrays[name] for name in _named(tree)])


def _shapes(arrays: dict[str, jax.Array]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in arrays.items()}
