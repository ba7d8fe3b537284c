"""Quantised bases: every use of a packed weight equals that of its unpacked values, and memory holds one
of these at a time.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax
from lora_jax import AdaLoRA, DeltaLoRA, DoRA, DyLoRA, Full, LoRA, LoRAFA, PiSSA, quantize, VeRA
from lora_jax.quant import from_bitsandbytes, nbytes, NF4, Packed


METHODS = [
    LoRA(rank=2),
    DoRA(rank=2),
    VeRA(rank=4),
    LoRAFA(rank=2),
    DyLoRA(rank=2),
    DeltaLoRA(rank=2),
    AdaLoRA(rank=2),
    PiSSA(rank=2),
]
FORMATS = ["nf4", "int8", NF4(double=False), NF4(block=32)]


def numbers(*sizes, seed=0, dtype="float32", scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=sizes) * scale, dtype)


def network(dtype="float32"):
    sizes = {
        "table": (20, 16),
        "kernel": (16, 24),
        "heads": (24, 2, 8),
        "stack": (3, 16, 16),
        "convolution": (3, 16, 16),
        "turned": (10, 16),
    }
    params = {
        name: numbers(*size, seed=seed, dtype=dtype, scale=0.2)
        for seed, (name, size) in enumerate(sizes.items())
    }
    return params | {"bias": jnp.ones(24, dtype)}


AXES = {"heads": "in out out", "stack": "layer in out", "convolution": "in in out", "turned": "out in"}


def model(params, ids):
    x = params["table"][ids]  # looked up
    x = jnp.tanh(x @ params["kernel"] + params["bias"][None, None])
    x = jnp.einsum("bti,ihd->bthd", x, params["heads"]).reshape(*ids.shape, 16)
    x = lax.scan(lambda x, w: (jnp.tanh(x @ w.astype(x.dtype)), None), x, params["stack"])[0]
    x = (
        x @ params["stack"][1] @ lax.dynamic_index_in_dim(params["stack"], ids[0, 0] % 3, keepdims=False)
    )  # indexed, statically and not
    x = lax.conv_general_dilated(
        x, params["convolution"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )
    return x @ params["turned"].T


IDS = jnp.array([[3, 1, 4, 1], [5, 9, 2, 6]])
EVERY = "table|kernel|heads|stack|convolution|turned"


def randomised(delta, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda array: array + jnp.asarray(rng.normal(size=array.shape) * 0.1, array.dtype), delta
    )


def near(found, expected, bound):
    error = np.max(np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64)))
    assert error <= bound * np.max(np.abs(np.asarray(expected, np.float64))), error


# A format is one with a method as with another.
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

    def loss(model, of):
        return lambda frozen, delta, ids: jnp.sum(jnp.sin(model(of(frozen, delta), ids)))

    adapted = jax.jit(jax.value_and_grad(loss(lora_jax.adapt(model), lora_jax.combine), 1))(
        packed, delta, IDS
    )
    merged = jax.jit(jax.value_and_grad(loss(model, lora_jax.merge), 1))(packed, delta, IDS)
    jax.tree.map(lambda a, b: near(a, b, 1e-10), adapted, merged)
    values = lora_jax.merge(
        packed, jax.tree.map(lambda _: None, frozen, is_leaf=lambda leaf: hasattr(leaf, "weight"))
    )
    assert all(not np.array_equal(values[name], params[name]) for name in EVERY.split("|")), (
        "nothing was quantised"
    )
    assert float(merged[0]) != float(loss(model, lora_jax.merge)(frozen, delta, IDS)), (
        "the quantised base is the one that counts"
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
    near(found, model(base, IDS), bound)
    if not isinstance(method, DoRA):  # whose length stays that of the weights before
        weights = {
            name: getattr(packed[name], "weight", packed[name]).value()
            for name in ("kernel", "stack", "heads")
        }
        near(found, model(params | weights, IDS), bound)


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


# --- memory -------------------------------------------------------------------------------------------------

LAYERS, WIDTH = 8, 256
LAYER = WIDTH * WIDTH * 4


def scanned(params, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]


def rematerialised(params, x):
    return lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, params["layers"])[0]


def indexed(params, x):
    for index in range(LAYERS):
        x = jnp.tanh(x @ params["layers"][index])
    return x


def listed(params, x):
    for weight in params["layers"]:
        x = jnp.tanh(x @ weight)
    return x


@pytest.mark.parametrize("method", [LoRA(rank=2), DoRA(rank=2)], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("fn", [scanned, rematerialised, indexed, listed])
def test_no_more_than_one_unpacked_layer_is_in_memory(fn, method):
    """The compiled training step's temporary bytes: those of the same step on a plain base, and one layer
    more.
    """
    layers = numbers(LAYERS, WIDTH, WIDTH, scale=0.05)
    params = {"layers": list(layers) if fn is listed else layers}
    frozen, delta = lora_jax.lorafy(
        params, "layers.*", method=method, axes=None if fn is listed else "layer in out"
    )
    x = numbers(4, WIDTH)

    def temporaries(frozen, of=lambda frozen, delta: lora_jax.combine(frozen, delta), fn=lora_jax.adapt(fn)):
        step = jax.jit(
            lambda delta, frozen, x: jax.value_and_grad(lambda delta: jnp.sum(fn(of(frozen, delta), x) ** 2))(
                delta
            )
        )
        return step.lower(delta, frozen, x).compile().memory_analysis().temp_size_in_bytes

    packed = quantize(frozen, "nf4", targets="layers.*")
    assert nbytes(packed) < 0.2 * nbytes(frozen)
    # The plain step of the indexed stack copies every layer of it; the packed one does not, and may not.
    plain = min(temporaries(frozen), 2 * LAYER if fn is indexed else np.inf)
    assert temporaries(packed) <= plain + 1.6 * LAYER
    merged = temporaries(packed, lora_jax.merge, fn)
    assert merged >= LAYERS * LAYER, "the bound does not see that merging inside the loss holds every layer"


def test_the_trace_holds_packed_arrays_only():
    """Between forward and backward pass no unpacked weight is kept: residuals, however the compiler may
    schedule them.
    """
    params = {"layers": numbers(LAYERS, 64, 64)}
    frozen, delta = lora_jax.lorafy(params, "layers", method=LoRA(rank=2), axes="layer in out")
    packed = quantize(frozen, "nf4")
    forward = lora_jax.adapt(scanned)

    def kept(frozen):
        residuals = jax.vjp(lambda delta: forward(lora_jax.combine(frozen, delta), numbers(4, 64)), delta)[1]
        return [
            leaf.shape
            for leaf in jax.tree.leaves(residuals)
            if leaf.size == LAYERS * 64 * 64 and jnp.issubdtype(leaf.dtype, jnp.floating)
        ]

    assert kept(packed) == []
    assert kept(frozen) != []


# --- transformations ----------------------------------------------------------------------------------------


def test_composes(x64):
    params = {
        "w": numbers(64, 64, dtype="float64"),
        "v": numbers(64, 64, seed=1, dtype="float64"),
    }  # v has no adapter
    frozen, delta = lora_jax.lorafy(params, "w", method=LoRA(rank=2))
    packed, delta = quantize(frozen, "nf4"), randomised(delta)
    x = numbers(5, 64, dtype="float64")
    fn = lambda params, x: jnp.tanh(x @ params["w"]) @ params["v"].T
    merged, adapted = lora_jax.merge(packed, delta), lora_jax.adapt(fn)
    expected = fn(merged, x)
    of = lambda delta, x: adapted(lora_jax.combine(packed, delta), x)
    for composed in (
        of,
        jax.jit(of),
        jax.checkpoint(of),
        jax.vmap(of, (None, 0)),
        jax.jit(jax.vmap(of, (None, 0))),
    ):
        near(composed(delta, x), expected, 1e-12)
    shared = lax.fori_loop(0, 3, lambda _, total: total + of(delta, x), jnp.zeros_like(x))
    near(shared, 3 * expected, 1e-12)
    inside = lora_jax.adapt(lambda params, x: lax.cond(x[0, 0] < 99, jax.jit(fn), fn, params, x))
    near(inside(lora_jax.combine(packed, delta), x), expected, 1e-12)
    # A gradient, an adapter for each example, and a gradient for each example.
    slope = jax.grad(lambda delta, x: jnp.sum(of(delta, x) ** 2))
    literal = jax.grad(lambda delta, x: jnp.sum(fn(lora_jax.merge(packed, delta), x) ** 2))
    jax.tree.map(lambda a, b: near(a, b, 1e-11), slope(delta, x), literal(delta, x))
    jax.tree.map(
        lambda a, b: near(a, b, 1e-11),
        jax.vmap(slope, (None, 0))(delta, x[:, None]),
        jax.vmap(literal, (None, 0))(delta, x[:, None]),
    )
    stacked = lora_jax.stack([delta, randomised(delta, 2)])
    taken = jax.vmap(of)(lora_jax.take(stacked, jnp.array([0, 1, 1, 0, 1])), x)
    for row, number in enumerate([0, 1, 1, 0, 1]):
        near(taken[row], of(lora_jax.take(stacked, number), x[row]), 1e-12)
    # The gradient with respect to the input passes through both weights.
    jax.tree.map(
        lambda a, b: near(a, b, 1e-11), jax.jacrev(of, 1)(delta, x[:1]), jax.jacrev(fn, 1)(merged, x[:1])
    )


def test_a_loop_of_the_users_own_slices_the_stack():
    params = {"layers": numbers(LAYERS, 64, 64, scale=0.1)}
    frozen, delta = lora_jax.lorafy(params, "layers", method=DoRA(rank=2), axes="layer in out")
    packed, delta = quantize(frozen, "nf4"), randomised(delta)
    layer, x = lora_jax.adapt(lambda params, x: jnp.tanh(x @ params["layers"])), numbers(4, 64)
    found = lax.scan(lambda x, trees: (layer(lora_jax.combine(*trees), x), None), x, (packed, delta))[0]
    near(found, scanned(lora_jax.merge(packed, delta), x), 1e-5)


def test_compiled_once():
    params = {"w": numbers(64, 64)}
    frozen, delta = lora_jax.lorafy(params, "w", method=LoRA(rank=2))
    packed, traces = quantize(frozen, "nf4"), []

    def fn(params, x):
        traces.append(1)
        return x @ params["w"]

    step = jax.jit(lambda delta, packed, x: lora_jax.adapt(fn)(lora_jax.combine(packed, delta), x))
    for seed in range(3):
        step(randomised(delta, seed), packed, numbers(4, 64, seed=seed))
    assert len(traces) == 1 and step._cache_size() == 1


@pytest.mark.parametrize("method", [LoRA(rank=2), DoRA(rank=2)], ids=["LoRA", "DoRA"])
def test_a_batch_of_examples_unpacks_a_weight_once(method):
    """Also with an adapter for each, forwards and backwards."""
    params = {"w": numbers(128, 96)}
    frozen, delta = lora_jax.lorafy(params, "w", method=method)
    packed, x = quantize(frozen, "nf4"), numbers(32, 128)
    forward = lora_jax.adapt(lambda params, x: x @ params["w"])
    loss = lambda delta, x: jnp.sum(forward(lora_jax.combine(packed, delta), x) ** 2)
    many = lora_jax.take(lora_jax.stack([delta, randomised(delta)]), jnp.arange(32) % 2)
    shared = str(jax.make_jaxpr(jax.vmap(jax.grad(loss, (0, 1)), (None, 0)))(delta, x))
    assert "[32,128,96]" not in shared and "[32,12288]" not in shared
    if not isinstance(method, DoRA):  # whose norm is of each adapter's own sum
        apart = str(jax.make_jaxpr(jax.vmap(jax.grad(loss, (0, 1))))(many, x))
        assert "[32,128,96]" not in apart and "[32,12288]" not in apart
    found = jax.jit(jax.vmap(lambda delta, x: forward(lora_jax.combine(packed, delta), x)))(many, x)
    for row in (0, 1):
        near(
            found[row::2],
            x[row::2]
            @ lora_jax.merge(packed, lora_jax.take(lora_jax.stack([delta, randomised(delta)]), row))["w"],
            1e-5,
        )


def test_the_adapters_say_what_is_stacked():
    """Heads and convolutions are packed as one, so that nothing but the layers is apart."""
    shape = {
        "heads": jax.ShapeDtypeStruct((768, 12, 64), "float32"),
        "stack": jax.ShapeDtypeStruct((3, 768, 12, 64), "float32"),
    }
    frozen, delta = lora_jax.lorafy(
        shape, ".*", method=LoRA(rank=2), axes={"heads": "in out out", "stack": "layer in out out"}
    )
    packed = quantize(frozen, "int8", delta=delta)
    assert (packed["heads"].stack, packed["stack"].stack) == ((), (3,))
    assert 8 * nbytes(packed) / sum(leaf.size for leaf in packed.values()) < 8.01
    for leaf in quantize(
        frozen, "nf4"
    ).values():  # without adapters at hand, all but two axes are apart: a little more
        assert 8 * nbytes(leaf) / leaf.size < 4.25


def test_layers_are_packed_one_by_one():
    stack = numbers(3, 64, 64)
    packed = quantize({"w": stack}, "nf4", targets="w")["w"]
    for index in range(3):
        alone = quantize({"w": stack[index]}, "nf4", targets="w")["w"]
        jax.tree.map(
            np.testing.assert_array_equal,
            packed.along_stack(lambda array, index=index: array[index]).arrays,
            alone.arrays,
        )


# --- what is quantised --------------------------------------------------------------------------------------


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


def test_weights_of_bitsandbytes(torch):
    """Its bytes in a place of `frozen`: transposed, as Flax has kernels, and adapted."""
    bnb = pytest.importorskip(
        "bitsandbytes",
        reason="bitsandbytes is not installed: pip install 'lora_jax[torch]' (on Linux), or bitsandbytes",
    )
    weight = torch.from_numpy(np.array(numbers(96, 64)))
    parameter = bnb.nn.Params4bit(weight, quant_type="nf4", compress_statistics=True, requires_grad=False).to(
        "cpu"
    )
    tensors = {"weight": parameter.data.numpy()} | {
        f"weight.{name}": value.numpy() for name, value in parameter.quant_state.as_dict(packed=True).items()
    }
    expected = bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state).numpy()
    leaf = from_bitsandbytes(tensors)
    assert leaf.shape == (64, 96)
    np.testing.assert_array_equal(leaf.value(), expected.T)
    np.testing.assert_array_equal(from_bitsandbytes(tensors, transpose=False).value(), expected)
    frozen, delta = lora_jax.lorafy({"w": leaf}, "w", method=LoRA(rank=2))
    delta = jax.tree.map(jnp.ones_like, delta)
    x = numbers(4, 64)
    found = lora_jax.adapt(lambda params, x: x @ params["w"])(lora_jax.combine(frozen, delta), x)
    near(found, x @ (expected.T + 16), 1e-5)


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
    near(jax.jit(lora_jax.adapt(model))(lora_jax.combine(frozen, delta), IDS), model(plain, IDS), 1e-5)
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
