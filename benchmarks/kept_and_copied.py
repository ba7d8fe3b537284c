"""What a training step keeps from the forward to the backward pass, and what it copies from one layout to
another.

    python -m benchmarks.kept_and_copied [--layers 12] [--only "adapt, losses" ...]

On what: one step of GPT-2 small, 124M, batch 4 of 128 tokens, the four projections of every layer adapted,
rank 4, AdamW, float32, compiled from shapes alone for one device, as in `benchmarks.step_cost`. "Losses": the
model is given `labels`, and makes no array of all logits. "Temporary MB" is
`compiled.memory_analysis().temp_size_in_bytes`. "Copied" are the results of every `copy` in the compiled
text, also of those inside fusions: where XLA transposes an array, there is one. The body of a loop counts
once, so that nothing is said of copies under `scan`.

Bounds (exit status 1 if one is missed): `adapt` copies each layer's q, k, v and result once on the way
forward and once on the way back, 8 arrays of (batch, tokens, width), because products over heads need the
heads first; and less than six such arrays for the embedding and the loss. With losses and `scan`, the
temporary bytes are at most 0.6 of those without both.
"""

import argparse
import math
import re
import sys
from typing import Any

from experiments.reports.provenance import provenance
from lora_jax.models import GPT2Config

from . import record
from .training_steps import Setting, training_step


STEPS: dict[str, tuple[str, dict[str, bool]]] = {
    "adapt": ("adapt", {}),
    "adapt, losses": ("adapt", {"losses": True}),
    "adapt, losses, scan": ("adapt", {"losses": True, "scan": True}),
    "adapt, losses, scan, checkpoint": ("adapt", {"losses": True, "scan": True, "checkpoint": True}),
    "handwritten": ("handwritten", {}),
    "full": ("full", {}),
}
BYTES = {"f64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1}
COPY = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (\w+)\[([\d,]*)\]\S* copy\(", re.MULTILINE)


def copied(text: str) -> int:
    """The bytes of the results of all copies in a compiled text."""
    return sum(
        BYTES[dtype] * math.prod(int(size) for size in shape.split(",") if size)
        for dtype, shape in COPY.findall(text)
    )


def measure(name: str, config: GPT2Config) -> dict[str, Any]:
    way, options = STEPS[name]
    setting = Setting("all", config=config, **options)
    compiled = training_step(way, setting).lower().compile()
    row: dict[str, Any] = {
        "step": name,
        "layers": config.n_layer,
        "temporary MB": round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 3),
    }
    if not setting.scan:
        found = copied(compiled.as_text())
        row["copied MB"] = round(found / 1e6, 3)
        row["copied arrays of (batch, tokens, width)"] = round(
            found / (4 * setting.batch * setting.tokens * config.n_embd), 3
        )
    return row


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """The bounds that rows miss."""
    problems, temporary = [], {row["step"]: row["temporary MB"] for row in rows}
    for row in rows:
        found, bound = row.get("copied arrays of (batch, tokens, width)"), 8 * row["layers"] + 6
        if found is not None and found >= bound and row["step"].startswith("adapt"):
            problems.append(
                f"{row['step']}: {found} arrays of (batch, tokens, width) are copied; the bound is {bound}"
            )
    looped = "adapt, losses, scan"
    if {"adapt", looped} <= set(temporary) and temporary[looped] > 0.6 * temporary["adapt"]:
        problems.append(
            f"{looped}: {temporary[looped]} MB, above 0.6 of the {temporary['adapt']} MB without both"
        )
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--layers", type=int, default=12, help="fewer than 12: a quick look, which is not recorded"
    )
    parser.add_argument("--only", nargs="+", choices=STEPS, help="a look at some, which is not recorded")
    options = parser.parse_args()
    config, rows = GPT2Config.named("gpt2", n_layer=options.layers), []
    for name in options.only or STEPS:
        rows.append(measure(name, config))
        print(rows[-1], file=sys.stderr, flush=True)
    if options.layers == 12 and not options.only:
        record.save("kept_and_copied", "python -m benchmarks.kept_and_copied", provenance(), rows)
    problems = missed(rows)
    print(record.table(rows))
    print("\n".join(problems) if problems else "all bounds are met")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
