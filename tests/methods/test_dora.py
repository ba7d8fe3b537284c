"""DoRA's norm: by its expansion, constant in the backward pass, and of zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_rows import moved, quickly

import lora_jax
from lora_jax import DoRA


def test_dora_in_bfloat16_multiplies_in_float32():
    """It multiplies in float32, with the one rounding of the result: in bfloat16, 1.01 would be 1.0078
    itself.
    """
    weight = jax.random.normal(jax.random.key(0), (64, 64), jnp.bfloat16)
    frozen, delta = lora_jax.lorafy({"w": weight}, "w", method=DoRA(rank=2))
    x = jax.random.normal(jax.random.key(1), (256, 64), jnp.bfloat16)
    forward = jax.jit(
        lora_jax.adapt(lambda params, x: (x @ params["w"], x @ params["w"].T, params["w"][jnp.arange(8)]))
    )
    base = forward(lora_jax.combine(frozen, delta), x)
    delta["w"].arrays["m"] = delta["w"].arrays["m"] * 1.01
    for found, plain in zip(forward(lora_jax.combine(frozen, delta), x), base, strict=True):
        found, plain = np.asarray(found, np.float64), np.asarray(plain, np.float64)
        np.testing.assert_allclose(np.sum(found * plain) / np.sum(plain * plain), 1.01, atol=1e-3)


@pytest.mark.parametrize(
    "shape, axes",
    [
        ((6, 4), "in out"),
        ((4, 6), "out in"),
        ((3, 6, 4), "layer in out"),
        ((6, 2, 4), "in out out"),
        ((3, 3, 2, 4), "in in in out"),
    ],
)
def test_dora_norm(shape, axes, x64):
    """By its expansion, and constant in the backward pass: the gradient through it is another one."""
    frozen, start = lora_jax.lorafy(
        {"w": jnp.asarray(np.random.default_rng(0).normal(size=shape))},
        "w",
        method=DoRA(rank=2, alpha=3),
        axes=axes,
    )
    delta = moved(start)
    node = delta["w"]
    magnitude = node.spec.method.canonical(
        frozen["w"].weight, frozen["w"].arrays, node.arrays, node.spec, None
    ).magnitude
    words = axes.split()
    letters = "".join("xyzw"[index] for index in range(len(words)))
    of = lambda *kinds: "".join(letter for letter, word in zip(letters, words, strict=True) if word in kinds)
    product = np.einsum(
        f"{of('layer')}{of('in')}r,{of('layer')}r{of('out')}->{letters}", node.arrays["a"], node.arrays["b"]
    )
    direction = np.asarray(frozen["w"].weight) + 1.5 * product
    norm = np.sqrt(np.einsum(f"{letters},{letters}->{of('layer')}{of('out')}", direction, direction))
    np.testing.assert_allclose(magnitude, node.arrays["m"] / norm, rtol=1e-13)
    # Had the norm a derivative, scaling V up would change nothing.
    gradient = jax.grad(lambda delta: jnp.sum(lora_jax.merge(frozen, delta)["w"] * direction))(delta)[
        "w"
    ].arrays
    moving = sum(jnp.sum(gradient[name] * node.arrays[name]) for name in ("b",))
    expected = 1.5 * np.sum(
        product
        * direction
        * np.einsum(f"{of('layer', 'out')},{letters}->{letters}", np.asarray(magnitude), np.ones(shape))
    )
    np.testing.assert_allclose(moving, expected, rtol=1e-11)


def test_dora_norm_in_float32_when_the_update_nearly_cancels_the_weight():
    """The worst case of the expansion: what is left is a hundredth of W."""
    rng = np.random.default_rng(0)
    a, b, rest = (rng.normal(size=sizes) for sizes in ((64, 4), (4, 32), (64, 32)))
    rest *= 0.01 * np.linalg.norm(a @ b) / np.linalg.norm(rest)
    frozen, delta = lora_jax.lorafy(
        {"w": jnp.asarray(rest - a @ b, "float32")}, "w", method=DoRA(rank=4, alpha=4)
    )
    arrays = {"a": jnp.asarray(a, "float32"), "b": jnp.asarray(b, "float32"), "m": jnp.ones(32)}
    found = (
        delta["w"]
        .spec.method.canonical(frozen["w"].weight, frozen["w"].arrays, arrays, delta["w"].spec, None)
        .magnitude
    )
    np.testing.assert_allclose(found, 1 / np.linalg.norm(rest, axis=0), rtol=0.02)


def test_dora_of_a_column_of_zeros():
    """It has no direction: the base's zeros at the start, a finite gradient, and it learns."""
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), "float32").at[:, 1].set(0.0)
    frozen, delta = lora_jax.lorafy({"w": weight}, "w", method=DoRA(rank=2))
    x, forward = jnp.ones((3, 6)), lora_jax.adapt(lambda params, x: x @ params["w"])
    np.testing.assert_array_equal(forward(lora_jax.combine(frozen, delta), x), x @ weight)
    step = quickly(
        jax.value_and_grad(
            lambda delta: jnp.mean(jnp.square(forward(lora_jax.combine(frozen, delta), x)[:, 1] - 1.0))
        )
    )
    for _ in range(60):
        value, gradient = step(delta)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((value, gradient)))
        delta = jax.tree.map(lambda array, slope: array - 0.05 * slope, delta, gradient)
    assert value < 0.01
    assert np.all(np.isfinite(lora_jax.merge(frozen, delta)["w"]))


@pytest.mark.parametrize("scan, kept", [(False, 1), (True, 5)], ids=["unrolled", "scan"])
def test_dora_keeps_one_array_for_the_backward_pass(scan, kept):
    """Of each product it keeps V x, beside what LoRA keeps: for the gradient of m. Where the layers are
    unrolled, what follows elementwise is made again from it, so that nothing is kept twice.
    """
    layers, width, inner, x = 6, 32, 128, jax.ShapeDtypeStruct((8, 64, 32), "float32")
    shapes = {"up": (width, inner), "up_bias": (inner,), "down": (inner, width), "down_bias": (width,)}
    params = {name: jax.ShapeDtypeStruct((layers, *shape), "float32") for name, shape in shapes.items()}

    def block(x, layer):
        hidden = jnp.tanh(x @ layer["up"] + layer["up_bias"][None, None])
        return jnp.sin(x + hidden @ layer["down"] + layer["down_bias"][None, None]), None

    def model(params, x):
        if scan:
            return jnp.sum(jax.lax.scan(block, x, params)[0])
        for layer in range(layers):
            x, _ = block(x, {name: array[layer] for name, array in params.items()})
        return jnp.sum(x)

    def temporary(method):
        frozen, delta = lora_jax.lorafy(params, {"up|down": method}, axes="layer in out")
        loss = lambda delta, frozen, x: lora_jax.adapt(model)(lora_jax.combine(frozen, delta), x)
        compiled = jax.jit(jax.grad(loss)).lower(delta, frozen, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    excess = temporary(DoRA(rank=2)) - temporary(lora_jax.LoRA(rank=2))
    assert excess / (layers * x.size * 4) < kept + 1
