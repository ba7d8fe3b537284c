"""Checkpoints of a training run, with Orbax: adapter, optimiser state, step, data position and random key.

The base is never stored, nor what a method keeps beside it in `frozen`: that is made again by the same `lorafy`, with the same key. It is known by a fingerprint, and so is whatever else must not change between the two halves of a run:
`identity` holds a short text for each, and a checkpoint of another identity is refused, by name. Arrays are stored under their
paths, not by the shape of a pytree class, so that a checkpoint outlives changes of the classes around them.
Left out: where and how often to save, which is the trainer's business.
"""

import hashlib
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
        """Writes `state` under its step, atomically, then forgets the oldest beyond `keep`."""
        arrays = {"delta": _named(state.delta), "opt_state": _named(state.opt_state), "key": jax.random.key_data(state.key)}
        facts = {
            "step": state.step,
            "position": list(state.position),
            "key_impl": str(jax.random.key_impl(state.key)),
            "identity": self._identity,
        }
        parts = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), facts=ocp.args.JsonSave(facts))
        # `force`: the trainer decides when to save, not the manager's own interval.
        self._manager().save(state.step, args=parts, force=True)

    def check(self) -> None:
        """Raises `ValueError` when the newest checkpoint belongs to another identity. Reads a few bytes, no array."""
        step = self.latest()
        if step is None:
            return
        found = self._facts(step)["identity"]
        for name in [*self._identity, *(name for name in found if name not in self._identity)]:
            if found.get(name) != self._identity.get(name):
                raise ValueError(
                    f"`{self._directory}` holds a run with another {name} (saved: {found.get(name)}, now: {self._identity.get(name)}): "
                    f"resume it with the {name} it started from, or use another directory"
                )

    def _facts(self, step: int) -> dict[str, Any]:
        return self._manager().restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore())).facts

    def restore(self, delta: Any, opt_state: Any, *, step: int | None = None) -> State:
        """The newest state, or that of `step`, with the structure, shapes, dtypes and shardings of `delta` and `opt_state`.

        Raises `ValueError` for another identity or for arrays that differ in name, shape or dtype, naming the first.
        """
        self.check()
        step = self.latest() if step is None else step
        if step is None:
            raise ValueError(f"`{self._directory}` holds no checkpoint")
        facts = self._facts(step)
        impl = facts["key_impl"]
        key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=impl)))
        like = {"delta": _shapes(_named(delta)), "opt_state": _shapes(_named(opt_state)), "key": key}
        self._check_arrays(step, like)
        arrays = self._manager().restore(step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(like))).arrays
        return State(
            delta=_refill(delta, arrays["delta"]),
            opt_state=_refill(opt_state, arrays["opt_state"]),
            step=facts["step"],
            position=tuple(facts["position"]),
            key=jax.random.wrap_key_data(jax.numpy.asarray(arrays["key"]), impl=impl),
        )

    def _check_arrays(self, step: int, like: dict[str, Any]) -> None:
        stored = self._manager().item_metadata(step).arrays
        for part in ("delta", "opt_state"):
            want, have = like[part], stored[part]
            for name in sorted(want.keys() ^ have.keys()):
                where = "missing from" if name in want else "unexpected in"
                raise ValueError(f"{part} {name!r} is {where} the checkpoint of step {step} in `{self._directory}`")
            for name, leaf in want.items():
                found = (tuple(have[name].shape), np.dtype(have[name].dtype))
                if found != (tuple(leaf.shape), np.dtype(leaf.dtype)):
                    raise ValueError(f"{part} {name!r} has shape and dtype {found} in the checkpoint, expected {(leaf.shape, leaf.dtype)}")


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
