"""Reading and writing where arrays span several processes: who writes, how an array comes to the host, and
that all raise if one does.

Each process runs the same code within `together`, fetches arrays in the same order, and process 0 writes.
Before whatever needs the others the processes tell each other whether one has failed (`agree`), and once more
at the end: so the others of a process that has failed, with a full disk for example, wait for it at that
point and nowhere else, learn there what happened, and raise too. Left out: processes that die, which JAX's
own service notices, and file systems that the processes do not share.
"""

import contextlib
import contextvars
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from .._processes import exchange


class _Agreed(Exception):
    """What another process has met, and all know of by now. No `ValueError`, which code on the way may
    take for its own.
    """


_shared = contextvars.ContextVar("_shared", default=False)


def spanning(*trees: Any) -> bool:
    """Whether any array of these trees, or any mesh among them, spans the processes; False for what is this
    process's own.

    Raises `ValueError` for one that is on some of the processes only, or only on another.
    """
    leaves = [
        leaf
        for leaf in jax.tree.leaves(trees)
        if isinstance(leaf, Mesh) or isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    ]
    everywhere = [leaf for leaf in leaves if _reaches_all(leaf)]
    if not everywhere:
        for leaf in leaves:
            _check_own(leaf)
    return bool(everywhere)


@contextlib.contextmanager
def together(span: bool) -> Iterator[bool]:
    """A block that all processes run if `span`, and that ends for all of them at once: well, or with an error
    in each. True for the one that writes.

    Unless `span`, it is this process's own affair: True, and nothing is exchanged.
    """
    if not span:
        yield True
        return
    token = _shared.set(True)
    try:
        yield jax.process_index() == 0
    except _Agreed as error:
        raise error.args[0] from None
    except Exception as error:
        _exchange(error)
        raise
    else:
        failure = _exchange(None)
        if failure is not None:
            raise failure
    finally:
        _shared.reset(token)


def agree() -> None:
    """Raises in all processes if one of them has failed; to be called before what needs them all. Nothing
    outside of `together`.
    """
    if _shared.get() and (failure := _exchange(None)) is not None:
        raise _Agreed(failure)


def on_host(array: Any, layer: int | None = None) -> np.ndarray:
    """An array, or one layer of a stack, on the host; of those that span the processes nothing else is
    gathered.
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array if layer is None else array[layer])
    if array.is_fully_replicated and _reaches_all(array):
        array = array.addressable_data(0)
        return np.asarray(array if layer is None else array[layer])
    if not _reaches_all(array):
        _check_own(array)
    agree()
    return multihost_utils.process_allgather(array if layer is None else array[layer], tiled=True)


def _devices(leaf: Any) -> Iterable[jax.Device]:
    return leaf.devices.flat if isinstance(leaf, Mesh) else leaf.sharding.device_set


def _reaches_all(leaf: Any) -> bool:
    return (
        jax.process_count() > 1
        and len({device.process_index for device in _devices(leaf)}) == jax.process_count()
    )


def _check_own(leaf: Any) -> None:
    there = sorted({device.process_index for device in _devices(leaf)})
    if there != [jax.process_index()]:
        kind = f"a mesh {dict(leaf.shape)}" if isinstance(leaf, Mesh) else f"an array of shape {leaf.shape}"
        raise ValueError(
            f"{kind} is on the devices of the processes {there}, and this is process {jax.process_index()} "
            f"of {jax.process_count()}: what spans processes must "
            "span all of them; make the mesh of all of `jax.devices()`, or read and write in one process "
            "arrays that are its own"
        )


def _exchange(error: Exception | None) -> Exception | None:
    """What the first process that has failed has met, or None: in each process the same. A `ValueError`
    as such, all else as an `OSError`.
    """
    said = next(
        (said for said in exchange(None if error is None else _said(error)) if said is not None), None
    )
    return None if said is None else ValueError(said[1]) if said[0] else OSError(said[1])


def _said(error: Exception) -> tuple[bool, str]:
    plain = isinstance(error, ValueError) and bool(str(error))
    return (
        plain,
        str(error)
        if plain
        else f"process {jax.process_index()} of {jax.process_count()} failed: "
        f"{type(error).__name__}: {error}",
    )
