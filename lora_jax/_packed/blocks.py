"""GGUF's blocks: weights as llama.cpp stores and serves them, kept packed and unpacked where they are used.

A row, which lies along the axis that is contracted, is cut into blocks of 32 or 256 numbers. The bytes of a
block are its scales and its codes, in llama.cpp's order (`ggml-common.h`, `gguf/quants.py`). The values are
those of `gguf.dequantize` bit for bit: a scale in half precision times a small integer is exact in float32,
so that at most one sum is rounded, in whatever order XLA computes. Left out: making blocks. llama.cpp
searches for the best ones, which `llama-quantize` does.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .formats import Format


@dataclasses.dataclass(frozen=True)
class Blocks(Format):
    """`w̃ = scale · code`, `scale · code + minimum`, or in 256s `d · scale_j · code − dmin · minimum_j`.

    >>> import numpy as np
    >>> ones = np.array([[0, 60, *[1] * 32]], np.uint8)  # 1.0 in half precision, and 32 codes
    >>> Blocks("Q8_0").unpack({"codes": ones.reshape(-1)}, (1, 32), "float32").sum().item()
    32.0

    `kind` is llama.cpp's name of the type, one of `KINDS`.
    """

    kind: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"`kind` is {self.kind!r}; blocks of {', '.join(KINDS)} may stay packed.")

    @property
    def size(self) -> int:
        """How many numbers a block has."""
        return KINDS[self.kind].size

    @property
    def width(self) -> int:
        """How many bytes."""
        return KINDS[self.kind].width

    def ndims(self, own: tuple[int, ...]) -> dict[str, int]:
        return {"codes": 1}

    def pack(self, weight: jax.Array, stack: int) -> dict[str, jax.Array]:
        raise ValueError(
            "GGUF's blocks are read, not made here: write the model with llama.cpp's `llama-quantize` and "
            "load that, `gguf.load(file, packed=True)`, or pass 'nf4' or 'int8'."
        )

    @partial(jax.jit, static_argnums=(0, 2, 3))
    def unpack(self, arrays: dict[str, jax.Array], shape: tuple[int, ...], dtype: Any) -> jax.Array:
        kind = KINDS[self.kind]
        blocks = jnp.asarray(arrays["codes"]).reshape(*shape[:-1], shape[-1] // kind.size, kind.width)
        return kind.unpack(blocks).reshape(shape).astype(jax.dtypes.canonicalize_dtype(dtype))


def _half(blocks: jax.Array, at: int) -> jax.Array:
    """Numbers of half precision, one a block (…, 1), widened.

    Two bytes taken for one number are a loop to XLA, which it runs for every code of the block.
    """
    low, high = (blocks[..., index : index + 1].astype(jnp.uint16) for index in (at, at + 1))
    return lax.bitcast_convert_type(low | high << np.uint16(8), jnp.float16).astype(jnp.float32)


def _parts(codes: jax.Array, side: int, bits: int) -> jax.Array:
    """Codes of `bits` bits, the lowest of `side` bytes first and then the higher ones."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    groups = codes.reshape(*codes.shape[:-1], -1, 1, side)
    groups = groups >> shifts.reshape(*(1,) * (groups.ndim - 2), -1, 1)
    return (groups & np.uint8(2**bits - 1)).reshape(*codes.shape[:-1], -1)


def _fours(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The halves of 32 codes: the low bits of 16 bytes, and their high bits."""
    return codes & np.uint8(15), codes >> np.uint8(4)


def _fives(fifths: jax.Array, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same with a fifth bit each, 32 of them in four bytes."""
    shifts = np.arange(8, dtype=np.uint8).reshape(*(1,) * codes.ndim, 8)
    bits = ((fifths[..., None] >> shifts) & np.uint8(1)) << np.uint8(4)
    bits = bits.reshape(*codes.shape[:-1], 2, 16)
    low, high = _fours(codes)
    return low | bits[..., 0, :], high | bits[..., 1, :]


def _number(codes: jax.Array, zero: int = 0) -> jax.Array:
    return codes.astype(jnp.float32) - zero


def _halves(value: Callable[[jax.Array], jax.Array], codes: Sequence[jax.Array]) -> jax.Array:
    """The values of a block from the halves of its codes.

    They are apart until they are numbers, because a loop of 16 is what LLVM unrolls: in one of 32 it finds
    the scale anew for every code.
    """
    return jnp.stack([value(half) for half in codes], -2)


def _q4_0(blocks: jax.Array) -> jax.Array:
    return _halves(lambda codes: _half(blocks, 0) * _number(codes, 8), _fours(blocks[..., 2:]))


def _q4_1(blocks: jax.Array) -> jax.Array:
    value = lambda codes: _half(blocks, 0) * _number(codes) + _half(blocks, 2)
    return _halves(value, _fours(blocks[..., 4:]))


def _q5_0(blocks: jax.Array) -> jax.Array:
    codes = _fives(blocks[..., 2:6], blocks[..., 6:])
    return _halves(lambda codes: _half(blocks, 0) * _number(codes, 16), codes)


def _q5_1(blocks: jax.Array) -> jax.Array:
    value = lambda codes: _half(blocks, 0) * _number(codes) + _half(blocks, 2)
    return _halves(value, _fives(blocks[..., 4:8], blocks[..., 8:]))


def _q8_0(blocks: jax.Array) -> jax.Array:
    codes = lax.bitcast_convert_type(blocks[..., 2:], jnp.int8)
    return _halves(lambda codes: _half(blocks, 0) * _number(codes), (codes[..., :16], codes[..., 16:]))


def _scales(packed: jax.Array) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Scales and minima of the first four groups and of the last four, of six bits each, in twelve bytes: the
    first four of both have a byte with two bits to spare, in which the last four have their high bits.
    """
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    high = lambda spare: (spare >> np.uint8(2)) & np.uint8(0x30)
    return (
        (first & np.uint8(63), second & np.uint8(63)),
        ((third & np.uint8(15)) | high(first), (third >> np.uint8(4)) | high(second)),
    )


def _in_eights(blocks: jax.Array, codes: jax.Array) -> jax.Array:
    """256 codes in eight groups, each with a scale and a minimum.

    The halves are apart until they are numbers: XLA would look for the scale of each code in both.
    """
    halves = []
    groups = _number(codes).reshape(*codes.shape[:-1], 2, 4, 32)
    for index, (scale, minimum) in enumerate(_scales(blocks[..., 4:16])):
        scale, minimum = _half(blocks, 0) * _number(scale), _half(blocks, 2) * _number(minimum)
        halves.append(scale[..., None] * groups[..., index, :, :] - minimum[..., None])
    return jnp.stack(halves, -3)


def _q4_k(blocks: jax.Array) -> jax.Array:
    return _in_eights(blocks, _parts(blocks[..., 16:], 32, 4))


def _q5_k(blocks: jax.Array) -> jax.Array:
    fifth = _parts(blocks[..., 16:48], 32, 1) << np.uint8(4)
    return _in_eights(blocks, _parts(blocks[..., 48:], 32, 4) | fifth)


def _q6_k(blocks: jax.Array) -> jax.Array:
    """Two halves of four groups of 32 codes, of which each group finds its bits by other shifts."""
    within = lambda *sizes: (*blocks.shape[:-1], *sizes)
    low, high = blocks[..., :128].reshape(within(2, 2, 32)), blocks[..., 128:192].reshape(within(2, 32))
    scale = _half(blocks, 208) * _number(lax.bitcast_convert_type(blocks[..., 192:208], jnp.int8))
    scale, groups = jnp.repeat(scale.reshape(within(2, 4, 2)), 16, axis=-1), []
    for group in range(4):
        four = (low[..., group % 2, :] >> np.uint8(4 * (group // 2))) & np.uint8(15)
        two = (high >> np.uint8(2 * group)) & np.uint8(3)
        groups.append(scale[..., group, :] * _number(four | two << np.uint8(4), 32))
    return jnp.stack(groups, -2)


class _Kind(NamedTuple):
    size: int  # numbers in a block
    width: int  # bytes of one
    unpack: Callable[[jax.Array], jax.Array]


KINDS = {
    "Q4_0": _Kind(32, 18, _q4_0),
    "Q4_1": _Kind(32, 20, _q4_1),
    "Q5_0": _Kind(32, 22, _q5_0),
    "Q5_1": _Kind(32, 24, _q5_1),
    "Q8_0": _Kind(32, 34, _q8_0),
    "Q4_K": _Kind(256, 144, _q4_k),
    "Q5_K": _Kind(256, 176, _q5_k),
    "Q6_K": _Kind(256, 210, _q6_k),
}
