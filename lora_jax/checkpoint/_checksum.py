"""A checksum of arrays where they are: on the devices, whatever their sharding and whichever processes hold
them.

Each word of an array is mixed with its index in the whole array, and the mixed words are added modulo 2³². A
sum does not depend on the order, so every device adds up its own part and a few bytes travel. For a fixed
index the mixing is a bijection of the word: one word that changes always changes the sum. Four sums with
different constants, 128 bits, make it improbable (about 2⁻¹²⁸) that several changes cancel by accident. Left
out: protection from somebody who wants them to cancel, which no sum of this kind gives.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from .._paths import named_leaves


# The elements of a NumPy array that are put on a device at a time: a memory map may not fit there as a whole.
_CHUNK = 1 << 24

# Odd multipliers and offsets of four lanes: xxHash's five primes, and those of MurmurHash3's and lowbias32's
# finalisers.
_LANES = (
    (0x9E3779B1, 0x165667B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F),
    (0x85EBCA77, 0x27D4EB2F, 0x7FEB352D, 0x846CA68B, 0x9E3779B1),
    (0xC2B2AE3D, 0x9E3779B1, 0x85EBCA77, 0x165667B1, 0x68E31DA5),
    (0x27D4EB2F, 0x85EBCA77, 0xC2B2AE3D, 0x7FEB352D, 0xB5297A4D),
)
_UNSIGNED = {2: "uint2", 4: "uint4", 8: "uint8", 16: "uint16", 32: "uint32"}


def fingerprint(params: Any) -> str:
    """32 hexadecimal digits that change with any name, shape, dtype or value of `params`.

    >>> import jax.numpy as jnp
    >>> zeros = jnp.zeros(2)
    >>> fingerprint({"w": zeros}) == fingerprint({"w": jnp.zeros(2)}) != fingerprint({"v": zeros})
    True

    The same for NumPy and JAX arrays, and on every mesh. The values stay where they are: 16 bytes an array
    are fetched. Where arrays span processes, all of these call it together.
    """
    # Sorted, because two containers of the same arrays may flatten in different orders.
    leaves = sorted(named_leaves(params), key=lambda item: item[0])
    digest = hashlib.sha256()
    for (path, leaf), sums in zip(
        leaves, jax.device_get([checksum(leaf) for _, leaf in leaves]), strict=True
    ):
        digest.update(
            f"{path}\0{np.result_type(leaf) if np.isscalar(leaf) else leaf.dtype}\0"
            f"{np.shape(leaf)}\0".encode()
        )
        digest.update(sums.astype("<u4").tobytes())
    return digest.hexdigest()[:32]


def checksum(leaf: Any) -> Any:
    """Four unsigned words, `uint32[4]`. Of a JAX array every process has them whole, and this does not wait
    for them.
    """
    if not isinstance(leaf, jax.Array):
        return _of_host(np.asarray(leaf))
    where = leaf.sharding
    if not isinstance(where, NamedSharding):
        return _on(None)(leaf, *_ZERO)
    if any(kind != AxisType.Auto for kind in where.mesh.axis_types):
        # The compiler may place what is computed here as it likes, also where the caller's own arrays have
        # their shardings in their types.
        where = NamedSharding(jax.sharding.Mesh(where.mesh.devices, where.mesh.axis_names), where.spec)
        leaf = jax.device_put(leaf, where)
    sums = _on(NamedSharding(where.mesh, PartitionSpec()))(leaf, *_ZERO)
    if jax.process_count() > 1 and where.mesh.devices.flat[0].platform == "cpu":
        # CPU devices run independent programs at the same time, and in any order. Of two programs that sum
        # over all processes, each process may then wait in another one, for ever. Other devices run one
        # after the other.
        sums.block_until_ready()
    return sums


_ZERO = (np.uint32(0), np.uint32(0))


@functools.cache
def _on(where: NamedSharding | None) -> Any:
    return jax.jit(_sums, out_shardings=where)


def _of_host(array: np.ndarray) -> np.ndarray:
    """The checksum of a NumPy array, by chunks. Each is waited for, so that only one is on the device."""
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(-1)
    if array.dtype.itemsize >= 8:  # JAX would make 32 bits of these
        array = array.view(np.uint32)
    total = np.zeros(4, np.uint32)
    for start in range(0, array.size, _CHUNK):
        begin = np.uint32(start & 0xFFFFFFFF), np.uint32(start >> 32)
        total += np.asarray(
            _on(None)(jax.device_put(array[start : start + _CHUNK], jax.local_devices()[0]), *begin)
        )
    return total


def _sums(array: jax.Array, start_low: jax.Array, start_high: jax.Array) -> jax.Array:
    """The sums of `array`, whose first word has the index `start_low` + 2³² `start_high` in the whole."""
    words = _words(array)
    low, high = flat_index(
        [lax.broadcasted_iota(jnp.uint32, words.shape, axis) for axis in range(words.ndim)], words.shape
    )
    low = low + start_low
    high = high + start_high + (low < start_low).astype(jnp.uint32)
    lanes = tuple(_mix(words, low, high, *(jnp.uint32(constant) for constant in lane)) for lane in _LANES)
    add = lambda left, right: tuple(one + two for one, two in zip(left, right, strict=True))
    # One reduction of four, not four reductions: an array is read once. On the CPU that is ten times as fast.
    return jnp.stack(lax.reduce(lanes, (jnp.uint32(0),) * 4, add, tuple(range(words.ndim))))


def _words(array: jax.Array) -> jax.Array:
    """The bits of each element as an unsigned word of 32, or as two or more along a new last axis."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag], axis=-1)
    about = jnp.finfo if jnp.issubdtype(array.dtype, jnp.floating) else jnp.iinfo
    bits = int(about(array.dtype).bits)
    if bits == 64:
        return lax.bitcast_convert_type(array, jnp.uint32)
    return lax.bitcast_convert_type(array, jnp.dtype(getattr(jnp, _UNSIGNED[bits]))).astype(jnp.uint32)


def _mix(
    word: jax.Array,
    low: jax.Array,
    high: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array,
    e: jax.Array,
) -> jax.Array:
    """A bijection of `word`: exclusive or with what depends on the index alone, odd multiples, and shifts
    that can be undone.
    """
    word = word ^ (low * a + high * b + e)
    word = (word ^ (word >> jnp.uint32(16))) * c
    word = (word ^ (word >> jnp.uint32(15))) * d
    return word ^ (word >> jnp.uint32(16))


def flat_index(coordinates: Sequence[jax.Array], shape: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """The row-major index of `coordinates` in an array of `shape`, in two words of 32 bits, the low one
    first.

    Without 64-bit integers, which JAX has off by default; the high word costs nothing where the array has at
    most 2³² words.
    """
    low = high = jnp.uint32(0)
    for axis, coordinate in enumerate(coordinates):
        stride = math.prod(shape[axis + 1 :])
        part_low = coordinate * jnp.uint32(stride & 0xFFFFFFFF)
        low = low + part_low
        if math.prod(shape) > 1 << 32:
            part_high = _high_product(coordinate, stride & 0xFFFFFFFF) + coordinate * jnp.uint32(stride >> 32)
            high = high + part_high + (low < part_low).astype(jnp.uint32)
    return low, high


def _high_product(word: jax.Array, factor: int) -> jax.Array:
    """The high word of the 64 bits of `word` times `factor`, from the products of their halves."""
    half = jnp.uint32(0xFFFF)
    sixteen = jnp.uint32(16)
    word_low, word_high = word & half, word >> sixteen
    factor_low, factor_high = jnp.uint32(factor & 0xFFFF), jnp.uint32(factor >> 16)
    middle = word_high * factor_low + ((word_low * factor_low) >> sixteen)
    other = word_low * factor_high + (middle & half)
    return word_high * factor_high + (middle >> sixteen) + (other >> sixteen)
