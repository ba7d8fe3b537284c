"""Other forms of x (W + A B), timed beside the one that `adapt` takes.

    python -m benchmarks.low_rank_forms [--rounds 21]

On what: projections of one input, with their gradients with respect to x, A and B, rank 4, float32, each
compiled alone. "Apart" is what `adapt` does: x W + (x A) B for each projection. "One A": the A's of all in
one contraction, whose columns are then split. "Formed": W + A B is made in the forward and again in the
backward pass, with the gradients of A and B still in low-rank form. Every round times each once, in an order
that turns; a ratio is the median of the rounds' own, and the spread is half the distance of its quartiles.

What came of it is in `docs/cost.md`.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.reports.provenance import provenance

from . import in_turn, record


RANK = 4
PROJECTIONS = {
    "GPT-2's q, k, v, if they were apart": (768, (768, 768, 768)),
    "SmolLM2's q, k, v": (576, (576, 192, 192)),
    "SmolLM2's gate, up": (576, (1536, 1536)),
    "GPT-2's c_fc": (768, (3072,)),
}
TOKENS = (64, 512, 2048)
Factors = Sequence[tuple[jax.Array, jax.Array]]
Form = Callable[[jax.Array, Factors, Sequence[jax.Array]], list[jax.Array]]


def apart(x: jax.Array, factors: Factors, weights: Sequence[jax.Array]) -> list[jax.Array]:
    return [x @ w + (x @ a) @ b for (a, b), w in zip(factors, weights, strict=True)]


def one_a(x: jax.Array, factors: Factors, weights: Sequence[jax.Array]) -> list[jax.Array]:
    inner = jnp.split(x @ jnp.concatenate([a for a, _ in factors], axis=1), len(factors), axis=1)
    return [x @ w + h @ b for h, (_, b), w in zip(inner, factors, weights, strict=True)]


def formed(x: jax.Array, factors: Factors, weights: Sequence[jax.Array]) -> list[jax.Array]:
    return [_formed(x, *factor, w) for factor, w in zip(factors, weights, strict=True)]


@jax.custom_vjp
def _formed(x: jax.Array, a: jax.Array, b: jax.Array, w: jax.Array) -> jax.Array:
    return x @ (w + a @ b)


def _backward(kept: tuple, gradient: jax.Array) -> tuple:
    x, a, b, w = kept
    narrow = gradient @ b.T
    return gradient @ (w + a @ b).T, x.T @ narrow, (x @ a).T @ gradient, None


_formed.defvjp(lambda *arrays: (_formed(*arrays), arrays), _backward)

FORMS: dict[str, Form] = {"apart": apart, "one A": one_a, "formed": formed}


def compiled(form: Form, *arrays: Any) -> Callable:
    def loss(x: jax.Array, factors: Factors, weights: Sequence[jax.Array]) -> jax.Array:
        return sum(jnp.sum(jnp.tanh(y)) for y in form(x, factors, weights))

    return jax.jit(jax.grad(loss, (0, 1))).lower(*arrays).compile()


def arrays_of(width: int, outs: Sequence[int], tokens: int) -> tuple:
    keys = iter(jax.random.split(jax.random.key(0), 1 + 3 * len(outs)))
    draw = lambda rows, columns: jax.random.normal(next(keys), (rows, columns)) / rows**0.5
    factors = [(draw(width, RANK), draw(RANK, out)) for out in outs]
    return draw(tokens, width), factors, [draw(width, out) for out in outs]


def measure(name: str, tokens: int, rounds: int) -> dict[str, Any]:
    width, outs = PROJECTIONS[name]
    arrays = arrays_of(width, outs, tokens)
    forms = {form: compiled(FORMS[form], *arrays) for form in FORMS if form != "one A" or len(outs) > 1}

    def timed(form: str) -> float:
        started = time.perf_counter()
        jax.block_until_ready(forms[form](*arrays))
        return time.perf_counter() - started

    ways = {form: functools.partial(timed, form) for form in forms}
    in_turn.taken(ways, 1)  # what only the first calls pay
    seconds = in_turn.taken(ways, rounds)
    row: dict[str, Any] = {"projections": name, "tokens": tokens}
    row["apart ms"] = round(1e3 * statistics.median(seconds["apart"]), 2)
    for form in [form for form in FORMS if form != "apart"]:
        found = in_turn.ratio(seconds[form], seconds["apart"]) if form in seconds else (None, None)
        row[form], row[f"{form}, spread"] = found
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21, help="of every form (default: 21)")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds is {options.rounds}: a spread needs 2 at least")
    rows = []
    for name in PROJECTIONS:
        for tokens in TOKENS:
            rows.append(measure(name, tokens, options.rounds))
            print(rows[-1], file=sys.stderr, flush=True)
    record.save(
        "low_rank_forms", f"python -m benchmarks.low_rank_forms --rounds {options.rounds}", provenance(), rows
    )
    print(record.table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
