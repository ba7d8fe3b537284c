"""What several processes of `jax.distributed` tell each other, and one protocol for a failure: all raise,
or none does.

Every process runs the same code and calls the same functions in the same order, in the thread that trains,
because the devices exchange what is said. A process that fails says so at the next exchange, where the
others wait for it: they learn there what happened, and raise too. With one process nothing is exchanged.
Left out: processes that die, which JAX's own service notices, and file systems that the processes do not
share.
"""

import contextlib
import contextvars
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh


Result = TypeVar("Result")

# The kinds of an error that another process learns of; the later, the graver. An error of no kind counts as
# the last.
KINDS: tuple[type[Exception], ...] = (ValueError, OSError, RuntimeError)

_in_block = contextvars.ContextVar("_in_block", default=False)


class Elsewhere(Exception):
    """An error that another process has met. It is an instance of the error's kind too.

    ```python
    try:
        lora_jax.processes.on_first(read)
    except lora_jax.processes.Elsewhere as error:
        print(f"process {error.process} failed: {error}")
    ```
    """

    process: int


def exchange(value: Any) -> list[Any]:
    """The value of every process, in their order, on every process. JSON must be able to hold it.

    >>> import lora_jax
    >>> lora_jax.processes.exchange({"rows": 8})
    [{'rows': 8}]
    """
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = _gathered(np.array(text.size, np.int32)).reshape(-1)
    # A power of two, so that few lengths are compiled for.
    padded = np.zeros(max(256, 1 << int(sizes.max() - 1).bit_length()), np.uint8)
    padded[: text.size] = text
    rows = _gathered(padded).reshape(sizes.size, -1)
    return [json.loads(rows[index, :size].tobytes()) for index, size in enumerate(sizes)]


def on_first(work: Callable[[], Result], kinds: tuple[type[Exception], ...] = KINDS) -> Result:
    """`work()` by process 0 alone. The others wait for its result, which JSON must be able to hold.

    >>> import lora_jax
    >>> lora_jax.processes.on_first(lambda: "written")
    'written'

    Raises:
      Exception: process 0 raised it; in the others it is an `Elsewhere`, as from `together`.
    """
    if jax.process_count() == 1:
        return work()
    result: str | None = None
    error: Exception | None = None
    if jax.process_index() == 0:
        try:
            result = json.dumps(work())
        except Exception as raised:  # told before it is raised: the others would wait for ever
            error = raised
    return json.loads(_settled(result, error, kinds)[0])


def together(work: Callable[[], Result], kinds: tuple[type[Exception], ...] = KINDS) -> Result:
    """`work()` by every process. Where it raises in one, it raises in all.

    >>> import lora_jax
    >>> lora_jax.processes.together(lambda: 2 + 2)
    4

    Args:
      kinds: the kinds of an error that others learn of; the later, the graver.

    Raises:
      Exception: one process raised it. Of several errors the gravest counts, and of equal ones that of the
        first process. A process whose own error is as grave raises its own; another raises an `Elsewhere`
        of the same kind, whose text names the process.
    """
    if jax.process_count() == 1:
        return work()
    result: Any = None
    error: Exception | None = None
    try:
        result = work()
    except Exception as raised:
        error = raised
    _settled(None, error, kinds)
    return result


class _Agreed(Exception):
    """An error that all processes know of by now. It is no `ValueError`, which code on the way may take for
    its own.
    """


@contextlib.contextmanager
def all_or_none(span: bool) -> Iterator[bool]:
    """A block that ends for all processes at once: well, or with an error in each. It yields whether this
    process is the one that writes.

    ```python
    with processes.all_or_none(processes.spanning(params)) as writes:
        for name, leaf in leaves:
            array = processes.on_host(leaf)     # all processes fetch the same arrays in the same order
            if writes:
                file.write(array.tobytes())
    ```

    >>> import lora_jax
    >>> with lora_jax.processes.all_or_none(False) as writes:
    ...     print(writes)
    True

    Args:
      span: whether the block concerns all processes. Otherwise it is this process's own affair: it writes,
        and nothing is exchanged.

    Raises:
      Exception: one process raised it within the block; as from `together`.
    """
    if not span:
        yield True
        return
    token = _in_block.set(True)
    try:
        yield jax.process_index() == 0
    except _Agreed as agreed:
        raise agreed.args[0] from None
    except Exception as error:
        _settled(None, error, KINDS)
    else:
        _settled(None, None, KINDS)
    finally:
        _in_block.reset(token)


def agree() -> None:
    """Ends the block of `all_or_none` in all processes if one of them has failed. It is called before what
    needs them all, and does nothing outside of a block.

    >>> import lora_jax
    >>> lora_jax.processes.agree()
    """
    if _in_block.get():
        try:
            _settled(None, None, KINDS)
        except Elsewhere as error:
            raise _Agreed(error) from None


def spanning(*trees: Any) -> bool:
    """Whether an array of these trees, or a mesh among them, spans the processes. False: all of it is this
    process's own.

    >>> import jax.numpy as jnp, lora_jax
    >>> lora_jax.processes.spanning({"kernel": jnp.ones((2, 2))})
    False

    Raises:
      ValueError: an array or a mesh is on some of the processes only, or only on another.
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


def on_host(array: Any, layer: int | None = None) -> np.ndarray:
    """The values of an array on this host, wherever its parts are. Only what spans the processes is gathered.

    >>> import jax.numpy as jnp, lora_jax
    >>> lora_jax.processes.on_host(jnp.arange(3))
    array([0, 1, 2], dtype=int32)

    Args:
      layer: the one layer of a stack that is wanted.

    Raises:
      ValueError: the array is on some of the processes only, or only on another.
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array if layer is None else array[layer])
    if array.is_fully_replicated and _reaches_all(array):
        array = array.addressable_data(0)
        return np.asarray(array if layer is None else array[layer])
    if not _reaches_all(array):
        _check_own(array)
    agree()
    return _gathered(array if layer is None else array[layer], tiled=True)


def _gathered(array: Any, tiled: bool = False) -> Any:
    # A module that importing lora_jax need not wait for.
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array, tiled=tiled)


def _settled(value: Any, error: Exception | None, kinds: tuple[type[Exception], ...]) -> list[Any]:
    """The value of each process, told together with whether it has failed. Where one has, this raises."""
    own = None if error is None else (_gravity(error, kinds), _text(error, kinds))
    said = exchange([value, own])
    failed = [(process, *what) for process, (_, what) in enumerate(said) if what is not None]
    if not failed:
        return [value for value, _ in said]
    process, gravity, text = max(failed, key=lambda item: (item[1], -item[0]))
    if error is not None and own is not None and own[0] == gravity:
        raise error
    end = "." if text.endswith(".") else ""
    failure = _elsewhere(kinds[gravity])(f"{text.removesuffix('.')} (process {process}){end}")
    failure.process = process
    raise failure from error


def _gravity(error: Exception, kinds: tuple[type[Exception], ...]) -> int:
    return next((number for number, kind in enumerate(kinds) if isinstance(error, kind)), len(kinds) - 1)


def _text(error: Exception, kinds: tuple[type[Exception], ...]) -> str:
    """What the others learn. The name of the error's class is a part of it where its kind does not say it."""
    text = str(error)
    return text if text and isinstance(error, kinds) else f"{type(error).__name__}: {text}"


@functools.cache
def _elsewhere(kind: type[Exception]) -> Any:
    # Named as its kind, so that a traceback reads like that of the process which has met the error.
    return type(kind.__name__, (Elsewhere, kind), {"__module__": kind.__module__})


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
        what = f"a mesh {dict(leaf.shape)}" if isinstance(leaf, Mesh) else f"an array of shape {leaf.shape}"
        raise ValueError(
            f"{what} is on the devices of the processes {there}, and this is process {jax.process_index()} "
            f"of {jax.process_count()}: what spans processes must span all of them. Make the mesh of all of "
            "`jax.devices()`, or read and write in one process the arrays that are its own."
        )
