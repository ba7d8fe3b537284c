"""What a training step costs on a quantised base, beside LoRA on the same base in float32: its time, its
memory, and how much of the base is unpacked at once.

    python -m benchmarks.quantised_step [--layers 0] [--rounds 5] [--only gpt2 "smollm2-135m, scan" ...]

On what: one step of GPT-2 small (batch 4 of 128 tokens) and of SmolLM2-135M (8 of 64) with random weights.
All projections of every layer are adapted with rank 4, and are what is packed; the rest stays in float32.
AdamW, and `labels`. GGUF's blocks are random bytes with scales of a usual size, because their values do not
matter here. Blocks of 256 do not divide the 576 numbers of SmolLM2's rows.

The steps of a row are taken in turn, one of each in every round, in an order that turns. "Over LoRA" is the
median of the rounds' own ratios, "spread" half the distance of their quartiles. A busy machine stretches
single steps, so that CPU time, of all threads, stands beside. The bytes and the FLOPs are what XLA says of
the compiled step; it counts the body of a loop once. "Unpacked at once" is how many arrays of the size of a
packed matrix lie in memory together at most, read off the compiled text (`live_arrays.py`).

Bounds (exit status 1 if one is missed): nf4 and int8 take at most 1.3 of LoRA's time. No more is unpacked at
once than what reads the same input: one matrix of GPT-2; query, key and value of SmolLM2, whose products XLA
takes one after the other once all three are unpacked. No format has more temporary bytes than LoRA and the
largest matrix.
"""

import argparse
import dataclasses
import math
import statistics
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax
from experiments.reports.provenance import provenance
from lora_jax import LoRA
from lora_jax.models import GPT2, GPT2Config, Llama, LlamaConfig
from lora_jax.quant import Blocks, from_gguf, nbytes, NF4

from . import in_turn, record
from .live_arrays import most_at_once
from .training_steps import ALPHA, RANK, step_of


@dataclasses.dataclass(frozen=True)
class Row:
    """A model, the shape of its batch, and which leaves are adapted and packed."""

    model: str
    batch: int
    tokens: int
    targets: str
    together: int  # how many matrices read the same input
    scan: bool = False

    @property
    def name(self) -> str:
        return f"{self.model}, scan" if self.scan else self.model

    def described(self, layers: int) -> GPT2 | Llama:
        """The model with its published sizes, and no dropout; `layers` of them, or all where that is 0."""
        if self.model == "gpt2":
            sizes = {"n_layer": layers} if layers else {}
            still = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
            return GPT2(GPT2Config.named("gpt2", **sizes, **still), scan=self.scan)
        sizes = {"num_hidden_layers": layers} if layers else {}
        return Llama(LlamaConfig.named(self.model, **sizes), scan=self.scan)


ROWS = [
    Row(*model, scan=scan)
    for model in (("gpt2", 4, 128, "h/.*/kernel", 1), ("smollm2-135m", 8, 64, "layers/.*/kernel", 3))
    for scan in (False, True)
]
LORA = "LoRA"
FORMATS: dict[str, Any] = {
    "nf4": "nf4",
    "nf4, scales in float32": NF4(double=False),
    "int8": "int8",
    "Q4_0": Blocks("Q4_0"),
    "Q8_0": Blocks("Q8_0"),
    "Q4_K": Blocks("Q4_K"),
}
_MATRIX = "kernel"


def bases(row: Row, layers: int) -> dict[str, tuple[Any, Any]]:
    """The frozen tree of each format, and the trained one, of which steps take copies."""
    model = row.described(layers)
    ids = jnp.zeros((1, 2), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
    axes = "layer in out" if row.scan else "in out"
    adapted = lambda params: lora_jax.lorafy(params, row.targets, method=LoRA(RANK, ALPHA), axes=axes)
    frozen, delta = adapted(params)
    found = {LORA: (frozen, delta)}
    for name, format in FORMATS.items():
        if not isinstance(format, Blocks):
            found[name] = (lora_jax.quantize(frozen, format, targets=row.targets), delta)
        elif all(leaf.shape[-2] % format.size == 0 for _, leaf in _matrices(frozen)):
            found[name] = (_in_blocks(frozen, format), delta)
    return found


def _matrices(frozen: Any) -> list[tuple[Any, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(frozen)
    return [(path, leaf) for path, leaf in leaves if _is_matrix(path)]


def _is_matrix(path: Any) -> bool:
    return _MATRIX in jax.tree_util.keystr(path)


def _in_blocks(frozen: Any, format: Blocks) -> Any:
    """`frozen` with random blocks for its matrices. The types that are used here begin with their scales."""
    draw = np.random.default_rng(0)
    halves = 2 if format.kind == "Q4_K" else 1

    def packed(path: Any, leaf: Any) -> Any:
        if not _is_matrix(path):
            return leaf
        *stack, into, out = leaf.shape
        blocks = draw.integers(0, 256, (*stack, out, into // format.size, format.width), np.uint8)
        scale = 0.02 / {"Q4_0": 8, "Q8_0": 128, "Q4_K": 15 * 63}[format.kind]
        blocks[..., : 2 * halves] = np.full(halves, scale, np.float16).view(np.uint8)
        return from_gguf(blocks.reshape(*stack, out, -1), format.kind)

    return jax.tree_util.tree_map_with_path(packed, frozen)


def prepared(
    row: Row, layers: int, frozen: Any, delta: Any, wanted: set[int]
) -> tuple[in_turn.Prepared, dict]:
    """The compiled step on one base, and what XLA says of it."""
    model, tx = row.described(layers), optax.adamw(2e-4)
    forward = lora_jax.adapt(model.apply)

    def loss(trained: Any, frozen: Any, ids: jax.Array) -> jax.Array:
        params = {"params": lora_jax.combine(frozen, trained)}
        return forward(params, ids, labels=jnp.roll(ids, -1, axis=1))[:, :-1].mean()

    draw = np.random.default_rng(0)
    ids = jnp.asarray(draw.integers(0, model.config.vocab_size, (row.batch, row.tokens)), jnp.int32)
    trained = jax.tree.map(jnp.copy, delta)  # steps give their buffers away
    state = tx.init(trained)
    compiled = jax.jit(step_of(loss, tx), donate_argnums=(0, 1)).lower(trained, state, frozen, ids).compile()
    figures = {
        "GFLOP": compiled.cost_analysis()["flops"] / 1e9,
        "temporary MB": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "frozen MB": nbytes(frozen) / 1e6,
        "unpacked at once": most_at_once(compiled.as_text(), wanted),
    }
    return in_turn.Prepared(compiled, [trained, state, frozen, ids]), figures


def measure(row: Row, layers: int, rounds: int) -> list[dict[str, Any]]:
    """The lines of the table of one row, one for each format."""
    found = bases(row, layers)
    stacked = 1 if row.scan else 0
    sizes = {math.prod(leaf.shape[stacked:]) for _, leaf in _matrices(found[LORA][0])}
    steps, figures = {}, {}
    for name, trees in found.items():
        steps[name], figures[name] = prepared(row, layers, *trees, sizes)
        steps[name].take()
        print(f"{row.name}: {name}: {figures[name]}", file=sys.stderr, flush=True)
    seconds = in_turn.taken({name: step.take for name, step in steps.items()}, rounds)
    largest = 4 * max(sizes) / 1e6
    return [_line(row, name, figures, seconds, largest) for name in steps]


def _line(row: Row, name: str, figures: dict, seconds: dict, largest: float) -> dict[str, Any]:
    both = zip(zip(*seconds[name], strict=True), zip(*seconds[LORA], strict=True), strict=True)
    over, of_cpu = (in_turn.ratio(*clock) for clock in both)
    own, lora = figures[name], figures[LORA]
    return {
        "row": row.name,
        "base": "float32 (LoRA)" if name == LORA else name,
        "s": round(statistics.median(wall for wall, _ in seconds[name]), 3),
        "over LoRA": round(over.median, 3),
        "spread": round(over.spread, 3),
        "CPU time over LoRA": round(of_cpu.median, 3),
        "FLOPs over LoRA": own["GFLOP"] / lora["GFLOP"],
        "temporary MB": round(own["temporary MB"], 3),
        "more than LoRA, MB": round(own["temporary MB"] - lora["temporary MB"], 3),
        "largest matrix, MB": round(largest, 3),
        "unpacked at once": own["unpacked at once"] if name != LORA else None,
        "frozen MB": round(own["frozen MB"], 1),
    }


def missed(lines: list[dict[str, Any]]) -> list[str]:
    """The bounds that lines miss."""
    problems, together = [], {row.name: row.together for row in ROWS}
    for line in lines:
        where = f"{line['row']}: {line['base']}"
        if line["base"] in ("nf4", "int8") and line["over LoRA"] > 1.3:
            problems.append(f"{where}: {line['over LoRA']} of LoRA's time, above 1.3")
        if (line["unpacked at once"] or 0) > together[line["row"]]:
            problems.append(f"{where}: {line['unpacked at once']} matrices are unpacked at once")
        if line["more than LoRA, MB"] > line["largest matrix, MB"]:
            problems.append(
                f"{where}: {line['more than LoRA, MB']} MB more than LoRA; the largest matrix has "
                f"{line['largest matrix, MB']}"
            )
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--layers", type=int, default=0, help="so many layers: a quick look, which is not recorded"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each format (default: 5)")
    parser.add_argument(
        "--only", nargs="+", choices=[row.name for row in ROWS], help="a look at some, which is not recorded"
    )
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds is {options.rounds}: a spread needs 2 at least")
    about, lines = {**provenance(), "rounds": options.rounds}, []
    for row in ROWS:
        if options.only and row.name not in options.only:
            continue
        lines += measure(row, options.layers, options.rounds)
        jax.clear_caches()
        if not options.layers and not options.only:  # after every row: a run takes long
            command = f"python -m benchmarks.quantised_step --rounds {options.rounds}"
            record.save("quantised_step", command, about, lines)
    problems = missed(lines)
    print(record.table(lines))
    print("\n".join(problems) if problems else "all bounds are met")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
