"""One program that trains eight adapters of one base, beside eight steps of one adapter each.

    python -m benchmarks.many_adapters [--rounds 9] [--layers N] [--models gpt2 ...] [--batches 1x128 ...]

On what: rank 8 in all projections, each adapter with its own tokens and its own AdamW, float32, random
weights of the published sizes, no dropout, `labels=`. The program is one jitted `vmap` of the step over the
adapters that `stack` makes, with the base closed over. In every round both take their steps, one after the
other, in an order that turns. "Over separate" is the median of the rounds' ratios, and "spread" half the
distance of their quartiles. The losses of both must agree.

FLOPs are counted in the traced steps, and bytes are XLA's of the compiled ones. "Products with W" are the
matrix products in the compiled step that have an adapted weight, the head or an embedding as an operand, with
the rows of all adapters and no batch axis. "Batched" are those that have one of these once for each adapter.

Bounds (exit status 1 if one is missed): the one program takes at most the time of the eight steps on a CPU,
and half of it on an accelerator; it has no more products with W than the step of one adapter, and none
batched; its arguments are the base once, and eight times the rest.
"""

import argparse
import collections
import dataclasses
import functools
import re
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax
from experiments.plan import flops
from experiments.reports.provenance import provenance
from lora_jax import LoRA

from . import in_turn, record
from .peers.models import described, TARGETS
from .training_steps import step_of, tree_bytes


ADAPTERS, RANK, RATE = 8, 8, 2e-4
DEPTH = {"gpt2": "n_layer", "smollm2-135m": "num_hidden_layers"}
# Rows and tokens of each adapter: few, and as many as in `benchmarks.peers`.
BATCHES = ["1x128", "8x64"]
DOT = re.compile(r" = \w+\[[\d,]*\]\S* (?:dot|custom-call)\((.*?)\)(?:, (.*))?$", re.MULTILINE)
SHAPE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = \w+\[([\d,]*)\]", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Ways:
    """`one(delta, state, frozen, ids)` is a step of one adapter, and `many` of all; `stacked` and `frozen`
    are what they begin with.
    """

    one: Callable
    many: Callable
    start: Callable
    stacked: Any
    frozen: Any


def ways(apply: Callable, params: Any, targets: str, adapters: int = ADAPTERS, **options: Any) -> Ways:
    """`options`: of `lorafy`."""
    options = {"method": LoRA(rank=RANK), **options}
    keys = jax.random.split(jax.random.key(0), adapters)
    frozen, _ = lora_jax.lorafy(params, targets, **options)
    deltas = [lora_jax.lorafy(params, targets, key=key, **options).delta for key in keys]
    forward, tx = lora_jax.adapt(apply), optax.adamw(RATE)

    def loss(delta: Any, frozen: Any, ids: jax.Array) -> jax.Array:
        variables = {"params": lora_jax.combine(frozen, delta)}
        return forward(variables, ids, labels=jnp.roll(ids, -1, axis=1))[:, :-1].mean()

    one = step_of(loss, tx)
    many = jax.vmap(one, in_axes=(0, 0, None, 0))
    return Ways(one, many, tx.init, lora_jax.stack(deltas), frozen)


def products(text: str, weights: set[tuple[int, ...]], adapters: int) -> tuple[int, int]:
    """How many matrix products of a compiled text have one of these weights as an operand, and how many have
    one of them for each adapter.
    """
    sizes = lambda shape: tuple(sorted(int(size) for size in shape.split(",") if size))
    shapes = {name: sizes(shape) for name, shape in SHAPE.findall(text)}
    # XLA turns and reshapes: what an operand is, its sizes say.
    alone = {tuple(sorted(shape)) for shape in weights}
    each = {tuple(sorted((adapters, *shape))) for shape in weights}
    found: collections.Counter[bool] = collections.Counter()
    for operands, rest in DOT.findall(text):
        if "custom_call_target" in rest and not re.search("gemm|matmul", rest):
            continue
        mine = [shapes.get(name, ()) for name in re.findall(r"%([\w.\-]+)", operands)[:2]]
        mine = [tuple(size for size in shape if size > 1) for shape in mine]
        if any(shape in each for shape in mine):
            found[True] += 1
        elif any(shape in alone for shape in mine) and "batch_dims={0" not in rest:
            found[False] += 1
    return found[False], found[True]


def weights_of(frozen: Any) -> set[tuple[int, ...]]:
    """The shapes of the matrices."""
    return {leaf.shape for leaf in jax.tree.leaves(frozen) if leaf.ndim == 2}


def measure(name: str, layers: int | None, size: str, rounds: int) -> dict[str, Any]:
    batch, tokens = map(int, size.split("x"))
    model = described(name)
    if layers is not None:
        model = model.clone(config=dataclasses.replace(model.config, **{DEPTH[name]: layers}))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    found = ways(model.apply, params, TARGETS[name, "all-linear"])
    draw = np.random.default_rng(0)
    ids = jnp.asarray(draw.integers(5, model.config.vocab_size, (ADAPTERS, batch, tokens)), jnp.int32)
    together = [found.stacked, jax.vmap(found.start)(found.stacked)]
    apart = [
        [delta, found.start(delta)] for delta in (lora_jax.take(found.stacked, i) for i in range(ADAPTERS))
    ]
    own_ids = list(ids)
    arguments = {"one": (*apart[0], found.frozen, own_ids[0]), "many": (*together, found.frozen, ids)}
    compiled = {
        way: jax.jit(getattr(found, way), donate_argnums=(0, 1)).lower(*arguments[way]).compile()
        for way in arguments
    }
    memory = {way: program.memory_analysis() for way, program in compiled.items()}
    gigaflop = {way: flops.of(getattr(found, way), *arguments[way]) / 1e9 for way in arguments}
    weights = weights_of(found.frozen)
    counted = {way: products(program.as_text(), weights, ADAPTERS) for way, program in compiled.items()}

    def all_together() -> np.ndarray:
        *together[:], losses = compiled["many"](*together, found.frozen, ids)
        return jax.device_get(jax.block_until_ready((losses, together))[0])

    def one_by_one() -> np.ndarray:
        losses = []
        for number, held in enumerate(apart):
            *held[:], loss = compiled["one"](*held, found.frozen, own_ids[number])
            losses.append(loss)
        return np.stack(jax.device_get(jax.block_until_ready((losses, apart))[0]))

    for _ in range(2):  # what only the first steps pay
        np.testing.assert_allclose(all_together(), one_by_one(), rtol=1e-4)
    clocks = lambda: np.array([time.perf_counter(), time.process_time()])

    def timed(way: Callable) -> np.ndarray:
        started = clocks()
        way()
        return clocks() - started

    steps = {way: functools.partial(timed, way) for way in (all_together, one_by_one)}
    seconds = {way: np.array(taken).T for way, taken in in_turn.taken(steps, rounds).items()}
    wall, cpu = map(in_turn.ratio, seconds[all_together], seconds[one_by_one])
    return {
        "model": f"{name}, {layers} layers" if layers else name,
        "batches": f"{ADAPTERS} of {size}",
        "one program s": round(float(np.median(seconds[all_together][0])), 3),
        "separate s": round(float(np.median(seconds[one_by_one][0])), 3),
        "over separate": float(wall.median),
        "spread": float(wall.spread),
        "of CPU time": float(cpu.median),
        "FLOPs / one": gigaflop["many"] / gigaflop["one"],
        "GFLOP": round(gigaflop["many"], 1),
        "temporary MB": round(memory["many"].temp_size_in_bytes / 1e6, 1),
        "of one, temporary MB": round(memory["one"].temp_size_in_bytes / 1e6, 1),
        "argument MB": round(memory["many"].argument_size_in_bytes / 1e6, 1),
        "of one, argument MB": round(memory["one"].argument_size_in_bytes / 1e6, 1),
        "base MB": round(tree_bytes(found.frozen) / 1e6, 1),
        "products with W": counted["many"][0],
        "of one": counted["one"][0],
        "batched": counted["many"][1],
    }


def missed(row: dict[str, Any], platform: str) -> list[str]:
    """The bounds that a row misses."""
    name, problems = f"{row['model']}, {row['batches']}", []
    bound = 1.0 if platform == "cpu" else 0.5
    if row["over separate"] > bound:
        problems.append(f"{name}: {row['over separate']:.3f} of the time of separate steps, above {bound}")
    if row["products with W"] > row["of one"] or row["batched"]:
        problems.append(
            f"{name}: {row['products with W']} products with W and {row['batched']} batched ones, where one "
            f"adapter has {row['of one']}"
        )
    own = row["of one, argument MB"] - row["base MB"]
    if row["argument MB"] > row["base MB"] + ADAPTERS * own + 1:
        problems.append(f"{name}: {row['argument MB']} MB of arguments, more than the base once")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--layers", type=int, help="fewer than the model has: a quick look, which is not recorded"
    )
    parser.add_argument("--rounds", type=int, default=9, help="steps of each way (default: 9)")
    parser.add_argument("--models", nargs="+", choices=list(DEPTH), default=list(DEPTH))
    parser.add_argument(
        "--batches", nargs="+", choices=BATCHES, default=BATCHES, help="rows and tokens of each adapter"
    )
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds is {options.rounds}: a spread needs 2 at least")
    command = shlex.join(["python", "-m", "benchmarks.many_adapters", *sys.argv[1:]])
    about, rows, problems = {**provenance(), "rounds": options.rounds}, [], []
    for name in options.models:
        for size in options.batches:
            rows.append(measure(name, options.layers, size, options.rounds))
            print(rows[-1], file=sys.stderr, flush=True)
            problems += missed(rows[-1], jax.default_backend())
            if options.layers is None:  # after every row: a run takes long
                record.save("many_adapters", command, about, rows)
    print(record.table(rows))
    print("\n".join(problems) if problems else "all bounds are met")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
