"""What `lora_jax.arithmetic` refuses, and what its errors say."""

import jax
import jax.numpy as jnp
import pytest
from random_deltas import lorafied, random_delta, WHERE

import lora_jax
from lora_jax import AdaLoRA, arithmetic, DeltaLoRA, DoRA, Full, LoRA, PiSSA


AS_LORA_FIRST = r"Make plain ones first: `frozen, delta = lora_jax.arithmetic.as_lora\(frozen, delta\)`"
DORA = (
    r"the DoRA adapter of 'heads' is no LoRA: its magnitude multiplies W too.*Use its weights instead: "
    r"`merge\(frozen, delta\)`"
)
FULL = {"w": Full()}
ERRORS = {
    "DoRA": (lambda d: arithmetic.as_lora(*lorafied(DoRA(rank=2))), ValueError, DORA),
    "shapes": (
        lambda d: arithmetic.as_lora(*jax.eval_shape(lambda: lorafied(LoRA(1)))),
        TypeError,
        r"eval_shape\(lambda frozen, delta: as_lora\(f",
    ),
    "another base": (
        lambda d: arithmetic.as_lora({"w": jnp.ones((3, 8))}, {"w": d(AdaLoRA(rank=2))["w"]}),
        ValueError,
        "this is another base",
    ),
    "factors": (lambda d: arithmetic.scaled(d(), jnp.ones(2)), ValueError, r"`factor` has the shape \(2,\)"),
    "scaled PiSSA": (
        lambda d: arithmetic.scaled(d(PiSSA(rank=1)), 2),
        ValueError,
        r"PiSSA adapter of 'heads' adds is not proportional.*as_lora",
    ),
    "scaled DoRA": (lambda d: arithmetic.scaled(d(DoRA(rank=1)), 2), ValueError, "DoRA has none"),
    "scaled Delta-LoRA": (
        lambda d: arithmetic.scaled(d(DeltaLoRA(rank=1, delayed=True)), 2),
        ValueError,
        "DeltaLoRA adapter of 'heads'",
    ),
    "scaled Full": (
        lambda d: arithmetic.scaled(d(targets=FULL), 2),
        ValueError,
        r"`Full`\) at 'w': what it adds is its value less that of the base",
    ),
    "nothing": (lambda d: arithmetic.weighted([], []), ValueError, "`deltas` is empty"),
    "one weight": (
        lambda d: arithmetic.weighted([d(), d()], [1.0]),
        ValueError,
        r"`weights` has the shape \(1,\) for 2 deltas",
    ),
    "containers": (
        lambda d: arithmetic.weighted([d(), {"w": None}], [1, 1]),
        ValueError,
        r"`deltas\[1\]` does not have the containers",
    ),
    "bases": (
        lambda d: arithmetic.weighted([d(axes=WHERE), d(axes={**WHERE, "w": "out in"})], [1, 1]),
        ValueError,
        r"`deltas\[1\]` is of another base: at 'w' its weight is \(6, 8\) with axes 'out in', and that of "
        r"`deltas\[0\]` \(6, 8\) with 'in out'",
    ),
    "AdaLoRA": (
        lambda d: arithmetic.weighted([d(), d(AdaLoRA(rank=1))], [1, 1]),
        ValueError,
        f"'heads' is AdaLoRA, .*{AS_LORA_FIRST}",
    ),
    "blocks": (
        lambda d: arithmetic.compress(d(LoRA(rank=2, blocks=[True]), targets="w"), 1),
        ValueError,
        f"LoRA with `blocks`.*{AS_LORA_FIRST}",
    ),
    "Full and not": (
        lambda d: arithmetic.weighted([d(), d(targets=FULL)], [1, 1]),
        ValueError,
        r"`deltas\[1\]` has a leaf that trained .* at 'w'",
    ),
    "Full": (
        lambda d: arithmetic.weighted([d(targets=FULL)] * 2, [1, 1]),
        ValueError,
        "weights that sum to 1",
    ),
    "Full and nothing": (
        lambda d: arithmetic.weighted([d(targets=FULL), d(targets="heads")], [0.5, 0.5]),
        ValueError,
        "where all deltas have",
    ),
    "Full and TIES": (
        lambda d: arithmetic.ties([d(targets=FULL)] * 2, [0.5, 0.5], density=0.5),
        ValueError,
        "Only with `weighted`",
    ),
    "stack": (
        lambda d: arithmetic.compress(lora_jax.stack([d(), d()]), 1),
        ValueError,
        "'heads' is a stack of several",
    ),
    "shapes of many": (
        lambda d: arithmetic.ties(jax.eval_shape(lambda: [d()]), [1], density=1),
        TypeError,
        r"lambda deltas: ties\(deltas, w",
    ),
    "no key": (
        lambda d: arithmetic.dare([d(), d()], [1, 1], density=0.5, key=None),
        TypeError,
        r"`key` is None; pass a random key",
    ),
    "rank": (lambda d: arithmetic.compress(d(), 0), ValueError, "`rank` is 0; it must be a positive integer"),
    "density": (
        lambda d: arithmetic.ties([d(), d()], [1, 1], density=0),
        ValueError,
        "`density` is 0; it is the part",
    ),
    "majority": (
        lambda d: arithmetic.ties([d(), d()], [1, 1], density=0.5, majority="most"),
        ValueError,
        "`majority` is 'most'; pass 'total'",
    ),
    "ranks": (
        lambda d: arithmetic.ties([d(), d(LoRA(rank=5))], [1, 1], density=0.5),
        ValueError,
        "ranks 3, 5 at 'heads'.*`rank=`, for example 5",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call(lambda *args, **options: random_delta(*args, **{"dtype": "float32", **options}))
