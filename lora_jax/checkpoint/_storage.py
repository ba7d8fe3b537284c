"""One checkpoint on the disk, through Orbax: written in a thread, read by each process for itself.

No thread but the caller's runs a collective of the devices, which would deadlock with those of the training
step: with its processes named one by one, Orbax meets at barriers of `jax.distributed`'s service alone.
"""

import errno
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp


class Damaged(Exception):
    """Why a checkpoint is not intact."""


# Orbax's names of what it has not finished, and ours of what is being removed.
_UNFINISHED = ("*.orbax-checkpoint-tmp*", "*.removed")


class Writer:
    """Writes one checkpoint at a time."""

    def __init__(self):
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def start(
        self, path: Path, arrays: Any, facts: Callable[[], Mapping[str, Any]], then: Callable[[], None]
    ) -> None:
        """Returns when `arrays`, from `copied`, are ready. The thread calls `facts`, and when all is complete
        `then`, on process 0.
        """
        jax.block_until_ready(arrays)
        # `jax.enable_x64` sets it for one thread, and the writing has another.
        wide = jax.dtypes.canonicalize_dtype("float64") == "float64"

        def work() -> None:
            with jax.enable_x64(wide):
                self._write(path, arrays, facts, then)

        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Waits until all is on the disk, or for `seconds`. Raises the error that writing has met, once."""
        if self._thread is not None:
            self._thread.join(seconds)
            self._thread = self._thread if self._thread.is_alive() else None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _write(
        self, path: Path, arrays: Any, facts: Callable[[], Mapping[str, Any]], then: Callable[[], None]
    ) -> None:
        try:
            parts = ocp.args.Composite(
                arrays=ocp.args.PyTreeSave(arrays), facts=ocp.args.JsonSave(dict(facts()))
            )
            # Of Orbax's checkpointers this one waits long enough for the slowest process: twenty minutes.
            processes = ocp.options.MultiprocessingOptions(
                primary_host=0, active_processes=set(range(jax.process_count()))
            )
            options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
            with ocp.AsyncCheckpointer(
                _handler(processes), async_options=options, multiprocessing_options=processes
            ) as checkpointer:
                checkpointer.save(path, args=parts)
                checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                then()
        except BaseException as error:  # nobody else sees an error of a thread
            self._failure = (
                error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__} {error}")
            )
            if jax.process_index() == 0:
                clear_unfinished(path.parent, path.name)


def clear_unfinished(directory: Path, name: str = "") -> None:
    """Removes what is left of writes and removals that failed or were killed: of the checkpoint `name`, or
    of all.
    """
    for pattern in _UNFINISHED:
        for left in directory.glob(name + pattern):
            shutil.rmtree(left, ignore_errors=True)


def remove(path: Path) -> None:
    """Removes a checkpoint, which is renamed first: a process that is killed meanwhile leaves no half
    checkpoint under its number.
    """
    gone = path.with_name(f"{path.name}.removed")
    try:
        path.rename(gone)
    except OSError:
        return  # one checkpoint too many is no reason to end a run
    shutil.rmtree(gone, ignore_errors=True)


def cause(error: Exception) -> str:
    """What went wrong, in one line: in the system's own words where the libraries above it repeat them."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    known = [os.strerror(number) for number in errno.errorcode if os.strerror(number) in text]
    return max(known, key=len, default=text[:200])


def read_facts(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself. Raises `Damaged` where it cannot be read."""
    try:
        return dict(_read(path, facts=ocp.args.JsonRestore()).facts)
    except Exception as error:
        _raise_if_of_the_machine(error)
        raise Damaged(f"what it says of itself cannot be read ({type(error).__name__})") from error


def read_arrays(path: Path, like: Any) -> Any:
    """The arrays of `like`, which may be a part of the checkpoint, with its shardings; NumPy arrays where it
    has those. Raises `Damaged`.
    """
    asked = ocp.args.PyTreeRestore(
        like, restore_args=ocp.checkpoint_utils.construct_restore_args(like), partial_restore=True
    )
    try:
        found = _read(path, arrays=asked).arrays
    except Exception as error:  # whatever the reader meets in a file that is cut short
        _raise_if_of_the_machine(error)
        raise Damaged(f"its arrays cannot be read ({type(error).__name__})") from error
    # After a changed bit in its own notes, Orbax may return a handle of a file for an array, or another name.
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(like), strict=False)
    same = all(
        isinstance(leaf, jax.Array) and (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
        for leaf, wanted in pairs
    )
    structures: list[Any] = [jax.tree.structure(tree) for tree in (found, like)]
    if not same or structures[0] != structures[1]:
        raise Damaged("its arrays are not those that it says it has")
    return found


def _raise_if_of_the_machine(error: Exception) -> None:
    """Raises `error` again where the machine has caused it: too little memory, no permission, a file system
    that fails. The files are sound then, and putting them aside would lose them.
    """
    number = getattr(error, "errno", None)
    if (
        isinstance(error, MemoryError)
        or number in (errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM)
        or "RESOURCE_EXHAUSTED" in str(error)
    ):
        raise error


def _read(path: Path, **parts: Any) -> Any:
    # This process reads alone: where it cannot, the others must not wait for it at a barrier.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    with ocp.Checkpointer(_handler(alone), multiprocessing_options=alone) as checkpointer:
        return checkpointer.restore(path, args=ocp.args.Composite(**parts))


def _handler(processes: ocp.options.MultiprocessingOptions) -> ocp.CompositeCheckpointHandler:
    return ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=processes),
        arrays=ocp.PyTreeCheckpointHandler(multiprocessing_options=processes),
        facts=ocp.JsonCheckpointHandler(multiprocessing_options=processes),
    )


def copied(arrays: Any) -> Any:
    """A copy of `arrays`, which may be donated to the next training step: in the host's memory, if the device
    can.

    Orbax would take a view of what is in the host's memory already. JAX then either refuses to donate the
    buffer, so that the step needs its memory twice, or writes over what is being saved. Which of the two is
    not documented.
    """
    leaves, structure = jax.tree.flatten(arrays)
    made: list[Any] = [None] * len(leaves)
    # One program for all arrays of one sharding copies several at a time; a program for each does not.
    alike: dict[jax.sharding.Sharding, list[int]] = {}
    for number, leaf in enumerate(leaves):
        if not isinstance(leaf, jax.Array):
            made[number] = leaf.copy()
        elif _pinned(leaf):
            made[number] = jax.device_put(leaf, leaf.sharding.with_memory_kind("pinned_host"))
        else:
            alike.setdefault(leaf.sharding, []).append(number)
    for numbers in alike.values():
        for number, copy in zip(numbers, _copies([leaves[number] for number in numbers]), strict=True):
            made[number] = copy
    return jax.tree.unflatten(structure, made)


def _pinned(leaf: jax.Array) -> bool:
    device: Any = next(iter(leaf.sharding.addressable_devices))
    return device.platform != "cpu" and any(
        memory.kind == "pinned_host" for memory in device.addressable_memories()
    )


@jax.jit
def _copies(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.copy(leaf) for leaf in leaves]
