"""What a training step costs with each method: FLOPs, temporary bytes and trained numbers, beside LoRA's of
the same rank.

    python -m benchmarks.method_cost [--layers 12] [--only DoRA ...]

On what: one step of GPT-2 small, 124M, batch 4 of 128 tokens, the four projections of every layer adapted,
rank 4 (VeRA 256, its authors' order of size), AdamW, float32, compiled from shapes alone as in
`benchmarks.step_cost`, whose figures these are: exact, and the same in every run. DyLoRA's step is given a
random key, as in training. "Frozen MB" is what stays in memory beside: base, projections, starts, in 4 or 8
bits where they are quantised.
"""

import argparse
import sys
from typing import Any

from experiments.reports.provenance import provenance
from lora_jax import AdaLoRA, DeltaLoRA, DoRA, DyLoRA, Full, LoRA, LoRAFA, PiSSA, VeRA
from lora_jax.models import GPT2Config

from . import record
from .step_cost import QUICK
from .training_steps import RANK, Setting, training_step, tree_bytes


ROWS: dict[str, dict[str, Any]] = {
    "LoRA": {"method": LoRA(rank=RANK)},
    "rsLoRA": {"method": LoRA(rank=RANK, rs=True)},
    "LoRA-FA": {"method": LoRAFA(rank=RANK)},
    "DoRA": {"method": DoRA(rank=RANK)},
    "VeRA": {"method": VeRA(rank=256)},
    "DyLoRA": {"method": DyLoRA(rank=RANK)},
    "AdaLoRA": {"method": AdaLoRA(rank=RANK)},
    "PiSSA": {"method": PiSSA(rank=RANK)},
    "Delta-LoRA": {"method": DeltaLoRA(rank=RANK)},
    "LoRA, base in nf4": {"method": LoRA(rank=RANK), "format": "nf4"},
    "LoRA, base in int8": {"method": LoRA(rank=RANK), "format": "int8"},
    "these matrices in full": {"method": Full()},
}


def measure(name: str, config: GPT2Config) -> dict[str, Any]:
    step = training_step("adapt", Setting("all", config=config, **ROWS[name]))
    compiled = step.lower().compile(compiler_options=QUICK)
    return {
        "flops": int(compiled.cost_analysis()["flops"]),
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "trained": step.trained_bytes // 4,
        "frozen": tree_bytes(step.shapes[2]),
    }


def compare(name: str, found: dict[str, Any], lora: dict[str, Any]) -> dict[str, Any]:
    return {
        "method": name,
        "trained": found["trained"],
        "GFLOP": round(found["flops"] / 1e9, 3),
        "temporary MB": round(found["temporary"] / 1e6, 3),
        "frozen MB": round(found["frozen"] / 1e6, 3),
        "trained / LoRA": found["trained"] / lora["trained"],
        "FLOPs / LoRA": found["flops"] / lora["flops"],
        "temporary / LoRA": found["temporary"] / lora["temporary"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--layers", type=int, default=12, help="fewer than 12: a quick look, which is not recorded"
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(ROWS), help="a look at some methods, which is not recorded"
    )
    options = parser.parse_args()
    config, about, rows = GPT2Config.named("gpt2", n_layer=options.layers), provenance(), []
    lora = measure("LoRA", config)
    for name in options.only or ROWS:
        rows.append(compare(name, lora if name == "LoRA" else measure(name, config), lora))
        print(rows[-1], file=sys.stderr, flush=True)
        if options.layers == 12 and not options.only:  # after every row: a run takes long
            record.save("method_cost", "python -m benchmarks.method_cost", about, rows)
    print(record.table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
