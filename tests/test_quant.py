"""Quantised bases: every use of a packed weight equals that of its unpacked values, and memory holds one
of these at a time.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from quant_model import AXES, EVERY, FORMATS, IDS, METHODS, model, near, network, numbers, randomised

import lora_jax
from lora_jax import DoRA, Full, LoRA, PiSSA, quantize
from lora_jax.quant import nbytes, Packed


MODEL = jax.jit(model)


@jax.jit
def model_and_gradient(params):
    """The gradient of the sum of sines: of plain parameters, so that one program serves all methods."""
    output, backward = jax.vjp(lambda params: model(params, IDS), params)
    return output, backward(jnp.cos(output))[0]


CELLS = [
    *((METHODS[0], format) for format in FORMATS),
    (DoRA(rank=2), "nf4"),
    *((method, "int8") for method in METHODS[1:]),
]


@pytest.mark.parametrize(
    "method, format", CELLS, ids=[f"{type(method).__name__}-{format}" for method, format in CELLS]
)
def test_adapted_equals_merged(method, format, x64):
    """Of every use, and with every leaf packed; the gradient too. In float64, so that only a wrong value
    could show.
    """
    params = network("float64")
    frozen, delta = lora_jax.lorafy(params, EVERY, method=method, axes=AXES)
    packed = quantize(frozen, format, targets=EVERY)
    delta = randomised(delta)
    merge = functools.partial(lora_jax.merge, packed)

    @jax.jit
    def adapted(delta):
        output, backward = jax.vjp(
            lambda delta: lora_jax.adapt(model)(lora_jax.combine(packed, delta), IDS), delta
        )
        return output, backward(jnp.cos(output))[0]

    merged, base = jax.jit(lambda delta: (merge(delta), merge(jax.tree.map(lambda _: None, params))))(delta)
    output, cotangent = model_and_gradient(merged)
    gradient = jax.jit(lambda delta, cotangent: jax.vjp(merge, delta)[1](cotangent)[0])(delta, cotangent)
    jax.tree.map(lambda a, b: near(a, b, 1e-10), adapted(delta), (output, gradient))
    assert all(not np.array_equal(base[name], params[name]) for name in EVERY.split("|")), (
        "nothing was quantised"
    )


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize(
    "dtype, bound", [("float32", 1e-5), ("bfloat16", 2**-5)]
)  # of eight uses, one after the other
def test_training_starts_from_the_quantised_base(method, dtype, bound):
    params = network(dtype)
    frozen, delta = lora_jax.lorafy(params, "kernel|stack", method=method, axes=AXES)
    packed = quantize(frozen, "nf4", targets="kernel|stack|heads")
    base = lora_jax.merge(packed, delta)
    assert jax.tree.map(lambda array: (array.shape, array.dtype), base) == jax.tree.map(
        lambda array: (array.shape, array.dtype), params
    )
    found = jax.jit(lora_jax.adapt(model))(lora_jax.combine(packed, delta), IDS)
    assert found.dtype == jnp.dtype(dtype)
    near(found, MODEL(base, IDS), bound)
    if not isinstance(method, DoRA):  # whose length stays that of the weights before
        weights = {
            name: getattr(packed[name], "weight", packed[name]).value()
            for name in ("kernel", "stack", "heads")
        }
        near(found, MODEL(params | weights, IDS), bound)


def test_dora_is_of_the_norm_of_the_quantised_weight(x64):
    weight = numbers(16, 24, dtype="float64")
    frozen, delta = lora_jax.lorafy({"w": weight}, "w", method=DoRA(rank=2, alpha=2))
    packed, delta = quantize(frozen, "nf4"), randomised(delta)
    a, b, m = (np.asarray(delta["w"].arrays[name]) for name in "abm")
    direction = np.asarray(packed["w"].weight.value()) + a @ b
    np.testing.assert_allclose(
        lora_jax.merge(packed, delta)["w"], m * direction / np.linalg.norm(direction, axis=0), rtol=1e-12
    )


def test_merge_says_which_base():
    params = network()
    frozen, delta = lora_jax.lorafy(params, "kernel", method=LoRA(rank=2))
    packed, delta = quantize(frozen, "int8", targets="kernel"), randomised(delta)
    update = 8 * delta["kernel"].arrays["a"] @ delta["kernel"].arrays["b"]
    near(lora_jax.merge(packed, delta)["kernel"], packed["kernel"].value() + update, 1e-6)
    near(lora_jax.merge(frozen, delta, base="original")["kernel"], params["kernel"] + update, 1e-6)
    with pytest.raises(
        ValueError,
        match=(
            "`base` is 'original', but `frozen` is quantised .at 'kernel' and 0 more.: its original values "
            "are gone"
        ),
    ):
        lora_jax.merge(packed, delta, base="original")
    frozen, delta = lora_jax.lorafy(params, "kernel", method=DoRA(rank=2))
    packed = quantize(frozen, "int8", targets="kernel")
    with pytest.raises(ValueError, match="`frozen` is quantised at 'kernel': the weight from before is gone"):
        lora_jax.unmerge(lora_jax.merge(packed, delta), delta, frozen=packed)


def is_packed(tree):
    return {name for name, leaf in tree.items() if isinstance(getattr(leaf, "weight", leaf), Packed)}


def test_all_linear():
    params = network()
    frozen, delta = lora_jax.lorafy(params, {"kernel": PiSSA(rank=2), "bias": Full()})
    # By names, without the function; `table` is not called an embedding.
    names = {"embed_tokens": 0, "upscale": 1, "ln_scale": 0, "token_embedder": 0, "wte": 0, "scale": 0}
    assert is_packed(quantize({name: numbers(8, 64) for name in names}, "int8")) == {
        name for name, packed in names.items() if packed
    }
    assert is_packed(quantize(frozen, "nf4")) == {
        "table",
        "kernel",
        "heads",
        "stack",
        "convolution",
        "turned",
    }
    renamed = {
        "embedding": params["table"],
        "word_embedding": params["table"],
        "lm_head": {"kernel": params["kernel"]},
        "dense": {"bias": numbers(2, 64)},
    }
    with pytest.raises(ValueError, match="contracts with no floating-point leaf|'all-linear'"):
        quantize(renamed, "nf4")
    # Read off the function: what rows are looked up in is no linear weight.
    read = quantize(frozen, "nf4", delta=delta, fn=model, args=(IDS,))
    assert is_packed(read) == {"kernel", "heads", "stack", "convolution", "turned"}
    with pytest.raises(
        ValueError,
        match="`fn` failed on `frozen`, in which 'bias' is None. If it trains itself .*pass `delta=` too",
    ):
        quantize(frozen, "nf4", fn=model, args=(IDS,))
    holes = {"w": numbers(8, 64), "none": None}  # as Equinox leaves them where a module has no array
    assert is_packed(quantize(holes, "nf4", fn=lambda params, x: x @ params["w"], args=(numbers(2, 8),))) == {
        "w"
    }
    assert is_packed(quantize(frozen, "nf4", targets=["kernel", "turned"])) == {"kernel", "turned"}
    assert is_packed(quantize(frozen, "nf4", targets=lambda path, leaf: leaf.ndim == 3)) == {
        "heads",
        "stack",
        "convolution",
    }


def test_from_shapes_alone():
    shape = {
        "kernel": jax.ShapeDtypeStruct((32, 4096, 11008), "bfloat16"),
        "bias": jax.ShapeDtypeStruct((4096,), "bfloat16"),
    }
    frozen, delta = lora_jax.lorafy(shape, "kernel", method=DoRA(rank=8), axes="layer in out")
    packed = quantize(frozen, "nf4")
    leaf = packed["kernel"].weight
    assert all(isinstance(array, jax.ShapeDtypeStruct) for array in jax.tree.leaves((packed, delta)))
    assert leaf.shape == shape["kernel"].shape and leaf.dtype == jnp.bfloat16
    bits = 8 * nbytes(leaf) / leaf.size
    assert 4.1269 <= bits < 4.1272
    assert lora_jax.merge(packed, delta)["kernel"].shape == shape["kernel"].shape
    forward = lora_jax.adapt(lambda params, x: lax.scan(lambda x, w: (x, x @ w), x, params["kernel"])[1])
    x = jax.ShapeDtypeStruct((2, 4096), "bfloat16")
    assert jax.eval_shape(
        lambda *trees: forward(lora_jax.combine(*trees[:2]), trees[2]), packed, delta, x
    ).shape == (32, 2, 11008)
    real = quantize(
        lora_jax.lorafy({"w": numbers(3, 64, 64)}, "w", method=DoRA(rank=2), axes="layer in out").frozen,
        "nf4",
    )
    shapes = quantize(
        lora_jax.lorafy(
            {"w": jax.ShapeDtypeStruct((3, 64, 64), "float32")}, "w", method=DoRA(rank=2), axes="layer in out"
        ).frozen,
        "nf4",
    )
    assert jax.tree.structure(real) == jax.tree.structure(shapes)
    assert jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, real, shapes)


@pytest.mark.parametrize(
    "method",
    [method for method in METHODS if not isinstance(method, PiSSA)],
    ids=lambda method: type(method).__name__,
)
def test_a_base_that_is_packed_already_can_be_adapted(method):
    """As one from a file is: the same as packing it afterwards, but that DoRA starts with the lengths of
    what is there.
    """
    params = network()
    packed = quantize(params, "nf4", targets="kernel|stack")
    frozen, delta = lora_jax.lorafy(packed, "kernel|stack|heads", method=method, fn=model, args=(IDS,))
    after, other = lora_jax.lorafy(params, "kernel|stack|heads", method=method, axes=AXES)
    after = quantize(after, "nf4", targets="kernel|stack")
    assert jax.tree.structure((frozen, delta)) == jax.tree.structure((after, other))
    jax.tree.map(np.testing.assert_array_equal, frozen, after)
    if not isinstance(method, DoRA):
        jax.tree.map(np.testing.assert_array_equal, delta, other)
    plain = lora_jax.merge(packed, jax.tree.map(lambda _: None, params))
    near(jax.jit(lora_jax.adapt(model))(lora_jax.combine(frozen, delta), IDS), MODEL(plain, IDS), 1e-5)
    shapes = jax.eval_shape(lambda params: quantize(params, "nf4", targets="kernel|stack"), params)
    from_shapes = lora_jax.lorafy(shapes, "kernel|stack|heads", method=method, axes=AXES)
    assert jax.tree.structure(tuple(from_shapes)) == jax.tree.structure((frozen, delta))


def test_errors():
    params = network()
    frozen, delta = lora_jax.lorafy(params, "kernel", method=LoRA(rank=2))
    packed = quantize(frozen, "nf4")
    with pytest.raises(ValueError, match="`format` is 'fp4'; pass one of 'nf4', 'int8', or a value such as"):
        quantize(frozen, "fp4")
    with pytest.raises(ValueError, match="`targets` pattern 'kernle' matches no leaf.*'kernel'"):
        quantize(frozen, "nf4", targets="kernle")
    with pytest.raises(TypeError, match="`targets` is a mapping"):
        quantize(frozen, "nf4", targets={"kernel": "nf4"})
    with pytest.raises(ValueError, match="`frozen` is quantised already, at 'kernel'"):
        quantize({"kernel": packed["kernel"]}, "nf4")
    with pytest.raises(ValueError, match="'kernel' cannot be quantised: `weight` has a value that is NaN"):
        quantize({"kernel": jnp.full((4, 4), jnp.nan)}, "nf4")
    with pytest.raises(
        ValueError,
        match=(
            "'kernel' is quantised, and `PiSSA` starts with the singular vectors.*adapt first, then "
            "`quantize`"
        ),
    ):
        lora_jax.lorafy(packed, "kernel", method=PiSSA(rank=2))
    # The plain function does not know what to do with a packed leaf, adapted or not.
    with pytest.raises(Exception):
        model(packed, IDS)


def test_explain_sees_through():
    params = network()
    frozen, delta = lora_jax.lorafy(params, EVERY, method=LoRA(rank=2), axes=AXES)
    plain = lora_jax.explain(model, lora_jax.combine(frozen, delta), IDS)
    packed = lora_jax.explain(model, lora_jax.combine(quantize(frozen, "nf4", targets=EVERY), delta), IDS)
    fields = lambda found: [
        dataclasses.astuple(use) if dataclasses.is_dataclass(use) else tuple(use) for use in found.uses
    ]
    assert fields(plain) == fields(packed) and not packed.formed
