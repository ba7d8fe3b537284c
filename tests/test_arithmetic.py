"""`lora_jax.arithmetic`: against dense matrices and every method's own equation in float64, and PEFT's
`add_weighted_adapter`; and many adapters at once, of methods other than LoRA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_rows import ADAPTERS, AXES, BY_NAME, literal, SHAPES as ROW_SHAPES
from random_deltas import assert_close, dense, lorafied, random_delta, random_like, shaped

import lora_jax
from lora_jax import AdaLoRA, arithmetic, DeltaLoRA, DyLoRA, Full, LoRA, LoRAFA, PiSSA, VeRA
from lora_jax._packed.packed import Packed
from lora_jax._tree.nodes import Fixed, is_node


# --- as_lora ------------------------------------------------------------------------------------------------

RANKS = {
    "VeRA": 5,
    ("LoRA of blocks", "qkv"): 4,
    "PiSSA": 4,
    "PiSSA, iterations": 4,
    "Delta-LoRA": 4,
    "Delta-LoRA, delayed": 4,
}  # 2 for the rest


@pytest.mark.parametrize("name", sorted(set(ADAPTERS) - {"DoRA", "LoRA", "DyLoRA, all", "PiSSA, iterations"}))
def test_as_lora_is_the_same_adapter(name, x64):
    """Of a stack, of several out axes, transposed or not. The oracle is the method's equation, as its
    paper has it.
    """
    row = BY_NAME[name]
    frozen, delta = (
        random_like(tree, 0) for tree in lora_jax.lorafy(shaped(ROW_SHAPES), row.targets, axes=AXES)
    )
    frozen = row.begin(frozen, random_like(delta, 1))
    plain = arithmetic.as_lora(frozen, delta)
    found, wanted = jax.jit(
        lambda plain, frozen, delta: (lora_jax.merge(*plain), literal(row, frozen, delta))
    )(plain, frozen, delta)
    assert_close(found, wanted)
    # The base is as it was given, and each adapter a plain LoRA.
    weights = jax.tree.map(
        lambda leaf: leaf.weight if isinstance(leaf, Fixed) else leaf, frozen, is_leaf=is_node
    )
    assert jax.tree.structure(plain.frozen) == jax.tree.structure(weights)
    assert all(a is b for a, b in zip(jax.tree.leaves(plain.frozen), jax.tree.leaves(weights), strict=True))
    adapters = {
        leaf.spec.path: leaf for leaf in jax.tree.leaves(plain.delta, is_leaf=is_node) if leaf is not None
    }
    assert {path: leaf.spec.method.rank for path, leaf in adapters.items()} == {
        path: RANKS.get((name, path), RANKS.get(name, 2)) for path in AXES
    }
    for leaf in adapters.values():
        assert (
            type(leaf.spec.method) is LoRA
            and leaf.spec.group is None
            and leaf.arrays["a"].shape[-1] == leaf.spec.method.rank
        )
    # The same from shapes; and once more changes nothing.
    assert jax.tree.structure(jax.eval_shape(arithmetic.as_lora, frozen, delta)) == jax.tree.structure(plain)
    assert all(
        a is b
        for a, b in zip(jax.tree.leaves(arithmetic.as_lora(*plain)), jax.tree.leaves(plain), strict=True)
    )


def test_delta_lora_is_twice_the_rank():
    """`[A, A_s]` and `[(1 + ratio)·B; −ratio·B_s]` of 2·alpha: three terms, of which two have one A.
    Traced or not.
    """
    frozen, delta = lorafied(DeltaLoRA(rank=2, alpha=3, ratio=0.5))
    fixed, trained = frozen["heads"].arrays, delta["heads"].arrays
    for as_lora in (arithmetic.as_lora, jax.jit(arithmetic.as_lora)):
        leaf = as_lora(frozen, delta).delta["heads"]
        assert leaf.spec.method == LoRA(rank=4, alpha=6, dtype="float32")
        np.testing.assert_array_equal(leaf.arrays["a"], np.concatenate([trained["a"], fixed["start_a"]], -1))
        np.testing.assert_allclose(
            leaf.arrays["b"], np.concatenate([1.5 * trained["b"], -0.5 * fixed["start_b"]], 1), rtol=1e-7
        )


def test_no_rounding_that_can_be_avoided():
    """In bfloat16: the scale stays beside A and B, whose numbers stay what they were."""
    frozen, delta = lorafied(PiSSA(rank=2, alpha=3, dtype="bfloat16", dropout=0.25))
    leaf = arithmetic.as_lora(frozen, delta).delta["w"]
    assert leaf.spec.method == LoRA(rank=4, alpha=6, dtype="bfloat16", dropout=0.25)
    np.testing.assert_array_equal(
        leaf.arrays["b"], np.concatenate([delta["w"].arrays["b"], -frozen["w"].arrays["start_b"]])
    )


def test_as_lora_beside_a_quantised_base_and_leaves_that_train():
    frozen, delta = lorafied(LoRAFA(rank=2), targets={"w": LoRAFA(rank=2), "window": Full()})
    frozen = lora_jax.quantize(frozen, "int8", targets="w|heads")
    plain = arithmetic.as_lora(frozen, delta)
    assert (
        isinstance(frozen["w"].weight, Packed)
        and plain.frozen["w"] is frozen["w"].weight
        and plain.frozen["heads"] is frozen["heads"]
    )
    assert (
        plain.frozen["window"] is None
        and plain.delta["window"] is delta["window"]
        and plain.delta["heads"] is None
    )
    assert plain.delta["w"].arrays["a"].shape == (6, 2)
    assert_close(lora_jax.merge(*plain), lora_jax.merge(frozen, delta), rtol=1e-6)


def test_as_lora_of_each_of_a_stack():
    """`stack` cannot bring PiSSA adapters to one rank, and says to do this first."""
    frozen, first = lorafied(PiSSA(rank=2, alpha=3))
    stacked = lora_jax.stack([first, random_like(first, 9)])
    several = jax.vmap(lambda delta: arithmetic.as_lora(frozen, delta).delta)(stacked)
    assert_close(lora_jax.take(several, 1), arithmetic.as_lora(frozen, random_like(first, 9)).delta)
    other = lorafied(LoRA(rank=1))[1]
    assert lora_jax.stack([lora_jax.take(several, 0), other])["w"].arrays["a"].shape == (2, 6, 4)
    with pytest.raises(ValueError, match=r"cannot be padded to 2.*lora_jax.arithmetic.as_lora"):
        lora_jax.stack([lorafied(PiSSA(rank=1))[1], first])
    with pytest.raises(ValueError, match="of stacked adapters, pick one"):
        arithmetic.as_lora(frozen, stacked)


# --- scaled -------------------------------------------------------------------------------------------------


LINEAR = [LoRA(rank=2), LoRAFA(rank=2), AdaLoRA(rank=2), DyLoRA(rank=2), VeRA(rank=5)]


@pytest.mark.parametrize("method", LINEAR, ids=lambda method: type(method).__name__)
def test_scaled(method, x64):
    own = dataclasses.replace(method, blocks=(True, False)) if type(method) is LoRA else method
    frozen, delta = lorafied(method, "float64", {"w": own, "heads": method})
    empty = lambda leaf: (
        dataclasses.replace(leaf, weight=0 * leaf.weight) if isinstance(leaf, Fixed) else 0 * leaf
    )
    frozen = jax.tree.map(empty, frozen, is_leaf=is_node)

    @jax.jit
    def both(delta, factor):
        stacked = lora_jax.take(arithmetic.scaled(lora_jax.stack([delta, delta]), factor), 1)
        return (
            lora_jax.merge(frozen, delta),
            lora_jax.merge(frozen, arithmetic.scaled(delta, factor)),
            lora_jax.merge(frozen, stacked),
        )

    for factor in (-1, 0.3):  # traced
        before, *after = both(delta, float(factor))
        for found in after:
            assert_close(found, jax.tree.map(lambda array, factor=factor: factor * array, before))
    twice = arithmetic.scaled(delta, 2)  # not traced
    assert jax.tree.structure(twice) == jax.tree.structure(delta)
    np.testing.assert_array_equal(twice["w"].arrays["b"], 2 * delta["w"].arrays["b"])


# --- sums, against dense matrices ---------------------------------------------------------------------------


def test_weighted(x64):
    deltas = [
        random_delta(LoRA(rank=3, alpha=4), 0),
        random_delta(LoRA(rank=2, alpha=-5, rs=True), 1),
        random_delta(LoRA(rank=1), 2, targets="w"),
    ]
    weights = [0.7, -0.3, 2.0]
    exact = arithmetic.weighted(deltas, weights)
    updates = [dense(delta) for delta in deltas]
    for name, found in dense(exact).items():
        wanted = sum(
            weight * update[name] for weight, update in zip(weights, updates, strict=True) if name in update
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)
    assert {name: leaf.spec.method for name, leaf in exact.items()} == {
        name: LoRA(rank=rank, alpha=rank, dtype="float64")
        for name, rank in (("w", 6), ("heads", 5), ("window", 5))
    }

    # The weights may be learnt.
    def entry(weights):
        arrays = arithmetic.weighted(deltas, weights)["w"].arrays
        return arrays["a"][0] @ arrays["b"][:, 0]

    np.testing.assert_allclose(
        jax.jit(jax.grad(entry))(jnp.asarray(weights)),
        [update["w"][0, 0, 0] for update in updates],
        rtol=1e-9,
    )


def test_the_weight_is_not_rounded_to_few_bits():
    """0.3 in bfloat16 is 0.3008."""
    b = np.arange(1.0, 9.0, dtype=np.float32).reshape(1, 8)
    delta, wanted = (
        random_delta(LoRA(rank=1, alpha=1, dtype="bfloat16"), targets="w", dtype="float32"),
        jnp.asarray(0.3 * b, "bfloat16"),
    )
    delta["w"].arrays["b"] = jnp.asarray(b, "bfloat16")
    np.testing.assert_array_equal(arithmetic.weighted([delta], [0.3])["w"].arrays["b"], wanted)
    np.testing.assert_array_equal(arithmetic.scaled(delta, 0.3)["w"].arrays["b"], wanted)


def test_leaves_that_train_themselves_are_averaged(x64):
    deltas = [random_delta(seed=seed, targets={"w": LoRA(rank=2), "window": Full()}) for seed in range(3)]
    mean = arithmetic.weighted(deltas, [0.5, 0.75, -0.25])
    np.testing.assert_allclose(
        mean["window"], sum(w * delta["window"] for w, delta in zip([0.5, 0.75, -0.25], deltas, strict=True))
    )
    assert mean["heads"] is None


def test_an_average_is_rounded_once():
    """In bfloat16: its sum in float32, of weights that bfloat16 does not have."""
    values = np.random.default_rng(0).normal(size=(3, 64)).astype("float32")
    deltas = [{"b": jnp.asarray(row, "bfloat16")} for row in values]
    found = arithmetic.weighted(deltas, [0.3, 0.3, 0.4])["b"]
    wanted = sum(w * np.asarray(d["b"], np.float64) for w, d in zip((0.3, 0.3, 0.4), deltas, strict=True))
    assert found.dtype == "bfloat16"
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=2**-8, atol=0)


def test_dropout_of_a_sum():
    a, b, c = (
        random_delta(LoRA(rank=1, dropout=rate), targets="w", dtype="float32") for rate in (0.1, 0.1, 0.2)
    )
    assert [arithmetic.weighted([a, other], [1, 1])["w"].spec.method.dropout for other in (b, c)] == [
        0.1,
        0.0,
    ]


# --- lower ranks --------------------------------------------------------------------------------------------


def test_compress_is_the_truncated_decomposition(x64):
    delta = random_delta(LoRA(rank=5, alpha=-4, rs=True))
    whole, values, compressed = dense(delta), arithmetic.singular_values(delta), arithmetic.compress(delta, 3)
    for name, found in dense(compressed).items():
        u, s, v = np.linalg.svd(whole[name])
        np.testing.assert_allclose(found, (u[..., :3] * s[:, None, :3]) @ v[:, :3], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(values[name].reshape(-1, 5), s[:, :5], rtol=1e-9)
        lost = np.linalg.norm(whole[name] - found, axis=(1, 2))
        np.testing.assert_allclose(
            lost, np.linalg.norm(values[name].reshape(-1, 5)[:, 3:], axis=-1), rtol=1e-8
        )
        assert compressed[name].spec == dataclasses.replace(
            delta[name].spec, method=LoRA(rank=3, alpha=3, dtype="float64")
        )
    assert compressed["heads"].arrays["a"].shape == (2, 6, 3) and compressed["heads"].arrays["b"].shape == (
        2,
        3,
        2,
        4,
    )
    assert all(arithmetic.compress(delta, rank)["w"] is delta["w"] for rank in (5, 9))
    # What has not been trained stays nothing.
    assert not any(
        np.any(array)
        for array in jax.tree.leaves(arithmetic.compress(jax.tree.map(jnp.zeros_like, delta), 3))
    )


def test_compress_to_what_fits(x64):
    """VeRA's rank may be above min(in, out), and so that of its sum with others."""
    frozen, vera = lorafied(VeRA(rank=9), "float64", targets="w")
    whole = arithmetic.as_lora(frozen, vera).delta
    compressed = arithmetic.compress(whole, 8)
    assert compressed["w"].spec.method.rank == 6
    np.testing.assert_allclose(dense(compressed)["w"], dense(whole)["w"], rtol=1e-9, atol=1e-9)


def test_compress_forms_no_weight():
    delta = random_delta(LoRA(rank=2), dtype="float32")

    def forms(function):
        return any(
            shape in str(jax.make_jaxpr(function)(delta))
            for shape in ("f32[6,8]", "f32[7,6]", "f32[6,7]", "f32[8,6]")
        )

    assert not forms(lambda delta: arithmetic.compress(delta, 1))
    assert forms(
        lambda delta: arithmetic.ties([delta], [1.0], density=0.5, rank=1)
    )  # and so the search can find something
