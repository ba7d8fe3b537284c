"""Several processes of JAX on this machine, as several hosts would be: real collectives between them, two
devices each.
"""

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from compiling import xla_flags

from benchmarks.ports import free_port


REPOSITORY = Path(__file__).resolve().parent.parent
# Long beyond what any of these tests takes on a busy machine, and short beside the five minutes that JAX's
# own barriers wait.
TIMEOUT = 240

_BEGIN = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
del sys.argv[1:4]
import numpy as np
"""


def start(
    commands: Sequence[Sequence[str]], *, devices: int = 2, environment: dict[str, str] | None = None
) -> list[subprocess.Popen]:
    """A process for each command, with `devices` virtual ones."""
    # Without what tells a process of a cluster's that it is one.
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "OMPI_", "JAX_COORDINATOR"))
    }
    kept["XLA_FLAGS"] = xla_flags(devices)
    kept |= {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu", **(environment or {})}
    return [
        subprocess.Popen(command, env=kept, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]


def finish(started: Sequence[subprocess.Popen], *, timeout: float = TIMEOUT) -> list[tuple[int, str, str]]:
    """Exit status, standard output and standard error of each; all are killed, and the test fails, after
    `timeout` seconds.
    """
    end = time.monotonic() + timeout
    try:
        texts = [process.communicate(timeout=max(end - time.monotonic(), 1)) for process in started]
    except BaseException as error:  # whoever stops the tests stops these too
        for process in started:
            process.kill()
        texts = [process.communicate() for process in started]
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise AssertionError(
            f"not finished after {timeout} s: " + "\n".join(out + errors for out, errors in texts)
        ) from None
    return [(process.returncode, out, errors) for process, (out, errors) in zip(started, texts, strict=True)]


def run(count: int, script: str, *arguments: str, devices: int = 2) -> list[str]:
    """What each of `count` processes prints that run `script` after `jax.distributed` began; `sys.argv[1:]`
    are `arguments`.

    Fails, with what it wrote, if one of them does.
    """
    address = f"localhost:{free_port()}"
    text = _BEGIN + textwrap.dedent(script)
    ended = finish(
        start(
            [
                [sys.executable, "-c", text, address, str(count), str(index), *map(str, arguments)]
                for index in range(count)
            ],
            devices=devices,
        )
    )
    assert all(code == 0 for code, _, _ in ended), "\n".join(
        f"process {index}: {code}\n{out}\n{errors}" for index, (code, out, errors) in enumerate(ended)
    )
    return [out for _, out, _ in ended]
