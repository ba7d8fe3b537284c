"""Being told to stop: SIGTERM, as clusters send it before they take a machine away, and the chance to save.

Left out: SIGKILL and power cuts, of which nobody is told; what they cost is what was done since the last checkpoint.
"""

import signal
import threading
from types import FrameType
from typing import Any


class Asked:
    """Whether the process has been asked to stop. True in a condition from the first SIGTERM on.

    ```python
    with Asked() as asked:
        while not asked:
            ...                      # one step
    ```

    The second one ends the process as it would any other. Outside of the main thread, which alone is told of signals, nobody asks.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> "Asked":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()

    def __bool__(self) -> bool:
        return self._asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
