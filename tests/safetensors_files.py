"""Tensors of every dtype, and their files."""

import struct

import jax.numpy as jnp
import numpy as np

from lora_jax.interop._safetensors import Pending, stored_tensors, write_tensors


FACTS = {"rank": 4, "beside": {"config.json": "0" * 64}, "name": 'Ünïcode "and" quotes'}
DTYPES = [
    *(
        np.dtype(name)
        for name in ("bool", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8")
    ),
    *(np.dtype(dtype) for dtype in (jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2)),
]
SHAPES = [(), (1,), (3, 5), (0, 2), (7, 1, 3)]


def some_tensors():
    draw = np.random.default_rng(0)
    return {
        f"{dtype.name}{list(shape)}": np.asarray(draw.normal(0, 3, shape)).astype(dtype)
        for dtype in DTYPES
        for shape in SHAPES
    }


def pending(tensors):
    return [
        Pending(name, array.shape, array.dtype, lambda array=array: array) for name, array in tensors.items()
    ]


def write(dir, tensors, shard_bytes=10**9, **options):
    dir.mkdir(exist_ok=True)
    write_tensors(dir, pending(tensors), shard_bytes, **options)
    return dir / "model.safetensors"


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype and found[name].shape == expected[name].shape, name
        assert found[name].tobytes() == expected[name].tobytes(), name


def read(dir):
    return {name: tensor.read() for name, tensor in stored_tensors(dir).items()}


def raw(file, header, data=b""):
    text = header.encode() if isinstance(header, str) else header
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def header_of(file):
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return content[8 : 8 + length], content[8 + length :]
