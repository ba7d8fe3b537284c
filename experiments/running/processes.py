"""Several processes that run as one: how they find each other, which of them writes, and how all learn what
one has found.

Every process runs the same program on the same config, and holds the devices of its host. All read; only the
first writes, and a work directory lies on a file system that all see. Left out: the computation itself, which
JAX spreads over the mesh.
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


# How a process learns that it is one of several, where nobody says so: the steps of SLURM, and Open MPI.
_COUNTS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun"}
# Seconds that a process which ends waits for the others. One that ends for an error of its own keeps nobody
# longer.
SHUTDOWN = 30
# Seconds after which a process of which nothing is heard counts as gone, and JAX ends the others: who waits
# for it at a checkpoint does not see it.
SILENT = 45
# Seconds until what one host wrote is seen by all: network file systems keep what they know for some time.
VISIBLE = 60
# What the name of a file begins with that only tells the others that a directory is shared.
MARK = ".shared-"


def detected(environment: Mapping[str, str] = os.environ) -> str | None:
    """What started this process as one of several, or None.

    >>> detected({"SLURM_STEP_NUM_TASKS": "4"})
    'srun'
    """
    return next(
        (program for name, program in _COUNTS.items() if environment.get(name, "1") not in ("", "1")), None
    )


def untold(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is one of several processes that JAX cannot ask for the others: MPICH's and Intel MPI's.

    >>> untold({"PMI_SIZE": "4"}), untold({"PMI_SIZE": "4", "SLURM_STEP_NUM_TASKS": "4"})
    (True, False)
    """
    return environment.get("PMI_SIZE", "1") not in ("", "1") and detected(environment) is None


def start(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Joins the other processes, before JAX has looked for devices. What is None is left to the cluster to
    tell (SLURM, Open MPI, TPU, Kubernetes).

    Raises `ValueError` where it does not tell, and `OSError` if the others do not come.
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
    """Ends this process at once, as one of several, for an error that no other knows of: most often, that
    another has ended.

    Not through the interpreter's own end, where JAX and whoever is writing would wait for the others.
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
    """A line for whoever watches, said once."""
    if first():
        print(text, flush=True)


def check_shared(directory: Path) -> None:
    """Raises `ValueError` in all processes if one of them does not see what the first writes to
    `directory`, which it creates if it must.
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
