"""The storage formats of quantised weights, against NumPy."""

import zlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_numpy import (
    assert_same,
    assert_same_arrays,
    DTYPES,
    normal,
    packed,
    PLAIN,
    QUANTILES,
    quantised,
    SHAPES,
    unpacked,
    unpacked_absmax,
)

from lora_jax._packed.formats import _DYNAMIC as DYNAMIC, FORMATS, Int8, NF4


# --- NF4 against NumPy --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, dtype",
    [*[(shape, "float32") for shape in SHAPES], ((3, 5, 67), "bfloat16"), ((96, 80), "float16")],
)
def test_nf4_bytes_and_values(shape, dtype):
    weight = normal(shape, dtype)
    codes, absmax = quantised(weight)
    arrays = PLAIN.pack(jnp.asarray(weight), 0)
    assert_same_arrays(arrays, {"codes": packed(codes), "absmax": absmax})
    assert_same(PLAIN.unpack(arrays, shape, dtype), unpacked(arrays, shape, dtype))
    arrays = NF4().pack(jnp.asarray(weight), 0)
    assert_same(arrays["codes"], packed(codes))
    assert_same(NF4().unpack(arrays, shape, dtype), unpacked(arrays, shape, dtype))


def test_nf4_codes_at_the_midpoints():
    """A number on the edge between two codes, after each rounding on its way, has the lower."""
    rng, middles = np.random.default_rng(0), (QUANTILES[:-1] + QUANTILES[1:]) / 2
    absmax = rng.uniform(0.5, 2, (4096, 1)).astype(np.float32)
    weight = absmax * rng.choice(middles, (4096, 64))
    for _ in range(2):
        weight = np.where(
            rng.random(weight.shape) < 0.4,
            np.nextafter(weight, rng.choice([-9, 9], weight.shape).astype(np.float32)),
            weight,
        )
    weight[:, :1] = absmax
    codes, _ = quantised(weight)
    # Neither a division in place of the product nor the other side passes.
    assert (codes != np.searchsorted(middles, weight / absmax).reshape(-1)).any()
    assert (codes != np.searchsorted(middles, weight * (1 / absmax), side="right").reshape(-1)).any()
    assert_same(PLAIN.pack(jnp.asarray(weight), 0)["codes"], packed(codes))
    with jax.disable_jit():  # XLA compiles a division by what is broadcast to that product
        assert_same(PLAIN.pack(jnp.asarray(weight), 0)["codes"], packed(codes))


def test_the_map_of_absmax():
    """That of bitsandbytes 0.50.2 on a machine with AVX2, which is not at hand everywhere."""
    values = DYNAMIC
    assert (
        len(set(values.tolist())) == 256
        and (np.diff(values) > 0).all()
        and zlib.crc32(values.astype("<f4").tobytes()) == 0x1B137AEB
    )
    assert_same(-values[:127], values[-2:127:-1])  # but for 0 and 1, which has no negative


def test_nf4_packs_the_even_element_high():
    weight = jnp.asarray([[0.0, 1.0, -1.0, 0.08]])
    assert PLAIN.pack(weight, 0)["codes"].tolist() == [0x7F, 0x08]
    assert PLAIN.pack(weight[:, :3], 0)["codes"].tolist() == [0x7F, 0x07]  # an odd number, made even with 0


@pytest.mark.parametrize("block, nested_block", [(2, 3), (32, 256), (64, 16), (4096, 256)])
def test_nf4_block_sizes(block, nested_block):
    weight = normal((70, 50))
    codes, absmax = quantised(weight, block)
    plain = NF4(block, double=False)
    arrays = plain.pack(jnp.asarray(weight), 0)
    assert_same_arrays(arrays, {"codes": packed(codes), "absmax": absmax})
    assert_same(
        plain.unpack(arrays, weight.shape, "float32"), unpacked(arrays, weight.shape, "float32", block)
    )
    arrays = NF4(block, nested_block).pack(jnp.asarray(weight), 0)
    blocks = -(-3500 // block)
    assert arrays["absmax"].shape == (blocks,) and arrays["nested_absmax"].shape == (
        -(-blocks // nested_block),
    )
    expected = QUANTILES[codes] * np.repeat(unpacked_absmax(arrays, nested_block), block)[:3500]
    assert_same(
        NF4(block, nested_block).unpack(arrays, weight.shape, "float32"), expected.reshape(weight.shape)
    )


def test_nf4_quantises_the_absmax_to_the_nearest():
    weight = normal((256, 256)) * np.exp(normal((256, 1)))
    arrays = {name: np.asarray(array) for name, array in NF4().pack(jnp.asarray(weight), 0).items()}
    _, absmax = quantised(weight)
    np.testing.assert_allclose(arrays["nested_offset"], absmax.astype(np.float64).mean(), rtol=1e-6)
    # By halves, whatever order is the fastest on a device and for a stack.
    total = absmax
    while total.size > 1:
        total = total[: total.size // 2] + total[total.size // 2 :]
    assert_same(arrays["nested_offset"], total[0] / np.float32(absmax.size))
    centred = (absmax - arrays["nested_offset"]).reshape(-1, 256)
    assert_same(arrays["nested_absmax"], np.abs(centred).max(-1))
    distances = np.abs((centred / arrays["nested_absmax"][:, None])[..., None].astype(np.float64) - DYNAMIC)
    chosen = np.take_along_axis(distances, arrays["absmax"].reshape(-1, 256, 1).astype(int), -1)[..., 0]
    np.testing.assert_allclose(chosen, distances.min(-1), atol=1e-6)
    assert len(set(arrays["absmax"].tolist())) > 100


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", [PLAIN, NF4()], ids=["plain", "double"])
def test_nf4_error_bound(format, dtype):
    """Half the widest gap between quantiles, of the block's absmax; and what quantising this has added."""
    weight = normal((512, 128), dtype)
    arrays = format.pack(jnp.asarray(weight), 0)
    _, absmax = quantised(weight)
    used = unpacked_absmax(arrays) if format.double else absmax
    assert (used == absmax).all() != format.double
    bound = np.diff(QUANTILES).max() / 2 * absmax + np.abs(used - absmax)
    error = np.abs(
        np.asarray(format.unpack(arrays, weight.shape, "float32"), np.float64) - weight.astype(np.float64)
    ).reshape(-1, 64)
    assert (error <= 1.000001 * bound[:, None]).all()
    assert (error.max(-1) > 0.5 * bound).mean() > 0.5


@pytest.mark.parametrize("format", [PLAIN, NF4()], ids=["plain", "double"])
def test_nf4_of_zeros_is_zero(format):
    weight = normal((10, 64))
    weight[3] = 0
    weight[4] = np.float32(1e-40)  # whose inverse is infinite
    weight[5] = np.float32(1e-37) * normal(64)
    result = np.asarray(format.unpack(format.pack(jnp.asarray(weight), 0), weight.shape, "float32"))
    assert (
        np.isfinite(result).all()
        and (result[3] == 0).all()
        and (np.abs(result[5]) < (2e-36 if format is PLAIN else 0.1)).all()
    )
    zeros = np.zeros((5, 13), np.float32)
    assert_same(format.unpack(format.pack(jnp.asarray(zeros), 0), zeros.shape, "float32"), zeros)


def test_nf4_packs_what_it_has_unpacked_to_the_same():
    """Each block's absmax is among its values. Quantised doubly, the absmax that is packed again is
    another.
    """
    weight = normal((96, 80))
    arrays = PLAIN.pack(jnp.asarray(weight), 0)
    assert_same_arrays(PLAIN.pack(PLAIN.unpack(arrays, weight.shape, "float32"), 0), arrays)


def test_float64_is_rounded_to_float32(x64):
    weight = normal((33, 70), "float64")
    for format in (NF4(), PLAIN, Int8()):
        arrays = format.pack(jnp.asarray(weight), 0)
        assert_same_arrays(arrays, format.pack(jnp.asarray(weight.astype(np.float32)), 0))
        assert all(array.dtype.itemsize <= 4 for array in arrays.values())
        values = format.unpack(arrays, weight.shape, "float64")
        assert_same(values, np.asarray(format.unpack(arrays, weight.shape, "float32")).astype(np.float64))


@pytest.mark.parametrize("format", [NF4(), Int8()], ids=["nf4", "int8"])
def test_the_dtype_that_jax_would_store(format):
    arrays = format.pack(normal((3, 4), "float64"), 0)  # without x64: float32
    assert format.unpack(arrays, (3, 4), "float64").dtype == jnp.float32


# --- int8 against NumPy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, stack",
    [((64, 32), 0), ((7,), 0), ((3, 5, 9), 0), ((3, 5, 9), 1), ((3, 5, 9), 2), ((2, 3, 4, 5), 1)],
)
def test_int8(shape, stack, dtype):
    weight = normal(shape, dtype) * np.exp(normal(shape[-1:], dtype))
    own = shape[stack:]
    arrays = Int8().pack(jnp.asarray(weight), stack)
    exact = weight.astype(np.float32)
    scale = np.abs(exact).max(axis=tuple(range(stack, len(shape) - 1)), keepdims=True) * np.float32(1 / 127)
    assert scale.shape == (*shape[:stack], *[1] * (len(own) - 1), shape[-1])
    assert_same_arrays(
        arrays, {"codes": np.round(exact * (np.float32(1) / scale)).astype(np.int8), "scale": scale}
    )
    values = np.float64(arrays["codes"]) * scale
    assert (np.abs(values - weight.astype(np.float64)) <= 0.50001 * scale).all()
    index = (-1,) * stack
    unstacked = {name: array[index] for name, array in arrays.items()}
    assert_same(Int8().unpack(unstacked, own, dtype), values[index].astype(np.float32).astype(weight.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_packs_what_it_has_unpacked_to_the_same_codes(dtype):
    """The scale is 1/127 of the largest number, which is 127 scales only up to its rounding."""
    weight = normal((300, 200), dtype)
    arrays = Int8().pack(jnp.asarray(weight), 0)
    again = Int8().pack(Int8().unpack(arrays, weight.shape, dtype), 0)
    assert_same(again["codes"], arrays["codes"])
    np.testing.assert_allclose(again["scale"], arrays["scale"], rtol=2 * float(jnp.finfo(dtype).eps))


def test_int8_of_zeros_is_zero():
    weight = normal((6, 4))
    weight[:, 1] = 0
    weight[:, 2] = np.float32(1e-40)
    result = np.asarray(Int8().unpack(Int8().pack(jnp.asarray(weight), 0), weight.shape, "float32"))
    assert (result[:, 1:3] == 0).all() and (result[:, [0, 3]] != 0).any(0).all()


# --- every format -------------------------------------------------------------------------------------------

EVERY = pytest.mark.parametrize(
    "format", [NF4(), PLAIN, NF4(32, 5), Int8()], ids=["nf4", "plain", "small", "int8"]
)


@EVERY
@pytest.mark.parametrize("shape, stack", [((2, 3, 7, 11), 2), ((5, 33), 1), ((2, 200, 300), 1)])
def test_a_layer_of_a_stack_is_packed_as_alone(format, shape, stack):
    weight = normal(shape) * np.exp(normal(shape[:-1] + (1,), seed=1))
    arrays = format.pack(jnp.asarray(weight), stack)
    for index in np.ndindex(shape[:stack]):
        layer = {name: np.asarray(array)[index] for name, array in arrays.items()}
        assert_same_arrays(layer, format.pack(jnp.asarray(weight[index]), 0))
    unpack = lambda arrays: format.unpack(arrays, shape[stack:], "float32")
    values = unpack
    for _ in range(stack):
        values = jax.vmap(values)
    assert_same(values(arrays)[index], unpack(layer))


@EVERY
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_with_what_is_around_it(format, dtype):
    weight = jnp.asarray(normal((130, 70), dtype) * np.exp(normal((130, 1), dtype)))
    arrays = format.pack(weight, 0)
    values = format.unpack(arrays, weight.shape, dtype)
    scale = jnp.asarray(4, dtype)  # a power of 2, by which nothing is rounded
    assert_same_arrays(jax.jit(lambda weight: format.pack(weight / scale * scale, 0))(weight), arrays)
    assert_same(
        jax.jit(lambda arrays: format.unpack(arrays, weight.shape, dtype) * scale)(arrays), values * scale
    )


@pytest.mark.parametrize("format", [NF4(), Int8()], ids=["nf4", "int8"])
def test_not_compiled(format):
    weight = jnp.asarray(normal((130, 7)) * np.exp(normal((130, 1))))
    arrays = format.pack(weight, 0)
    values = format.unpack(arrays, weight.shape, "float32")
    with jax.disable_jit():
        assert_same_arrays(format.pack(weight, 0), arrays)
        assert_same(format.unpack(arrays, weight.shape, "float32"), values)


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=12)
def test_odd_shapes(data):
    format = data.draw(st.sampled_from([NF4(), NF4(4, 3), PLAIN, Int8()]))
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    stack = data.draw(st.integers(0, len(shape) - 1))
    magnitude = data.draw(st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
    weight = normal(shape, seed=data.draw(st.integers(0, 99))) * np.float32(magnitude)
    weight[np.random.default_rng(0).random(shape) < data.draw(st.sampled_from([0, 0.9]))] = 0
    arrays = format.pack(jnp.asarray(weight), stack)
    abstract = jax.eval_shape(
        lambda weight: format.pack(weight, stack), jax.ShapeDtypeStruct(shape, "float32")
    )
    assert jax.tree.map(lambda array: (array.shape, array.dtype), arrays) == jax.tree.map(
        lambda array: (array.shape, array.dtype), abstract
    )
    for index in np.ndindex(shape[:stack]):
        layer, own = {name: np.asarray(array)[index] for name, array in arrays.items()}, weight[index]
        values = np.asarray(format.unpack(layer, own.shape, "float32"))
        assert values.shape == own.shape and np.isfinite(values).all() and (values[own == 0] == 0).all()
        # The coarsest of the formats keeps a number to a sixth of the largest, plus 1 % for a second
        # quantisation.
        assert np.abs(values - own).max() <= 0.17 * np.abs(own).max(initial=0)
        if isinstance(format, NF4):
            assert_same(layer["codes"], packed(quantised(own, format.block)[0]))


@EVERY
def test_shapes_allocate_nothing(format):
    shape = (64, 2**14, 2**14)  # 34 GB in bfloat16
    before = len(jax.live_arrays())
    arrays = jax.eval_shape(lambda weight: format.pack(weight, 1), jax.ShapeDtypeStruct(shape, jnp.bfloat16))
    layer = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape[1:], array.dtype), arrays)
    values = jax.eval_shape(lambda arrays: format.unpack(arrays, shape[1:], jnp.bfloat16), layer)
    assert (values.shape, values.dtype) == (shape[1:], jnp.bfloat16)
    assert all(array.shape[0] == 64 for array in arrays.values()) and len(jax.live_arrays()) <= before


@pytest.mark.parametrize(
    "format, bits",
    [(NF4(), 4 + 8 / 64 + 32 / (64 * 256)), (PLAIN, 4.5), (Int8(), 8)],
    ids=["nf4", "plain", "int8"],
)
def test_bits_per_parameter(format, bits):
    arrays = jax.eval_shape(
        lambda weight: format.pack(weight, 0), jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16)
    )
    total = sum(8 * array.dtype.itemsize * array.size for array in arrays.values())
    assert bits <= total / 8192**2 < bits + 0.005
    assert bits == 8 or round(total / 8192**2, 3) == round(bits, 3)


@EVERY
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_what_is_not_finite(format, bad):
    weight = normal((8, 64))
    weight[3, 5] = bad
    with pytest.raises(ValueError, match="`weight` has a value that is NaN, infinite or beyond 2\\*\\*126"):
        format.pack(jnp.asarray(weight), 0)
    if bad != 3e38:
        values = format.unpack(
            jax.jit(lambda weight: format.pack(weight, 0))(weight), weight.shape, "float32"
        )
        shared = values[:, 5] if format == Int8() else values[3, 4:6]
        assert not np.isfinite(shared).any()


def test_bfloat16_beyond_float16_is_in_range():
    Int8().pack(jnp.full((2, 2), 2.0**126, jnp.bfloat16), 0)
    with pytest.raises(ValueError, match="beyond"):
        Int8().pack(jnp.full((2, 2), 2.0**127, jnp.bfloat16), 0)
    with pytest.raises(ValueError, match="infinite"):
        Int8().pack(jnp.full((2, 2), np.inf, jnp.float16), 0)


@pytest.mark.parametrize(
    "weight, stack",
    [(np.zeros((2, 0), np.float32), 0), (np.zeros((2, 3), np.int8), 0), (np.zeros((2, 3), np.float32), 3)],
)
@EVERY
def test_what_is_no_weight(format, weight, stack):
    with pytest.raises(
        ValueError, match=f"`weight` has shape .* and dtype {weight.dtype}, of which {stack} stacked axes"
    ):
        format.pack(weight, stack)


def test_int8_needs_an_axis_of_its_own():
    with pytest.raises(ValueError, match="1 or more axes that are not stacked"):
        Int8().pack(np.zeros((2, 3), np.float32), 2)


def test_formats_are_values():
    assert (
        FORMATS == {"nf4": NF4(), "int8": Int8()}
        and hash(NF4()) == hash(NF4(64, 256, True))
        and NF4() != PLAIN
    )


@pytest.mark.parametrize(
    "options", [{"block": 0}, {"block": 63}, {"block": 64.0}, {"block": True}, {"nested_block": -1}]
)
def test_block_sizes_that_are_none(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"`{name}` is {value}; it must be a positive .*integer"):
        NF4(**options)
