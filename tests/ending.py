"""The experiments' command line in a process of its own, which may end itself at the end of a step.

    python tests/ending.py {none,killed,told} STEP run config.json ...

What is to happen at a certain step of a run of milliseconds cannot be done from outside. PyTorch is hidden,
which nothing here needs: importing it takes longer than the run.
"""

import contextlib
import os
import runpy
import signal
import sys
import time
from pathlib import Path


def kill() -> None:
    """SIGKILL, once a checkpoint is on the disk: it is written while training goes on."""
    checkpoints = Path(sys.argv[sys.argv.index("--workdir") + 1]) / "checkpoints"
    while not any(entry.name.isdecimal() for entry in checkpoints.glob("*")):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def tell() -> None:
    """SIGTERM, and time for JAX to notice, which looks once a second. All others wait for this process."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3)


if __name__ == "__main__":
    sys.modules["torch"] = None  # as if it were not installed
    from stopping import at_the_end_of

    how, step = sys.argv[1], int(sys.argv[2])
    del sys.argv[1:3]
    acts = {"killed": kill, "told": tell}
    with at_the_end_of(step, acts[how]) if how in acts else contextlib.nullcontext():
        runpy.run_module("experiments", run_name="__main__", alter_sys=True)
