"""Several processes that run as one: how they find each other, which of them writes, and how one ends.

Every process runs the same program on the same config, and holds the devices of its host. All read; only the
first writes, and a work directory lies on a file system that all see. Left out: the computation itself, which
JAX spreads over the mesh, and what the processes tell each other, which is `lora_jax.processes`.
"""

import os
import sys
import time
import traceback
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import jax

from lora_jax.processes import exchange, on_first


# The variables that tell a process that it is one of several, and the program that sets them: steps of SLURM,
# and Open MPI.
_COUNTS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun"}
# Seconds for which a process that ends waits for the others. After an error of its own it keeps them no
# longer.
SHUTDOWN = 30
# Seconds after which a silent process counts as gone, and JAX ends the others. A process that waits at a
# checkpoint would not notice.
SILENT = 45
# Seconds until all hosts see what one has written: network file systems cache directories.
VISIBLE = 60
# The beginning of the name of the file by which `check_shared` tests that a directory is shared.
MARK = ".shared-"


def detected(environment: Mapping[str, str] = os.environ) -> str | None:
    """The program that started this process as one of several, or None.

    >>> detected({"SLURM_STEP_NUM_TASKS": "4"})
    'srun'
    """
    return next(
        (program for name, program in _COUNTS.items() if environment.get(name, "1") not in ("", "1")), None
    )


def untold(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is one of several processes of MPICH or Intel MPI, which JAX cannot ask for the others.

    >>> untold({"PMI_SIZE": "4"}), untold({"PMI_SIZE": "4", "SLURM_STEP_NUM_TASKS": "4"})
    (True, False)
    """
    return environment.get("PMI_SIZE", "1") not in ("", "1") and detected(environment) is None


def start(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Joins the other processes, before JAX has looked for devices. The cluster (SLURM, Open MPI, TPU,
    Kubernetes) says what is None.

    Raises:
      ValueError: the cluster does not say it.
      OSError: the others do not come.
    """
    try:
        jax.distributed.initialize(
            coordinator, count, index, heartbeat_timeout_seconds=SILENT, shutdown_timeout_seconds=SHUTDOWN
        )
    except ValueError as error:
        raise ValueError(
            f"`--distributed`: nothing here says which processes there are ({error}): start them with srun "
            "or mpirun, or pass "
            "--coordinator HOST:PORT --num-processes N --process-id I to each."
        ) from error
    except RuntimeError as error:
        raise OSError(
            f"`--distributed`: the processes did not find each other at {coordinator}: {error}"
        ) from error


def several() -> bool:
    """Whether this process has found others; asks for no devices."""
    return jax.distributed.is_initialized()


def leave(error: Exception) -> NoReturn:
    """Ends this process, one of several, for an error that the others do not know of. Most often another
    process has ended.

    It ends at once, because at the interpreter's usual end JAX and a thread that writes would wait for the
    others.
    """
    traceback.print_exception(error)
    text = " ".join(str(error).split())[:200]
    print(
        f"error: process {jax.process_index()} of {jax.process_count()} cannot go on ({text}): another may "
        "have ended; once all have, the same command goes on",
        file=sys.stderr,
    )
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(1)


def first() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line for the user, in the first process only."""
    if first():
        print(text, flush=True)


def check_shared(directory: Path) -> None:
    """Checks that all processes see what the first writes to `directory`, which it creates if needed.

    Raises:
      ValueError: one of them does not see it. It is raised in all.
    """
    if jax.process_count() == 1:
        return
    name = on_first(lambda: _leave_mark(directory))
    end = time.monotonic() + VISIBLE
    while not (seen := (directory / name).is_file()) and time.monotonic() < end:
        time.sleep(0.5)
    blind = [index for index, seen in enumerate(exchange(seen)) if not seen]
    on_first(lambda: (directory / name).unlink())
    if blind:
        raise ValueError(
            f"`--workdir` {directory} is not one directory: process 0 writes there, and process {blind[0]} "
            "does not see it; "
            "take one on a file system that all hosts share."
        )


def _leave_mark(directory: Path) -> str:
    directory.mkdir(parents=True, exist_ok=True)
    name = f"{MARK}{uuid.uuid4().hex}"
    (directory / name).touch()
    return name
