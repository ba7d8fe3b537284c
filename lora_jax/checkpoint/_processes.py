"""What the processes of a run agree on, so that none waits for another that has given up.

With `jax.distributed`, every process calls the same methods in the same order; these are collectives of the
devices, and belong to the thread that trains. With one process, nothing is exchanged.
"""

from collections.abc import Callable
from typing import TypeVar

import jax

from .._processes import exchange


Result = TypeVar("Result")


class Damaged(Exception):
    """Why a checkpoint is not intact."""


_KINDS = (Damaged, ValueError, OSError, RuntimeError)  # the later, the graver


def on_first(work: Callable[[], Result]) -> Result:
    """`work()` by process 0 alone; the others wait, and have its result, which JSON can hold, or its
    error.
    """
    return exchange(together(lambda: work() if jax.process_index() == 0 else None))[0]


def together(work: Callable[[], Result]) -> Result:
    """`work()` by every process. Where it raises on one, all raise: their own error, or one of its kind
    that names the process.
    """
    if jax.process_count() == 1:
        return work()
    result, error = None, None
    try:
        result = work()
    except Exception as found:
        error = found
    said = exchange(None if error is None else [_gravity(error), str(error)])
    failed = [(process, *what) for process, what in enumerate(said) if what is not None]
    if not failed:
        return result
    process, gravity, text = max(failed, key=lambda item: (item[1], -item[0]))
    if error is not None and _gravity(error) == gravity:
        raise error
    raise _KINDS[gravity](f"{text} (process {process})") from error


def _gravity(error: Exception) -> int:
    return next((number for number, kind in enumerate(_KINDS) if isinstance(error, kind)), len(_KINDS) - 1)
