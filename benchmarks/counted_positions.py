"""What a training step costs when the head computes the logits of counted positions only: FLOPs, temporary
bytes and time, beside the head on all.

    python -m benchmarks.counted_positions [--layers 12] [--rounds 5] [--only "gpt2, LoRA, q, v" ...]

On what: one step of the experiments (`experiments/training/step.py`), of GPT-2 small, batch 4 of 128 tokens,
and of SmolLM2-135M, batch 8 of 64, with random weights, float32, AdamW. FLOPs are those of the products in
the traced step (`experiments.plan.flops`), because XLA counts one chunk of the loss once; bytes are of the
compiled one. 30%, 60% and 100% of the positions of each example are counted. "All" has no gather: 100% beside
it is what the gather costs by itself. The steps of a row are timed in turn: "time / all" is the median of the
rounds' own ratios, "spread" half the distance of their quartiles. The temporary bytes of full fine-tuning do
not depend on it: they are largest in the update, which has no logits.

Bounds (exit status 1 if one is missed): the FLOPs that a row spares are at least 0.99 of the head's products
at the positions that are not counted: two products of (positions, width, vocabulary) with LoRA, which has no
gradient of the head, and three of full fine-tuning. A position that fills up the last chunk of the loss has
logits, and is not spared: of GPT-2's chunks of 32 columns, 60% has one in each example. 100% has at most
1.001 of the FLOPs and 1.02 of the bytes of "all".
"""

import argparse
import dataclasses
import statistics
import sys
from typing import Any

import jax
import numpy as np

from experiments.config import Mesh
from experiments.plan import flops, models
from experiments.plan.step import Step, training_step, Workload
from experiments.reports.provenance import provenance
from experiments.training.sharded import make_mesh
from lora_jax import Full, LoRA
from lora_jax.models import GPT2Config, LlamaConfig

from . import in_turn, record
from .training_steps import ALPHA, RANK


@dataclasses.dataclass(frozen=True)
class Row:
    """A model and the shape of its batch, and a method; `products`: how many products of the head its step
    has. `config`: another than the model's own.
    """

    model: str
    batch: int
    tokens: int
    way: str
    method: Any
    targets: tuple[str, ...] | None = None
    products: int = 2
    config: GPT2Config | LlamaConfig | None = None

    @property
    def name(self) -> str:
        return f"{self.model}, {self.way}"

    def shares(self) -> dict[str, int | None]:
        return {"all": None} | {f"{share}%": round(share / 100 * self.tokens) for share in (100, 60, 30)}

    def subject(self) -> models.Subject:
        """With layers one after the other, which is the fastest on a CPU."""
        subject = models.named(self.model, "float32", checkpoint=False)
        config = subject.model.config if self.config is None else self.config
        return dataclasses.replace(subject, model=subject.model.clone(config=config, scan=False))

    def step(self, counted: int | None) -> Step:
        work = Workload(self.batch, self.tokens, self.method, self.targets, counted=counted)
        return training_step(self.subject(), make_mesh(Mesh()), work)


ROWS = (
    Row("gpt2", 4, 128, "LoRA, q, v", LoRA(RANK, ALPHA, blocks=(True, False, True))),
    Row("gpt2", 4, 128, "LoRA, all matrices", LoRA(RANK, ALPHA), ("(attn|mlp)/.*/kernel",)),
    Row("gpt2", 4, 128, "full fine-tuning", Full(), products=3),
    Row("smollm2-135m", 8, 64, "LoRA, all matrices", LoRA(RANK, ALPHA), ("layers/.*/kernel",)),
)


def arrays(step: Step, vocabulary: int) -> list[Any]:
    """Random weights and tokens in the shapes of a step's arguments, and an optimiser's state of zeros."""
    draw = np.random.default_rng(0)
    weight = lambda shape: draw.normal(0, 0.02, shape.shape).astype(shape.dtype)
    token = lambda shape: draw.integers(0, vocabulary, shape.shape, shape.dtype)
    batch = {name: token(shape) for name, shape in step.batch.items()}
    batch["mask"] = np.ones_like(batch["mask"])
    if "columns" in batch:
        batch["columns"] = np.broadcast_to(np.arange(batch["columns"].shape[-1]), batch["columns"].shape)
    zeros = jax.tree.map(lambda shape: np.zeros(shape.shape, shape.dtype), step.opt_state)
    values = [jax.tree.map(weight, step.delta), zeros, jax.tree.map(weight, step.frozen), batch]
    places = [jax.tree.map(lambda shape: shape.sharding, shapes) for shapes in step.arguments]
    return jax.device_put([*values, jax.random.key(0)], places)


def measure(row: Row, rounds: int) -> list[dict[str, Any]]:
    """The lines of the table, one for each share of counted positions."""
    found, steps = {}, {}
    for share, counted in row.shares().items():
        step = row.step(counted)
        compiled = step.lower().compile()
        found[share] = {
            "flops": flops.of(step.function, *step.arguments),
            "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        }
        print(f"{row.name}: {share}: {found[share]}", file=sys.stderr, flush=True)
        steps[share] = in_turn.Prepared(compiled, arrays(step, row.subject().model.config.vocab_size))
        steps[share].take()
    times = in_turn.taken({share: step.take for share, step in steps.items()}, rounds)
    return compare(row, found, {share: [wall for wall, _ in own] for share, own in times.items()})


def compare(
    row: Row, found: dict[str, dict[str, int]], seconds: dict[str, list[float]]
) -> list[dict[str, Any]]:
    """The lines of a row, from the figures and the seconds of each share."""
    config, shares, every, lines = row.subject().model.config, row.shares(), found["all"], []
    width = config.n_embd if isinstance(config, GPT2Config) else config.hidden_size
    for share, own in found.items():
        over = in_turn.ratio(seconds[share], seconds["all"])
        line: dict[str, Any] = {
            "step": row.name,
            "counted": share,
            "GFLOP": round(own["flops"] / 1e9, 3),
            "MB": round(own["temporary_bytes"] / 1e6, 3),
            "s": round(statistics.median(seconds[share]), 3),
            "FLOPs / all": own["flops"] / every["flops"],
            "bytes / all": own["temporary_bytes"] / every["temporary_bytes"],
            "time / all": round(over.median, 3),
            "spread": round(over.spread, 3),
        }
        counted = shares[share]
        if counted is not None and counted < row.tokens:
            # Full fine-tuning has no chunks.
            columns = counted if row.products == 3 else _filled_up(counted, row.batch)
            left_out = row.batch * (row.tokens - columns)
            head = 2 * row.products * left_out * width * config.vocab_size
            line["spared / head's products"] = (every["flops"] - own["flops"]) / head
        lines.append(line)
    return lines


def _filled_up(columns: int, batch: int) -> int:
    """The columns of so many in chunks of equal size, each of at most 128 tokens of the batch."""
    chunks = -(-columns // (128 // batch))
    return chunks * -(-columns // chunks)


def missed(lines: list[dict[str, Any]]) -> list[str]:
    """The bounds that lines miss."""
    found = []
    for line in lines:
        name = f"{line['step']}, {line['counted']}"
        spared = line.get("spared / head's products")
        if spared is not None and spared < 0.99:
            found.append(f"{name}: {spared:.4f} of the head's products are spared, below 0.99")
        if line["counted"] == "100%" and (line["FLOPs / all"] > 1.001 or line["bytes / all"] > 1.02):
            found.append(
                f"{name}: the gather takes {line['FLOPs / all']:.4f} of the FLOPs, above 1.001, or "
                f"{line['bytes / all']:.4f} of the bytes, above 1.02"
            )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--layers",
        type=int,
        help="fewer than the models have: a look, which is not recorded and may miss a bound",
    )
    parser.add_argument("--rounds", type=int, default=5, help="steps of each share (default: 5)")
    parser.add_argument("--only", nargs="+", choices=[row.name for row in ROWS], metavar="ROW")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds is {options.rounds}: a spread needs 2 at least")
    about, lines = provenance(), []
    for row in ROWS:
        if options.only and row.name not in options.only:
            continue
        if options.layers is not None:
            sizes = {"n_layer" if row.model == "gpt2" else "num_hidden_layers": options.layers}
            row = dataclasses.replace(row, config=dataclasses.replace(row.subject().model.config, **sizes))
        lines += measure(row, options.rounds)
        if options.layers is None and not options.only:  # after every row: a run takes long
            record.save("counted_positions", "python -m benchmarks.counted_positions", about, lines)
    problems = missed(lines)
    print(record.table(lines))
    print("\n".join(problems) if problems else "all bounds are met")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
