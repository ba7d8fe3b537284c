"""The checksum of arrays: the same wherever they are, and another for any word that changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lora_jax.checkpoint import _checksum, fingerprint


_DTYPES = "bool int2 uint4 int4 int8 uint8 int16 int32 uint32 float8_e4m3fn float8_e5m2 float4_e2m1fn float16 bfloat16 float32 complex64".split()  # noqa: E501


def some(dtype, shape=(16, 8)):
    """Values of any dtype, some of which differ."""
    return np.random.default_rng(0).integers(0, 2, shape).astype(jnp.dtype(dtype))


def sums(leaf):
    return tuple(np.asarray(_checksum.checksum(leaf)).tolist())


@pytest.mark.parametrize("dtype", _DTYPES)
def test_checksum_is_the_same_wherever_the_array_is(dtype):
    """NumPy, one device, and every way to lie on two meshes, one of which has its shardings in the types."""
    array = some(dtype)
    devices = np.array(jax.devices()[:8]).reshape(2, 4)
    meshes = [
        Mesh(devices, ("a", "b")),
        Mesh(devices, ("a", "b"), axis_types=(AxisType.Explicit, AxisType.Explicit)),
    ]
    specs = [
        PartitionSpec(),
        PartitionSpec("a"),
        PartitionSpec("b", "a"),
        PartitionSpec(None, "b"),
        PartitionSpec(("a", "b")),
    ]
    expected = sums(array)
    assert sums(jnp.asarray(array)) == expected
    # Each sharding compiles anew: every one for two dtypes, for the others the last.
    for mesh, spec in [(mesh, spec) for mesh in meshes for spec in specs][
        0 if dtype in ("float32", "int4") else -1 :
    ]:
        found = _checksum.checksum(jax.device_put(array, NamedSharding(mesh, spec)))
        assert tuple(np.asarray(found).tolist()) == expected, (mesh, spec)
        assert found.sharding.is_fully_replicated


@pytest.mark.parametrize("dtype", ["float64", "int64", "complex128"])
def test_checksum_of_64_bits_is_the_same_with_and_without_them(dtype):
    array = some(dtype) + np.array(1, dtype) / 3 if dtype != "int64" else some(dtype) << 40
    with jax.enable_x64(True):
        expected = sums(jnp.asarray(array))
    assert sums(array) == expected
    assert sums(array.astype(array.dtype.newbyteorder(">"))) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "float8_e4m3fn"])
def test_any_word_that_changes_changes_every_sum(dtype):
    """Not only probably: for a fixed index the mixing is a bijection of the word."""
    draw = np.random.default_rng(1)
    array = (
        draw.integers(0, 2, 1000).astype(bool)
        if dtype == "bool"
        else np.frombuffer(draw.bytes(1000 * jnp.dtype(dtype).itemsize), jnp.dtype(dtype))
    )
    before = sums(array)
    for position in draw.integers(0, 1000, 50):
        other = array.copy()
        if dtype == "bool":
            other[position] ^= True
        else:
            other.view(np.uint8)[position * array.itemsize + draw.integers(array.itemsize)] ^= (
                1 << draw.integers(8)
            )
        assert all(one != two for one, two in zip(before, sums(other), strict=True)), position


def test_mixing_is_a_bijection_of_the_word():
    """On words that its shifts would bring together if a multiplication lost a bit; odd factors lose none."""
    half = np.arange(1 << 16, dtype=np.uint32)
    words = np.unique(np.r_[half, half << 16, half * 0x10001, half * 0x8001])
    for lane in _checksum._LANES:
        assert all(factor % 2 for factor in lane[2:4])
        mixed = _checksum._mix(
            jnp.asarray(words), jnp.uint32(12345), jnp.uint32(6), *(jnp.uint32(constant) for constant in lane)
        )
        assert np.unique(np.asarray(mixed)).size == words.size


def test_checksum_sees_order_and_zeros():
    array = np.arange(64, dtype=np.float32)
    moved = [
        array[::-1],
        np.roll(array, 1),
        np.r_[array[1], array[0], array[2:]],
        np.r_[array, np.float32(0)],
        -0.0 * array,
        0.0 * array,
    ]
    assert len({sums(array), *map(sums, moved)}) == 7


def test_checksum_of_chunks(monkeypatch):
    """A memory map goes through the device in pieces, of which none knows the others."""
    array = np.random.default_rng(0).normal(size=(37, 11)).astype(np.float32)
    whole, wide = sums(array), sums(array.astype(np.float64))
    monkeypatch.setattr(_checksum, "_CHUNK", 100)
    assert (sums(array), sums(array.astype(np.float64))) == (whole, wide)


def test_checksum_beyond_32_bits_of_index():
    """Of arrays that no machine here holds: the index is that of Python's integers, in two words."""
    draw = np.random.default_rng(0)
    for shape in [(1 << 20, 1 << 20), (3, (1 << 32) - 1), (12345, 678, 91011, 7), ((1 << 31) + 5, 6, 7)]:
        places = [[int(draw.integers(size)) for size in shape] for _ in range(200)] + [
            [size - 1 for size in shape]
        ]
        low, high = _checksum.flat_index(
            [jnp.array(column, jnp.uint32) for column in zip(*places, strict=True)], shape
        )
        for place, one, two in zip(places, np.asarray(low).tolist(), np.asarray(high).tolist(), strict=True):
            assert one + (two << 32) == sum(
                c * int(np.prod(shape[axis + 1 :], dtype=object)) for axis, c in enumerate(place)
            )
    # A chunk that begins beyond 2**32, and one that crosses it.
    begin = (1 << 32) - 5
    crossing = np.arange(10, dtype=np.uint32)
    pieces = [
        _checksum._sums(
            jnp.asarray(crossing[start:stop]),
            jnp.uint32((begin + start) & 0xFFFFFFFF),
            jnp.uint32((begin + start) >> 32),
        )
        for start, stop in ((0, 10), (0, 5), (5, 10))
    ]
    assert np.array_equal(pieces[0], pieces[1] + pieces[2])
    assert not np.array_equal(
        pieces[2], _checksum._sums(jnp.asarray(crossing[5:]), jnp.uint32(0), jnp.uint32(0))
    ), "the high word counts"


def test_fingerprint_compiles_once_for_each_shape():
    params = {str(number): jnp.full((5, 3), float(number)) for number in range(6)}
    before = _checksum._on(None)._cache_size()
    fingerprint(params)
    fingerprint(params)
    assert _checksum._on(None)._cache_size() == before + 1
