"""How long `Checkpoints.save` keeps the training loop, beside a plain copy of the arrays and beside all of
the writing.

    python -m benchmarks.async_saving [--megabytes 200] [--repeats 9]

On what: 200 MB of state, a third of it adapter and two thirds optimiser state as Adam has them, float32 that
does not compress, on the device at hand, written to a temporary directory. All three in one run, round by
round, since the disk and the cores are not ours alone; the medians are of the rounds after the first, in
which programs are compiled.

`copy`: all arrays to host memory that is the caller's own. `save`: until `save` returns, after which the
buffers may be donated. `written`: until the checkpoint is complete under its name. `fingerprint`: the
checksum of all the state, fetched.

Bounds (exit status 1 if missed): `save` returns within 1.25 times the copy, since it is one, with the
preparations of what the thread does; and in less than half of the time that the writing takes.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.reports.provenance import provenance
from lora_jax.checkpoint import Checkpoints, fingerprint, State

from . import record


def state(megabytes: float, step: int) -> State:
    """64 arrays of the adapter, and two of the optimiser's for each."""
    size = int(megabytes * 1e6 / 4 / 3 / 64)
    draw = np.random.default_rng(step)
    part = lambda: {str(number): jnp.asarray(draw.random((size // 8, 8), np.float32)) for number in range(64)}
    return State(part(), (part(), part()), step, (0, step), jax.random.key(0))


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(megabytes: float, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as directory, Checkpoints(directory, identity={}) as checkpoints:
        for number in range(1, repeats + 2):
            saved = jax.block_until_ready(state(megabytes, number))
            arrays = (saved.delta, saved.opt_state)
            found = {
                "copy": seconds(lambda: [np.array(leaf) for leaf in jax.tree.leaves(arrays)]),
                "fingerprint": seconds(lambda: fingerprint(arrays)),
                "save": seconds(lambda: checkpoints.save(saved)),
            }
            found["written"] = found["save"] + seconds(checkpoints.wait)
            print(found, file=sys.stderr, flush=True)
            rounds.append(found)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    median = {name: statistics.median(found[name] for found in rounds[1:]) for name in rounds[0]}
    return {
        "MB": round(size / 1e6),
        **{f"{name} s": value for name, value in median.items()},
        "save / written": median["save"] / median["written"],
        "save / copy": median["save"] / median["copy"],
        "fingerprint GB/s": size / 1e9 / median["fingerprint"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--megabytes", type=float, default=200, help="other than 200: a look, which is not recorded"
    )
    parser.add_argument("--repeats", type=int, default=9, help="other than 9: a look, which is not recorded")
    options = parser.parse_args()
    about = provenance()
    row = measure(options.megabytes, options.repeats)
    if (options.megabytes, options.repeats) == (200, 9):
        record.save("async_saving", "python -m benchmarks.async_saving", about, [row])
    print(record.table([row]))
    missed = [
        *(["`save` takes longer than 1.25 copies"] if row["save / copy"] > 1.25 else []),
        *(["`save` returns after half of the writing, or later"] if row["save / written"] >= 0.5 else []),
    ]
    print("; ".join(missed) or "all bounds are met")
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
