"""Time to trace, lower and compile one training step: `adapt` against LoRA written by hand.

    python -m benchmarks.trace_and_compile [--layers 12] [--repeats 5]

On what: the step of `step_cost.py`, GPT-2 small, unrolled, float32, from shapes alone. Each repeat measures
both ways one after the other, in an order that alternates, with JAX's caches cleared before each, so that
what else the machine does falls on both. Wall-clock and CPU time are kept; the ratio of medians is the
result. Bound (exit status 1 if it is missed, on either clock): ours takes at most 1.25 of the handwritten
one's time, tracing plus compiling. A busy machine stretches the wall-clock time of single runs by half:
measure on a quiet one.
"""

import argparse
import statistics
import sys
import time
from typing import Any

import jax

from experiments.reports.provenance import provenance
from lora_jax.models import GPT2Config

from . import record
from .training_steps import Setting, training_step


def timed(way: str, setting: Setting) -> dict[str, float]:
    jax.clear_caches()
    step = training_step(way, setting)
    marks = [(time.perf_counter(), time.process_time())]
    lowered = step.lower()
    marks.append((time.perf_counter(), time.process_time()))
    lowered.compile()
    marks.append((time.perf_counter(), time.process_time()))
    names = ("trace and lower", "compile")
    seconds = {}
    for name, before, after in zip(names, marks, marks[1:], strict=False):
        seconds[f"{name}, wall"], seconds[f"{name}, cpu"] = (
            b - a for a, b in zip(before, after, strict=True)
        )
    for clock in ("wall", "cpu"):
        seconds[f"both, {clock}"] = sum(seconds[f"{name}, {clock}"] for name in names)
    return seconds


def compare(setting: Setting, repeats: int) -> list[dict[str, Any]]:
    ways = ("adapt", "handwritten")
    runs: dict[str, list] = {way: [] for way in ways}
    for repeat in range(repeats):
        for way in ways if repeat % 2 == 0 else reversed(ways):
            runs[way].append(timed(way, setting))
            print(f"{setting.name}: {way}: {runs[way][-1]}", file=sys.stderr, flush=True)
    rows = []
    for name in runs["adapt"][0]:
        medians = {way: statistics.median(run[name] for run in runs[way]) for way in ways}
        seconds = {f"{way} s": round(median, 2) for way, median in medians.items()}
        rows.append(
            {
                "setting": setting.name,
                "what": name,
                **seconds,
                "ratio": medians["adapt"] / medians["handwritten"],
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--layers", type=int, default=12, help="fewer than 12: a quick look, which is not recorded"
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    config = GPT2Config.named("gpt2", n_layer=options.layers)
    about = {**provenance(), "repeats": options.repeats}
    jax.jit(lambda x: x + 1).lower(0.0).compile()  # what only the first compilation of a process pays
    rows = []
    for adapted in ("qv", "all"):
        rows += compare(Setting(adapted, config=config), options.repeats)
        if options.layers == 12:
            record.save(
                "trace_and_compile",
                f"python -m benchmarks.trace_and_compile --repeats {options.repeats}",
                about,
                rows,
            )
    print(record.table(rows))
    return 1 if any(row["ratio"] > 1.25 for row in rows if row["what"].startswith("both")) else 0


if __name__ == "__main__":
    raise SystemExit(main())
