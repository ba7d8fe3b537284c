"""What the rows of E2E's training steps hold, and what a step costs, with a row for each example and with
`train.pack`.

    python -m benchmarks.packing --data DIR [--bases DIR]

On what: the 600 steps of `experiments/configs/e2e_smollm2_lora_r8.json`, which other batches have too, with
the tokens of SmolLM2 and the widths that a run has. A position is counted, if the loss has its logits;
context, if it holds another token; or padding. "logits" is the share of the head's logits that are counted.
Each pair of widths is a program to compile. "GFLOP" is the mean step's: matrix products, counted in the
traced step of each program. Of the steps of eight examples, the program that most of them have is also
compiled, from shapes alone and with unrolled layers, since XLA counts the body of a loop once: "XLA's GFLOP"
and the temporary bytes.

Bounds (exit status 1 if one is missed), of eight examples in two rows: at most 10% of the positions are
padding, and a step has at most 0.80 of the FLOPs of a row each. Wherever it is compiled, the traced step has
the compiled one's FLOPs to 1%.
"""

import argparse
import collections
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import catalogue, config as configs, tasks
from experiments.config import Config, Mesh
from experiments.plan import flops, models
from experiments.plan.step import training_step, Workload
from experiments.reports.provenance import provenance
from experiments.tasks.examples import Examples
from experiments.training import order
from experiments.training.sharded import make_mesh
from lora_jax.interop import gguf

from . import record
from .step_cost import QUICK


CONFIG = Path("experiments/configs/e2e_smollm2_lora_r8.json")
# Examples of a step, and the rows that they share; None is a row each.
WAYS = [(8, None), (8, 1), (8, 2), (8, 4), (16, None), (16, 4), (32, None), (32, 8), (64, None), (64, 16)]

Program = tuple[int, int, int]  # rows, their positions, and the positions that have logits


def examples(config: Config, data: Path, bases: Path) -> Examples:
    tokenizer = gguf.tokenizer(catalogue.verified(str(config.base.name), bases))
    train = tasks.prepare(config.data, tasks.read(config.data, data), tokenizer).train
    assert isinstance(train, Examples)
    return train


def shares(found: Examples, steps: Sequence[np.ndarray], rows: int | None) -> dict[str, Any]:
    """A row of the table, and under "programs" how many of the steps have each."""
    programs: collections.Counter[Program] = collections.Counter()
    counted = tokens = 0
    for indices in steps:
        arranged = indices if rows is None else found.packed(indices, rows)
        programs[len(arranged), *found.size(arranged)] += 1
        tokens += sum(min(len(found.ids(index)), found.seq_len) for index in indices)
        counted += int(found.batch(indices)["mask"].sum())
    positions = sum(number * count * width for (count, width, _), number in programs.items())
    logits = sum(number * count * most for (count, _, most), number in programs.items())
    return {
        "examples": len(steps[0]),
        "rows": len(steps[0]) if rows is None else rows,
        "counted": counted / positions,
        "context": (tokens - counted) / positions,
        "padding": 1 - tokens / positions,
        "logits": counted / logits,
        "longest row": max(width for _, width, _ in programs),
        "programs": programs,
    }


def step_of(subject: models.Subject, config: Config, program: Program, packed: bool) -> Any:
    rows, tokens, counted = program
    method, name = configs.method_value(config.method), config.optimizer.name
    work = Workload(rows, tokens, method, config.targets, name, counted=counted, packed=packed)
    return training_step(subject, make_mesh(Mesh()), work)


def traced(subject: models.Subject, config: Config, row: dict[str, Any]) -> float:
    """FLOPs of the mean step."""
    packed, programs = row["rows"] < row["examples"], row["programs"]
    of = lambda step: flops.of(step.function, *step.arguments)
    every = sum(count * of(step_of(subject, config, program, packed)) for program, count in programs.items())
    return every / programs.total()


def compiled(subject: models.Subject, config: Config, row: dict[str, Any]) -> dict[str, Any]:
    """Of the program that most steps have; both counts of its FLOPs."""
    packed, ((program, count),) = row["rows"] < row["examples"], row["programs"].most_common(1)
    unrolled = dataclasses.replace(subject, model=subject.model.clone(scan=False))
    step = step_of(unrolled, config, program, packed)
    made = step.lower().compile(compiler_options=QUICK)
    return {
        "commonest": f"{program[0]} × {program[1]}, {program[2]} logits, {count} steps",
        "XLA's GFLOP": round(made.cost_analysis()["flops"] / 1e9, 3),
        "MB": round(made.memory_analysis().temp_size_in_bytes / 1e6, 3),
        "traced / XLA's": flops.of(step.function, *step.arguments) / made.cost_analysis()["flops"],
    }


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """The bounds that rows miss."""
    found = []
    for row in rows:
        name = f"{row['examples']} examples in {row['rows']} rows"
        if (row["examples"], row["rows"]) == (8, 2):
            if row["padding"] > 0.10:
                found.append(f"{name}: {row['padding']:.4f} of the positions are padding, above 0.10")
            if row["FLOPs / a row each"] > 0.80:
                found.append(f"{name}: {row['FLOPs / a row each']:.4f} of the FLOPs, above 0.80")
        ratio = row.get("traced / XLA's", 1.0)
        if abs(ratio - 1) > 0.01:
            found.append(f"{name}: the traced step has {ratio:.4f} of the compiled one's FLOPs")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("LORA_JAX_DATA") or ".", help="where e2e/ lies")
    parser.add_argument("--bases", help="where `python -m experiments fetch smollm2-135m` has put it")
    options = parser.parse_args()
    config, about = configs.load(CONFIG), provenance()
    found = examples(config, Path(options.data), catalogue.directory(options.bases))
    subject = models.named("smollm2-135m", "float32", checkpoint=False)
    rows: list[dict[str, Any]] = []
    each: dict[int, float] = {}  # FLOPs of a step with a row for each example
    for batch, packed in WAYS:
        steps = [
            order.indices(config.seed, number, len(found), batch) for number in range(config.train.steps)
        ]
        row = shares(found, steps, packed)
        mean = traced(subject, config, row)
        each[batch] = mean if packed is None else each[batch]
        row |= {"GFLOP": round(mean / 1e9, 3), "FLOPs / a row each": mean / each[batch]}
        row |= compiled(subject, config, row) if batch == config.train.batch else {}
        rows.append(row | {"programs": len(row["programs"])})
        print(rows[-1], file=sys.stderr, flush=True)
    problems = missed(rows)
    record.save("packing", "python -m benchmarks.packing", about, rows)
    print(record.table(rows))
    print("\n".join(problems) if problems else "all bounds are met")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
