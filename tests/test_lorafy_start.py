"""`lorafy`: what the adapters start as, in which dtype and of which key."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shapes import adapters, QV, RANK_2, shape

import lora_jax
from lora_jax import AdaLoRA, DeltaLoRA, DoRA, DyLoRA, LoRA, LoRAFA, VeRA


@pytest.mark.parametrize(
    "weight, dtype, expected",
    [
        ("float32", None, "float32"),
        ("bfloat16", None, "float32"),
        ("float16", None, "float32"),
        ("float64", None, "float64"),
        ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", jnp.bfloat16, "bfloat16"),
        ("float64", jnp.float32, "float32"),
    ],
)
def test_dtypes(weight, dtype, expected, x64):
    for leaf in (shape(4, 4, dtype=weight), np.ones((4, 4), jnp.dtype(weight)))[
        : 2 if weight != expected else 1
    ]:
        frozen, delta = lora_jax.lorafy({"w": leaf}, "w", method=LoRA(rank=2, dtype=dtype))
        assert {array.dtype.name for array in delta["w"].arrays.values()} == {expected} and frozen[
            "w"
        ] is leaf


def test_numpy_weights():
    weight = np.ones((4, 4))  # float64, which JAX takes as float32 when it is not told otherwise
    frozen, delta = lora_jax.lorafy({"w": weight}, "w", method=RANK_2)
    assert frozen["w"] is weight and delta["w"].arrays["a"].dtype == "float32"


INS, OUTS = 400, 8
GAUSSIAN = 1 / math.sqrt(INS)


@pytest.mark.parametrize(
    "init, sizes, axes, blocks",
    [
        ("gaussian", (OUTS, INS), "out in", None),
        ("gaussian", (3, INS, OUTS), "layer in out", None),  # layers are no fan-in
        ("kaiming", (3, INS, OUTS), "layer in out", None),
        ("kaiming", (4, INS // 4, OUTS), "in in out", None),  # two in axes are
        ("gaussian", (INS, 3 * OUTS), "in out", QV),
    ],
)
def test_initialisation(init, sizes, axes, blocks):
    method = LoRA(rank=OUTS, init=init, blocks=blocks)
    delta = lora_jax.lorafy({"w": np.zeros(sizes, np.float32)}, "w", method=method, axes=axes).delta["w"]
    a = np.asarray(delta.arrays["a"], np.float64)
    assert not np.any(delta.arrays["b"])
    bound = 1 / math.sqrt(INS)
    std = bound if init == "gaussian" else bound / math.sqrt(3)
    # Five standard errors of the mean and (bounded by that of the normal distribution) of the deviation.
    assert abs(a.mean()) < 5 * std / math.sqrt(a.size)
    assert abs(a.std() / std - 1) < 5 / math.sqrt(2 * a.size)
    tail = np.mean(np.abs(a) > 1.5 * std)
    if init == "kaiming":
        assert 0.99 * bound < np.abs(a).max() <= bound and abs(tail - (1 - 1.5 / math.sqrt(3))) < 0.02
    else:
        assert np.abs(a).max() > 2.5 * std and abs(tail - 0.1336) < 0.02
    if "layer" in axes or blocks:  # an independent A each
        groups = a.reshape(a.shape[0], -1)
        correlation = np.corrcoef(groups)[np.triu_indices(len(groups), 1)]
        assert np.all(np.abs(correlation) < 5 / math.sqrt(groups.shape[1]))


# Of every array that starts in its own way: its mean, its deviation, and the largest number that it can have.
# None: normal. The shared projections are Kaiming-uniform of gain √2, on their own fan-in: 400 and the rank.
STARTS = {
    AdaLoRA(rank=OUTS): {"a": (0, 0.02, None), "b": (0, 0.02, None), "e": (0, 0, 0)},
    VeRA(rank=64): {
        "b": (0, 0, 0),
        "d": (0.1, 0, 0.1),
        "shared_a": (0, math.sqrt(2 / INS), math.sqrt(6 / INS)),
        "shared_b": (0, math.sqrt(2 / 64), math.sqrt(6 / 64)),
    },
    VeRA(rank=64, d_initial=0.3): {"d": (0.3, 0, 0.3)},
    DoRA(rank=OUTS): {"a": (0, GAUSSIAN, None), "b": (0, 0, 0), "m": (20, 0, 20), "square": (400, 0, 400)},
    LoRAFA(rank=OUTS): {"a": (0, GAUSSIAN, None), "b": (0, 0, 0)},
    DyLoRA(rank=OUTS): {"a": (0, GAUSSIAN, None), "b": (0, 0, 0)},
    DeltaLoRA(rank=OUTS): {
        "a": (0, GAUSSIAN / math.sqrt(3), GAUSSIAN),
        "b": (0, 0, 0),
        "start_a": (0, GAUSSIAN / math.sqrt(3), GAUSSIAN),
        "start_b": (0, 0, 0),
    },
}


@pytest.mark.parametrize("method", STARTS, ids=repr)
def test_every_method_starts_as_its_paper_says(method):
    frozen, delta = lora_jax.lorafy({"w": np.ones((INS, OUTS), np.float32)}, "w", method=method)
    arrays = delta["w"].arrays | getattr(frozen["w"], "arrays", {})
    assert STARTS[method].keys() == arrays.keys() or method.rank == 64
    for name, (mean, std, largest) in STARTS[method].items():
        array = np.asarray(arrays[name], np.float64)
        assert abs(array.mean() - mean) <= 5 * std / math.sqrt(array.size) + 1e-6 * mean, name
        assert abs(array.std() - std) <= 5 * std / math.sqrt(2 * array.size) + 1e-6 * mean, name
        if largest is None:
            assert np.abs(array).max() > 2.2 * std, name
        else:
            assert 0.97 * largest <= np.abs(array).max() <= largest * (1 + 1e-6), name


def test_two_random_factors_are_drawn_apart():
    """From one key, the smaller would repeat the first numbers of the larger."""
    delta = lora_jax.lorafy({"w": np.ones((INS, OUTS), np.float32)}, "w", method=AdaLoRA(rank=OUTS)).delta
    a, b = (np.asarray(delta["w"].arrays[name]) for name in "ab")
    assert np.mean(np.isin(b, a)) < 0.5


PAIR = {"q": jnp.ones((4, 4)), "v": jnp.ones((4, 4)), "o": jnp.ones((4, 6))}


def same(a, b):
    return a.spec.path == b.spec.path and all(
        np.array_equal(a.arrays[name], b.arrays[name]) for name in a.arrays
    )


def test_keys_come_from_paths():
    alone = adapters(lora_jax.lorafy(PAIR, "q", method=RANK_2).delta)["q"]
    others = adapters(lora_jax.lorafy(PAIR, {"o|v": LoRA(rank=3), "q": RANK_2}).delta)
    assert same(alone, others["q"])
    assert not np.array_equal(others["o"].arrays["a"], others["v"].arrays["a"])
    moved = lora_jax.lorafy({"a": jnp.ones((2, 2)), **PAIR}, "q", method=RANK_2).delta["q"]
    assert same(alone, moved)


def test_key():
    default, zero, legacy, other = (
        lora_jax.lorafy(PAIR, "q", method=RANK_2, key=key).delta["q"]
        for key in (None, jax.random.key(0), jax.random.PRNGKey(0), jax.random.key(1))
    )
    assert same(default, zero) and same(zero, legacy) and not same(default, other)


def test_traces():
    """Under `jit` the adapters are those of an eager call, and the weights pass through."""
    eager = lora_jax.lorafy(PAIR, "q", method=RANK_2).delta["q"]
    traced = jax.jit(lambda params: lora_jax.lorafy(params, "q", method=RANK_2).delta)(PAIR)["q"]
    np.testing.assert_allclose(traced.arrays["a"], eager.arrays["a"], rtol=1e-6)
    assert traced.spec == eager.spec
