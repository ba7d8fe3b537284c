"""The most memory that a run has taken so far, as the operating system and the devices count it.

Of the process it is the largest resident set: the base, what trains, the optimiser's state and activations
where the CPU is the device, and Python with its packages. A run that goes on counts from its last start. The
compiler's own figures for one step are in `experiments/reports/cost.py`.
"""

import sys
from pathlib import Path

import jax


_STATUS = Path("/proc/self/status")


def peak() -> dict[str, int | None]:
    """Bytes: of this process, and of its fullest device; None where they are not counted."""
    return {"process": _of_process(), "device": _of_devices()}


def _of_process() -> int | None:
    # Linux's own count of this program: its `ru_maxrss` has what the parent had before.
    lines = _STATUS.read_text().splitlines() if _STATUS.is_file() else []
    for line in lines:
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _of_devices() -> int | None:
    found = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in found if "peak_bytes_in_use" in stats]
    return max(peaks, default=None)
