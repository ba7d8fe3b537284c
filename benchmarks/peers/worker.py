"""The process of one way of one row: `python -m benchmarks.peers.worker WAY ROW DIRECTORY PLATFORM`.

It prints a line of JSON when it is ready, or why it cannot be, and then the seconds of one step for every
line that it reads. At the end it prints the most memory that it had: of the device where that has its own,
and of the process on a CPU.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from .rows import Cannot, is_torch, Row


def main() -> None:
    way, row, directory, device = sys.argv[1], Row(**json.loads(sys.argv[2])), Path(sys.argv[3]), sys.argv[4]
    ways: Any
    if is_torch(way):
        from . import torch_ways as ways
    else:
        from . import jax_ways as ways
    try:
        step, figures = ways.prepared(way, row, directory, device)
        figures.setdefault("first loss", step())
        step()
    except (Cannot, ImportError, KeyError) as error:
        print(json.dumps({"cannot": str(error)}), flush=True)
        return
    print(json.dumps(figures), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        step()
        print(time.perf_counter() - started, flush=True)
    print(ways.peak_bytes() or _peak_bytes(), flush=True)


def _peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # Linux's `ru_maxrss` has what the parent had before
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
