"""`merge`, `unmerge` and `merge_report`, against NumPy in float64; `count` and `summary`."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lora_jax
from lora_jax import Full, LoRA


def adapted(sizes, axes="in out", method=LoRA(rank=2), dtype="float64", seed=0):
    """`(params, frozen, delta)` with random weights, A and B, of which none is computed by JAX."""
    rng = np.random.default_rng(seed)
    params = {
        "w": jnp.asarray(rng.normal(size=sizes), dtype),
        "other": jnp.asarray(rng.normal(size=3), dtype),
    }
    shapes = jax.eval_shape(lambda params: params, params)
    delta = lora_jax.lorafy(shapes, "w", method=method, axes=axes).delta
    return (
        params,
        dict(params),
        jax.tree.map(lambda array: jnp.asarray(rng.normal(size=array.shape), array.dtype), delta),
    )


def factors(delta):
    return (np.asarray(delta["w"].arrays[name], np.float64) for name in "ab")


FORMS = [
    ((6, 10), "in out", LoRA(rank=4, alpha=3), "ir,ro->io", 3 / 4),
    ((10, 6), "out in", LoRA(rank=4, alpha=-3, rs=True), "ir,ro->oi", -3 / 2),
    ((3, 6, 8), "layer in out", LoRA(rank=2), "lir,lro->lio", 8),
    ((2, 6, 3, 8), "layer out layer in", LoRA(rank=2), "klir,klro->koli", 8),
    ((6, 2, 4), "in out out", LoRA(rank=2), "ir,rhk->ihk", 8),
    ((2, 4, 6), "in in out", LoRA(rank=2), "hkr,ro->hko", 8),
    ((3, 3, 2, 4), "in in in out", LoRA(rank=2), "hwir,ro->hwio", 8),
]


@pytest.mark.parametrize("sizes, axes, method, product, scale", FORMS)
def test_merge_and_unmerge(sizes, axes, method, product, scale, x64):
    params, frozen, delta = adapted(sizes, axes, method)
    before, buffer = np.array(params["w"]), params["w"].unsafe_buffer_pointer()
    merged = lora_jax.merge(frozen, delta)
    expected = before + scale * np.einsum(product, *factors(delta))
    np.testing.assert_allclose(merged["w"], expected, rtol=1e-13, atol=1e-13)
    assert jax.tree.structure(merged) == jax.tree.structure(params) and merged["w"].dtype == params["w"].dtype
    assert merged["other"] is params["other"]
    # The base is where and what it was.
    assert frozen["w"].unsafe_buffer_pointer() == buffer != merged["w"].unsafe_buffer_pointer()
    np.testing.assert_array_equal(params["w"], before)
    # Merging is a function: again is the same. Taking out is its inverse.
    np.testing.assert_array_equal(lora_jax.merge(frozen, delta)["w"], merged["w"])
    np.testing.assert_allclose(lora_jax.unmerge(merged, delta)["w"], before, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "blocks, axes, covered",
    [
        ((True, False, True), "in out", [(0, 4), (8, 12)]),
        ((False, True), "in out", [(6, 12)]),
        ((True, False, True), "out in", [(0, 4), (8, 12)]),
    ],
)
def test_blocks(blocks, axes, covered, x64):
    params, frozen, delta = adapted(
        (6, 12) if axes == "in out" else (12, 6), axes, LoRA(rank=2, alpha=3, blocks=blocks)
    )
    merged = lora_jax.merge(frozen, delta)
    turned = np.asarray if axes == "in out" else np.transpose
    expected = turned(np.array(params["w"])).copy()
    for a, b, (start, stop) in zip(*factors(delta), covered, strict=True):
        expected[:, start:stop] += 1.5 * a @ b
    np.testing.assert_allclose(turned(merged["w"]), expected, rtol=1e-13)
    np.testing.assert_allclose(lora_jax.unmerge(merged, delta)["w"], params["w"], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_are_rounded_once(dtype):
    """The sum in float32, then one cast. Numbers of few bits make the sum exact, so that equality can be
    demanded.
    """
    rng, narrow = np.random.default_rng(0), jnp.dtype(dtype)
    _, _, delta = adapted((64, 64), method=LoRA(rank=2, alpha=2), dtype="float32")
    weight = (np.round(rng.uniform(-4, 4, (64, 64)) * 4096) / 4096).astype(narrow)
    frozen = {"w": jnp.asarray(weight), "other": jnp.ones(3, dtype)}
    delta = jax.tree.map(
        lambda array: jnp.asarray(rng.integers(-127, 128, array.shape) / 256, "float32"), delta
    )
    update = np.einsum("ir,ro->io", *factors(delta))
    expected = (weight.astype(np.float64) + update).astype(np.float32).astype(narrow)
    merged = lora_jax.merge(frozen, delta)["w"]
    assert merged.dtype == dtype
    np.testing.assert_array_equal(np.asarray(merged), expected)
    assert np.any(weight + update.astype(narrow) != expected), "rounding the update first would not show here"
    # Unmerging is off by what the two casts round away: half a unit in the last place each.
    unit = float(jnp.finfo(dtype).eps) * np.maximum(
        np.abs(expected.astype(np.float64)), np.abs(weight.astype(np.float64))
    )
    back = lora_jax.unmerge({**frozen, "w": merged}, delta)["w"]
    drift = np.abs(np.asarray(back, np.float64) - weight.astype(np.float64))
    assert np.all(drift <= unit) and np.any(drift > 0)


def test_shardings():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    specs = {"w": P("fsdp", "tensor"), "whole": P()}
    params = {
        name: jax.device_put(np.asarray(rng.normal(size=(8, 8)), np.float32), NamedSharding(mesh, spec))
        for name, spec in specs.items()
    }
    params["one"] = jax.device_put(np.ones((8, 8), np.float32), jax.devices()[3])
    # Left to itself, XLA splits the sum as these adapters are split.
    params["unlike its adapter"] = jax.device_put(np.ones((8, 8), np.float32), NamedSharding(mesh, P()))
    frozen, delta = (
        params,
        lora_jax.lorafy(jax.eval_shape(lambda params: params, params), ".*", method=LoRA(rank=2)).delta,
    )
    delta = jax.tree.map(lambda array: np.ones(array.shape, np.float32), delta)
    for name, spec in (("a", P(("fsdp", "tensor"))), ("b", P(None, ("fsdp", "tensor")))):
        arrays = delta["unlike its adapter"].arrays
        arrays[name] = jax.device_put(arrays[name], NamedSharding(mesh, spec))
    for tree in (lora_jax.merge(frozen, delta), lora_jax.unmerge(frozen, delta)):
        for name, weight in params.items():
            assert tree[name].sharding == weight.sharding and tree[name].committed
            np.testing.assert_allclose(np.abs(tree[name] - np.asarray(weight)), 16, rtol=1e-5)


def test_under_jit_and_grad(x64):
    params, frozen, delta = adapted((6, 10), method=LoRA(rank=4, alpha=3))
    cotangent = np.random.default_rng(1).normal(size=(6, 10))
    loss = lambda delta, frozen: jnp.sum(lora_jax.merge(frozen, delta)["w"] * cotangent)
    value, gradient = jax.jit(jax.value_and_grad(loss))(delta, frozen)
    a, b = factors(delta)
    np.testing.assert_allclose(
        value, np.sum((np.asarray(params["w"]) + 0.75 * a @ b) * cotangent), rtol=1e-12
    )
    np.testing.assert_allclose(gradient["w"].arrays["a"], 0.75 * cotangent @ b.T, rtol=1e-12)
    np.testing.assert_allclose(gradient["w"].arrays["b"], 0.75 * a.T @ cotangent, rtol=1e-12)


def test_nan_is_not_hidden():
    _, frozen, delta = adapted((6, 10), dtype="float32")
    delta["w"].arrays["a"] = delta["w"].arrays["a"].at[2, 0].set(jnp.nan)
    merged = np.asarray(lora_jax.merge(frozen, delta)["w"])
    assert np.isnan(merged[2]).all() and not np.isnan(np.delete(merged, 2, 0)).any()
    assert np.isnan(lora_jax.merge_report(frozen, delta)[0].lost)
    assert not np.isnan(frozen["w"]).any()


def test_full_leaf_is_the_new_value():
    params = {"w": jnp.ones((4, 4)), "b": jnp.zeros(4)}
    frozen, delta = lora_jax.lorafy(params, {"w": LoRA(rank=1), "b": Full()})
    delta["b"] = jnp.arange(4.0)
    merged = lora_jax.merge(frozen, delta)
    assert merged["b"] is delta["b"] and jax.tree.structure(merged) == jax.tree.structure(params)
    with pytest.raises(ValueError, match=r"trained themselves \(`Full`\): 'b'.*keep the original"):
        lora_jax.unmerge(merged, delta)


def test_errors():
    _, frozen, delta = adapted((8, 8), dtype="float32")
    with pytest.raises(ValueError, match="`base` is 'int4'; pass one of 'dequantized'"):
        lora_jax.merge(frozen, delta, base="int4")
    for verb in (lora_jax.merge, lora_jax.unmerge, lora_jax.merge_report):
        with pytest.raises(ValueError, match=r"'w' of shape \(8, 8\), and here it has the shape \(8, 9\)"):
            verb({**frozen, "w": jnp.ones((8, 9))}, delta)
        with pytest.raises(ValueError, match=r"holds a of shape \(8, 8, 2\) at 'w'.*pick one with `take"):
            verb(frozen, lora_jax.stack([delta] * 8))


def test_leaves_of_equal_shape_share_a_compilation(monkeypatch):
    traced, canonical = [], LoRA.canonical
    monkeypatch.setattr(
        LoRA, "canonical", lambda self, *rest: (traced.append(rest[3].path), canonical(self, *rest))[1]
    )
    params = {name: jnp.ones((5, 5)) for name in "abc"}
    frozen, delta = lora_jax.lorafy(params, ".*", method=LoRA(rank=1, alpha=1.2345))
    lora_jax.merge(frozen, delta)
    assert len(traced) == 1
    lora_jax.merge(*lora_jax.lorafy({"a": jnp.ones((5, 6))}, ".*", method=LoRA(rank=1, alpha=1.2345)))
    assert len(traced) == 2


# --- what rounding costs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("b_scale, known", [(0.1, 0.002), (0.01, 0.011), (0.001, 0.115)])
def test_report_in_bfloat16(b_scale, known):
    """The known figures are those of a base N(0, 0.02²) with rank 4 and alpha 16."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(768, 64), scale=0.02).astype(ml_dtypes.bfloat16)
    frozen, delta = lora_jax.lorafy({"h": {"w": jnp.asarray(weight)}}, "w", method=LoRA(rank=4))
    b = rng.normal(size=(4, 64), scale=b_scale).astype(np.float32)
    delta["h"]["w"].arrays["b"] = jnp.asarray(b)
    (leaf,) = lora_jax.merge_report(frozen, delta)
    weight = weight.astype(np.float64)
    update = 4 * np.asarray(delta["h"]["w"].arrays["a"], np.float64) @ b
    rounded = (weight + update).astype(ml_dtypes.bfloat16).astype(np.float64)
    norm = np.linalg.norm
    assert (leaf.path, leaf.dtype) == ("h/w", "bfloat16")
    np.testing.assert_allclose(leaf.weight_norm, norm(weight), rtol=1e-4)
    np.testing.assert_allclose(leaf.update_norm, norm(update), rtol=1e-4)
    np.testing.assert_allclose(leaf.lost, norm(rounded - weight - update) / norm(update), rtol=2e-2)
    np.testing.assert_allclose(leaf.lost, known, rtol=0.15)


def test_report_is_a_table():
    params = {"w": jnp.ones((4, 4)), "half": jnp.ones((4, 4), "bfloat16"), "b": jnp.ones(4)}
    frozen, delta = lora_jax.lorafy(params, {"w|half": LoRA(rank=1), "b": Full()})
    delta["half"].arrays["b"] = jnp.full((1, 4), 1e-5)  # far below what bfloat16 can add to 1
    report = lora_jax.merge_report(frozen, delta)
    assert [(leaf.path, leaf.dtype, leaf.lost > 0.99) for leaf in report] == [
        ("half", "bfloat16", True),
        ("w", "float32", False),
    ]
    lines = str(report).splitlines()
    assert lines[0].split() == ["leaf", "dtype", "|W|", "|ΔW|", "ΔW", "lost"]
    assert lines[2].split()[0] == "half" and lines[2].endswith("100.00%") and lines[3].endswith("0.00%")


# --- counting -----------------------------------------------------------------------------------------------


def test_summary():
    params = {"w": jnp.ones((3, 8, 8)), "b": jnp.ones((2, 5)), "rest": jnp.ones(100)}
    delta = lora_jax.lorafy(params, {"w": LoRA(rank=2, dropout=0.1), "b": Full()}, axes="layer in out").delta
    assert lora_jax.count(delta) == 3 * 2 * 16 + 10
    header, _, *rows, total = str(lora_jax.summary(params, delta)).splitlines()
    assert header.split() == ["leaf", "shape", "axes", "method", "trains"]
    assert [row.split() for row in rows] == [
        ["b", "(2,", "5)", "-", "Full()", "10"],
        ["w", "(3,", "8,", "8)", "layer", "in", "out", "LoRA(rank=2,", "dropout=0.1)", "96"],
    ]
    assert total == "trainable 106 of 302 parameters (35.0993 %)"
