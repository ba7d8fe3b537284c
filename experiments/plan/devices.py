"""Virtual devices: as many as a mesh has, on the CPU, before JAX has looked for real ones.

This file is imported before JAX, and imports it last.
"""

import os
import re
import sys

from experiments.config import AXES, Mesh


_COUNT = re.compile(r"--xla_force_host_platform_device_count=\S*")
# Each device costs threads and memory even when nothing runs on it. More than this have not been tried.
MOST = 4096


def mesh_of(text: str) -> Mesh:
    """The mesh that `data=8,fsdp=8` describes; axes that are not named have one device.

    >>> mesh_of("data=8,tensor=2")
    Mesh(data=8, fsdp=1, tensor=2)
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if name not in AXES or not number.isdecimal() or name in sizes:
            raise ValueError(
                f"`--mesh` is {text!r}: {part.strip()!r} is not one of data=N, fsdp=N and tensor=N, each at "
                "most once; for example data=8,fsdp=8."
            )
        sizes[name] = int(number)
    return Mesh(**sizes)


def start(count: int) -> None:
    """Makes JAX see `count` devices on the CPU.

    Raises:
      ValueError: there are too many; JAX has started before with fewer, which it keeps.
    """
    if count > MOST:
        raise ValueError(
            f"`--mesh` has {count} devices, and at most {MOST} can be planned: take fewer along `data`, "
            "which changes no bytes a device "
            "as long as each has as many examples."
        )
    if "jax" not in sys.modules:
        os.environ["JAX_PLATFORMS"] = "cpu"
        # XLA's remarks on layouts that it finds hard would stand between the tables.
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
        others = _COUNT.sub("", os.environ.get("XLA_FLAGS", "")).split()
        os.environ["XLA_FLAGS"] = " ".join([*others, f"--xla_force_host_platform_device_count={count}"])
    import jax

    found = jax.devices()
    if len(found) < count or found[0].platform != "cpu":
        raise ValueError(
            f"`--mesh` has {count} devices, and JAX, which was running before, sees {len(found)} of kind "
            f"{found[0].platform!r}: "
            "run `python -m experiments plan` as a process of its own."
        )
