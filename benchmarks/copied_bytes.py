"""The bytes that a training step copies from one layout to another.

    python -m benchmarks.copied_bytes [--layers 12] [--only adapt ...]

On what: one step of GPT-2 small, 124M, batch 4 of 128 tokens, the four projections of every layer adapted,
rank 4, AdamW, float32, compiled from shapes alone for one device, as in `benchmarks.step_cost`. Counted are
the results of every `copy` in the compiled text, also of those inside fusions: where XLA transposes an array,
there is one.

Bound (exit status 1 if it is missed): `adapt` copies each layer's q, k, v and result once on the way forward
and once on the way back, 8 arrays of (batch, tokens, width), because products over heads need the heads
first; and less than two such arrays for the embedding and the loss.
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


WAYS = ("adapt", "handwritten", "full")
BYTES = {"f64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1}
COPY = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (\w+)\[([\d,]*)\]\S* copy\(", re.MULTILINE)


def copied(text: str) -> int:
    """The bytes of the results of all copies in a compiled text."""
    return sum(
        BYTES[dtype] * math.prod(int(size) for size in shape.split(",") if size)
        for dtype, shape in COPY.findall(text)
    )


def measure(way: str, setting: Setting) -> dict[str, Any]:
    config = setting.config
    found = copied(training_step(way, setting).lower().compile().as_text())
    array = 4 * setting.batch * setting.tokens * config.n_embd
    return {
        "step": way,
        "layers": config.n_layer,
        "copied MB": round(found / 1e6, 3),
        "arrays of (batch, tokens, width)": round(found / array, 3),
        "the same of a layer": round(found / array / config.n_layer, 3),
    }


def missed(row: dict[str, Any]) -> list[str]:
    found, bound = row["arrays of (batch, tokens, width)"], 8 * row["layers"] + 2
    if row["step"] != "adapt" or found < bound:
        return []
    return [f"adapt: {found} arrays of (batch, tokens, width) are copied; the bound is {bound}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--layers", type=int, default=12, help="fewer than 12: a quick look, which is not recorded"
    )
    parser.add_argument("--only", nargs="+", choices=WAYS, help="a look at some, which is not recorded")
    options = parser.parse_args()
    config, rows = GPT2Config.named("gpt2", n_layer=options.layers), []
    for way in options.only or WAYS:
        rows.append(measure(way, Setting("all", config=config)))
        print(rows[-1], file=sys.stderr, flush=True)
    if options.layers == 12 and not options.only:
        record.save("copied_bytes", "python -m benchmarks.copied_bytes", provenance(), rows)
    problems = [problem for row in rows for problem in missed(row)]
    print(record.table(rows))
    print("\n".join(problems) if problems else "the bound is met")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
