"""Being told to stop: SIGTERM, as clusters send it before they take a machine away, and the chance to save.

Left out: SIGKILL and power cuts, of which nobody is told; what they cost is what was done since the last
checkpoint.
"""

import itertools
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


# JAX has all processes stop at the number after the largest that one had come to when the signal came. So
# every one has to come by: they are counted through, whatever the step that a run begins with, and whichever
# run it is of those in this process.
_ASKS = itertools.count(1)


class StopRequest:
    """Whether to stop: whether this process, or any of several that run as one, has had a SIGTERM.

    ```python
    with StopRequest() as asked:
        for number in range(steps):
            ...                      # one step
            if asked():
                break
    ```

    The second one ends the process as it would any other. Outside of the main thread, which alone is told of
    signals, nobody asks. Of several processes, JAX watches for the signal, from the moment they found each
    other until they end, and all stop after the same step.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None
        self._several = jax.process_count() > 1

    def __enter__(self) -> "StopRequest":
        if not self._several and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()

    def __call__(self) -> bool:
        """Whether to stop here. Of several processes, each asks once a step."""
        return multihost_utils.reached_preemption_sync_point(next(_ASKS)) if self._several else self._asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
