"""NF4 in NumPy, block by block."""

import math

import jax.numpy as jnp
import numpy as np

from lora_jax._packed.formats import _DYNAMIC as DYNAMIC, NF4


PLAIN = NF4(double=False)
# Appendix E of the paper, of more digits than float32 has.
QUANTILES = np.array(
    """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
    -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
    0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0""".split(),  # noqa: E501
    np.float32,
)
SHAPES = [(64,), (5,), (1, 1), (), (3, 7), (32, 64), (96, 80), (3, 5, 67)]
DTYPES = ["float32", "bfloat16", "float16"]


def normal(shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(jnp.dtype(dtype))


def quantised(weight, block=64):
    """Codes, one a number, and absmax of NF4, in NumPy, block by block."""
    flat = np.asarray(weight).reshape(-1).astype(np.float32)
    codes, absmax = [], []
    for start in range(0, flat.size, block):
        part = flat[start : start + block]
        absmax.append(np.abs(part).max())
        scaled = part * (np.float32(1) / absmax[-1]) if absmax[-1] > 0 else part
        codes.append(np.searchsorted((QUANTILES[:-1] + QUANTILES[1:]) / 2, scaled, side="left"))
    return np.concatenate(codes), np.array(absmax, np.float32)


def packed(codes):
    codes = np.append(codes, 7) if codes.size % 2 else codes
    return (16 * codes[::2] + codes[1::2]).astype(np.uint8)


def unpacked_absmax(arrays, nested_block=256):
    """Each product and sum rounded once."""
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    nested = np.repeat(arrays["nested_absmax"], nested_block)[: arrays["absmax"].size]
    return arrays.get("nested_map", DYNAMIC)[arrays["absmax"]] * nested + arrays["nested_offset"]


def unpacked(arrays, shape, dtype, block=64):
    absmax = unpacked_absmax(arrays) if "nested_absmax" in arrays else np.asarray(arrays["absmax"])
    codes = np.stack([np.asarray(arrays["codes"]) // 16, np.asarray(arrays["codes"]) % 16], -1).reshape(-1)
    size = math.prod(shape)
    return (QUANTILES[codes[:size]] * np.repeat(absmax, block)[:size]).reshape(shape).astype(jnp.dtype(dtype))


def assert_same(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    np.testing.assert_array_equal(actual, expected)


def assert_same_arrays(actual, expected):
    assert actual.keys() == expected.keys()
    for name in actual:
        assert_same(actual[name], expected[name])
