"""Requests to stop: SIGTERM, which clusters send before they take a machine away, and time to save.

Left out: SIGKILL and power cuts, which come without notice; they cost what was done since the last
checkpoint.
"""

import itertools
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


# JAX stops all processes at the number after the largest that one of them had reached when the signal came.
# No number may be left out, so that calls are counted over all runs of this process, whatever their steps.
_CALLS = itertools.count(1)


class StopRequest:
    """Tells whether to stop: whether this process, or one of several that run as one, has had a SIGTERM.

    ```python
    with StopRequest() as stop_requested:
        for number in range(steps):
            ...                      # one step
            if stop_requested():
                break
    ```

    A second signal ends the process as usual. Outside of the main thread, which alone receives signals, there
    is no request. With several processes JAX watches for the signal, from the moment they found each other
    until they end, and all stop after the same step.
    """

    def __init__(self) -> None:
        self._requested = False
        self._before: Any = None
        self._several = jax.process_count() > 1

    def __enter__(self) -> "StopRequest":
        if not self._several and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()

    def __call__(self) -> bool:
        """Whether to stop here. Each of several processes calls this once a step."""
        return (
            multihost_utils.reached_preemption_sync_point(next(_CALLS)) if self._several else self._requested
        )

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
