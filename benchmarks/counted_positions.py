"""What a training step costs when the head computes the logits of counted positions only: FLOPs and temporary
bytes, beside the head on all.

    python -m benchmarks.counted_positions [--layers 12]

On what: one step of the experiments (`experiments/training/step.py`), of GPT-2 small, 124M, batch 4 of 128
tokens, float32, AdamW, from shapes alone for the device at hand. FLOPs are those of the products in the
traced step (`experiments.plan.flops`), because XLA counts one chunk of the loss once; bytes are of the
compiled one, as in `benchmarks.step_cost`. 30%, 60% and 100% of the positions of each example are counted:
38, 77 and 128. "All" has no gather: 100% beside it is what the gather costs by itself. The temporary bytes of
full fine-tuning do not depend on it: they are largest in the update, which has no logits.

Bounds (exit status 1 if one is missed): the FLOPs that a row spares are at least 0.99 of the head's products
at the positions that are not counted: two products of (positions, 768, 50257) with LoRA, which has no
gradient of the head, and three of full fine-tuning. A position that fills up the last chunk of the loss has
logits, and is not spared: of the chunks of 32 columns, 60% has one in each example. 100% has at most 1.001 of
the FLOPs and 1.02 of the bytes of "all".
"""

import argparse
import dataclasses
import sys
from typing import Any

from experiments.config import Mesh
from experiments.plan import flops, models
from experiments.plan.step import training_step, Workload
from experiments.reports.provenance import provenance
from experiments.training.sharded import make_mesh
from lora_jax import Full, LoRA
from lora_jax.models import GPT2Config

from . import record
from .step_cost import QUICK
from .training_steps import ALPHA, RANK


BATCH, TOKENS = 4, 128
# A method, its targets, and how many products of the head its step has.
WAYS: dict[str, tuple[Any, tuple[str, ...] | None, int]] = {
    "LoRA, q, v": (LoRA(rank=RANK, alpha=ALPHA, blocks=(True, False, True)), None, 2),
    "LoRA, all matrices": (LoRA(rank=RANK, alpha=ALPHA), ("(attn|mlp)/.*/kernel",), 2),
    "full fine-tuning": (Full(), None, 3),
}
COUNTED = {"all": None, "100%": TOKENS, "60%": round(0.6 * TOKENS), "30%": round(0.3 * TOKENS)}


def measure(config: GPT2Config, way: str, counted: int | None) -> dict[str, int]:
    subject = models.named("gpt2", "float32", checkpoint=False)
    # Unrolled, because XLA counts the body of a loop once.
    subject = dataclasses.replace(subject, model=subject.model.clone(config=config, scan=False))
    method, targets, _ = WAYS[way]
    work = Workload(BATCH, TOKENS, method, targets, counted=counted)
    step = training_step(subject, make_mesh(Mesh()), work)
    compiled = step.lower().compile(compiler_options=QUICK)
    return {
        "flops": flops.of(step.function, *step.arguments),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def compare(config: GPT2Config, way: str, found: dict[str, dict[str, int]]) -> list[dict[str, Any]]:
    """Rows of the table, one for each share of counted positions."""
    rows = []
    for share, figures in found.items():
        every, counted = found["all"], COUNTED[share]
        row: dict[str, Any] = {
            "step": way,
            "counted": share,
            "GFLOP": round(figures["flops"] / 1e9, 3),
            "MB": round(figures["temporary_bytes"] / 1e6, 3),
            "FLOPs / all": figures["flops"] / every["flops"],
            "bytes / all": figures["temporary_bytes"] / every["temporary_bytes"],
        }
        if counted is not None and counted < TOKENS:
            # Full fine-tuning has no chunks.
            columns = counted if WAYS[way][2] == 3 else _filled_up(counted)
            products = 2 * WAYS[way][2] * BATCH * (TOKENS - columns) * config.n_embd * config.vocab_size
            row["spared / head's products"] = (every["flops"] - figures["flops"]) / products
        rows.append(row)
    return rows


def _filled_up(columns: int) -> int:
    """The columns of so many in chunks of equal size, each of at most 128 tokens of the batch."""
    chunks = -(-columns // (128 // BATCH))
    return chunks * -(-columns // chunks)


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """The bounds that rows miss."""
    found = []
    for row in rows:
        name = f"{row['step']}, {row['counted']}"
        spared = row.get("spared / head's products")
        if spared is not None and spared < 0.99:
            found.append(f"{name}: {spared:.4f} of the head's products are spared, below 0.99")
        if row["counted"] == "100%" and (row["FLOPs / all"] > 1.001 or row["bytes / all"] > 1.02):
            found.append(
                f"{name}: the gather takes {row['FLOPs / all']:.4f} of the FLOPs, above 1.001, or "
                f"{row['bytes / all']:.4f} of the bytes, above 1.02"
            )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--layers", type=int, default=12, help="fewer than 12: a quick look, which is not recorded"
    )
    options = parser.parse_args()
    config = GPT2Config.named("gpt2", n_layer=options.layers)
    about, rows = provenance(), []
    for way in WAYS:
        found = {}
        for share, counted in COUNTED.items():
            found[share] = measure(config, way, counted)
            print(f"{way}: {share}: {found[share]}", file=sys.stderr, flush=True)
        rows += compare(config, way, found)
        if options.layers == 12:  # after every way: a run takes long
            record.save("counted_positions", "python -m benchmarks.counted_positions", about, rows)
    problems = missed(rows)
    print(record.table(rows))
    print("\n".join(problems) if problems else "all bounds are met")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
