"""Where the time of a training step goes: matrix products, copies from one layout to another, and the rest.

    python -m benchmarks.profile_step [--steps 5] [--layers 12] [--beside FILE ...]

On what: one step of GPT-2 small, batch 4 of 128 tokens, the four projections of every layer adapted, rank 4,
AdamW, float32, with all logits, as in `benchmarks.step_cost`. The profiler says how long each compiled
operation ran. "Products" are those with a `dot` in them, "copies" those that copy or
transpose, and "element by element" all others. Times are sums over the operations of a step, of which some
run side by side; "wall" is the time of a step on the clock.

`--beside` adds the rows of such results of other commits, to the table and to the picture: run this file in a
clone of the other commit, and name its JSON.
"""

import argparse
import collections
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.reports.provenance import provenance
from lora_jax.models import GPT2Config

from . import record
from .training_steps import Setting, training_step


WAYS = ("adapt", "handwritten", "full")
KINDS = ("products", "copies", "element by element")
FIGURE = record.RESULTS / f"profile_step-jax-{jax.__version__}.png"


def kind(operation: str) -> str:
    """Of a compiled operation, by the name that XLA makes of what is in it."""
    name = operation.rsplit(".", 1)[0] if operation.rsplit(".", 1)[-1].isdigit() else operation
    if name.startswith(("dot", "ynn_fusion", "custom-call", "gemm", "cublas")) or "dot" in name.split("_"):
        return "products"
    return "copies" if {"copy", "transpose"} & set(name.split("_")) else "element by element"


def nanoseconds(directory: str) -> dict[str, float]:
    """Of each kind, in the traces below a directory."""
    found: dict[str, float] = collections.Counter()
    for file in Path(directory).rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                for event in line.events:
                    operation = dict(event.stats).get("hlo_op")
                    if operation is not None:
                        found[kind(str(operation))] += event.duration_ns
    return found


def measure(way: str, config: GPT2Config, steps: int) -> dict[str, Any]:
    step = training_step(way, Setting("all", config=config))
    compiled = step.lower().compile()
    trained, state, fixed, ids = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), step.shapes)
    trained, state, loss = compiled(trained, state, fixed, ids)
    jax.block_until_ready((trained, state, loss))
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            started = time.perf_counter()
            for _ in range(steps):
                trained, state, loss = compiled(trained, state, fixed, ids)
            jax.block_until_ready((trained, state, loss))
            wall = time.perf_counter() - started
        found = nanoseconds(directory)
    seconds = {f"{name} s": round(found[name] / 1e9 / steps, 3) for name in KINDS}
    return {"step": way, "commit": None, **seconds, "wall s": round(wall / steps, 3)}


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.5 * len(rows)), layout="constrained")
    names, left = [f"{row['step']}, {row['commit']}" for row in rows], [0.0] * len(rows)
    for name in KINDS:
        widths = [row[f"{name} s"] for row in rows]
        axes.barh(names, widths, left=left, label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds of the operations of a step")
    figure.legend(loc="outside upper center", ncols=len(KINDS), fontsize="small")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="that are traced (default: 5)")
    parser.add_argument(
        "--layers", type=int, default=12, help="fewer than 12: a quick look, which is not recorded"
    )
    parser.add_argument("--beside", nargs="+", type=Path, default=[], metavar="FILE", help="other results")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}: there is nothing to trace")
    config, about, rows = GPT2Config.named("gpt2", n_layer=options.layers), provenance(), []
    for way in WAYS:
        rows.append({**measure(way, config, options.steps), "commit": about["commit"]})
    for file in options.beside:
        rows += json.loads(file.read_text())["rows"]
    if options.layers == 12:
        command = f"python -m benchmarks.profile_step --steps {options.steps}"
        if options.beside:
            command += f" --beside {' '.join(file.name for file in options.beside)}"
        record.save("profile_step", command, about, rows)
        draw(rows, FIGURE)
    print(record.table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
