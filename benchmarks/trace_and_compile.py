"""Time to trace, lower and compile one training step: `adapt` against LoRA written by hand.

    python -m benchmarks.trace_and_compile [--layers 12] [--repeats 5]

On what: the step of `step_cost.py`, GPT-2 small, unrolled, float32, from shapes alone. Each repeat measures
both ways one after the other, in an order that alternates, with JAX's caches cleared before each, so that
what else the machine does falls on both. Wall-clock and CPU time are kept; the ratio of medians is the
result. The same is done for our step with `scan`, of the model as it is beside one four times as deep.

Bounds (exit status 1 if one is missed, on either clock): ours takes at most 1.25 of the handwritten one's
time, tracing plus compiling; and so does the deeper model of the other one's, whose traced step has as many
equations. With fewer than three layers XLA unrolls the loop of the other one. A busy machine stretches the
wall-clock time of single runs by half: measure on a quiet one.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
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


def equations(jaxpr: Any) -> int:
    """All of them, those of inner jaxprs too."""
    count = 0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        values = [
            value
            for entry in eqn.params.values()
            for value in (entry if isinstance(entry, tuple | list) else [entry])
        ]
        inner = (value for value in values if hasattr(getattr(value, "jaxpr", value), "eqns"))
        count += 1 + sum(map(equations, inner))
    return count


def of_step(setting: Setting) -> int:
    """The equations of our traced step."""
    step = training_step("adapt", setting)
    return equations(jax.make_jaxpr(step.function)(*step.shapes))


def in_turn(
    name: str, ways: dict[str, Callable[[], dict[str, float]]], repeats: int, numerator: str
) -> list[dict[str, Any]]:
    """The rows of two ways, the first of which is timed first in every other repeat."""
    runs: dict[str, list] = {way: [] for way in ways}
    for repeat in range(repeats):
        for way in ways if repeat % 2 == 0 else reversed(ways):
            runs[way].append(ways[way]())
            print(f"{name}: {way}: {runs[way][-1]}", file=sys.stderr, flush=True)
    (denominator,) = set(ways) - {numerator}
    rows = []
    for what in runs[numerator][0]:
        medians = {way: statistics.median(run[what] for run in runs[way]) for way in ways}
        seconds = {f"{way} s": round(median, 2) for way, median in medians.items()}
        ratio = medians[numerator] / medians[denominator]
        rows.append({"setting": name, "what": what, **seconds, "ratio": ratio})
    return rows


def compare(setting: Setting, repeats: int) -> list[dict[str, Any]]:
    ways = {way: lambda way=way: timed(way, setting) for way in ("adapt", "handwritten")}
    return in_turn(setting.name, ways, repeats, "adapt")


def with_depth(setting: Setting, repeats: int) -> list[dict[str, Any]]:
    """Our step with `scan`, and that of a model four times as deep."""
    layers = setting.config.n_layer
    deep = dataclasses.replace(setting, config=dataclasses.replace(setting.config, n_layer=4 * layers))
    depths = {"adapt": setting, "four times as deep": deep}
    ways = {way: lambda depth=depth: timed("adapt", depth) for way, depth in depths.items()}
    counts = {way: of_step(depth) for way, depth in depths.items()}
    counted = {f"{way} s": None for way in ways} | {
        f"{way}, equations": count for way, count in counts.items()
    }
    ratio = counts["four times as deep"] / counts["adapt"]
    return [
        *in_turn(setting.name, ways, repeats, "four times as deep"),
        {"setting": setting.name, "what": "equations", **counted, "ratio": ratio},
    ]


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """The bounds that are missed."""
    bounds = {"both, wall": 1.25, "both, cpu": 1.25, "equations": 1.0}
    return [
        f"{row['setting']}: {row['what']}: {row['ratio']:.3f}, above {bounds[row['what']]}"
        for row in rows
        if row["ratio"] > bounds.get(row["what"], float("inf"))
    ]


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
    for adapted, scan in (("qv", False), ("all", False), ("all", True)):
        setting = Setting(adapted, scan=scan, losses=scan, config=config)
        rows += (with_depth if scan else compare)(setting, options.repeats)
        if options.layers == 12:
            record.save(
                "trace_and_compile",
                f"python -m benchmarks.trace_and_compile --repeats {options.repeats}",
                about,
                rows,
            )
    print(record.table(rows))
    problems = missed(rows)
    print("\n".join(problems) if problems else "all bounds are met")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
