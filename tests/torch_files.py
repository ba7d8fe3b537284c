"""Tensors for PyTorch's files, and files with a pickle that PyTorch would not write."""

import pickle
import struct
import zipfile

import jax.numpy as jnp
import numpy as np

from lora_jax.interop._torch_files import read


FACTS = {"rank": 4, "beside": {"config.json": "0" * 64}, "name": "Ünïcode"}
DTYPES = [np.dtype(name) for name in ("f4", "f8", "f2", jnp.bfloat16, "i8", "i4", "i2", "i1", "u1", bool)]
SHAPES = [(), (1,), (3, 5), (0, 2), (2, 0), (7, 1, 3)]


def some_tensors():
    draw = np.random.default_rng(0)
    tensors = {
        f"{dtype.name}.{shape}": np.asarray(draw.normal(0, 3, shape)).astype(dtype)
        for dtype in DTYPES
        for shape in SHAPES
    }
    return {**tensors, "ünï": np.arange(300, dtype=np.float32), "transposed": np.arange(6.0).reshape(2, 3).T}


def bytes_of(array):
    return np.ascontiguousarray(array).tobytes()


def assert_same(found, expected):
    """Equal in structure, and tensors, which `expected` may have as PyTorch's, to the bit."""
    if hasattr(expected, "detach"):
        tensor = expected.detach().contiguous()
        assert isinstance(found, np.ndarray) and found.shape == tuple(tensor.shape)
        assert found.dtype.name == str(tensor.dtype).removeprefix("torch.")
        plain = (
            tensor.reshape(-1).view(dtype=__import__("torch").uint8).numpy()
            if tensor.numel()
            else np.zeros(0, np.uint8)
        )
        assert bytes_of(found) == plain.tobytes()
    elif isinstance(expected, np.ndarray):
        assert (
            found.dtype == expected.dtype
            and found.shape == expected.shape
            and bytes_of(found) == bytes_of(expected)
        )
    elif isinstance(expected, dict):
        assert isinstance(found, dict) and list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert isinstance(found, type(expected) if type(expected) is list else tuple) and len(found) == len(
            expected
        )
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    else:
        assert type(found) is type(expected) and found == expected


def put(file, contents, data=(), **options):
    """A file as `torch.save` lays it out, of these bytes."""
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr("a/data.pkl", contents)
        for key, value in dict(data).items():
            archive.writestr(f"a/{key}", value)
    return file


# The opcodes of a pickle: `(` … `t` is a tuple, `X` text, `K` a number, `Q` a storage, `R` a call.


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value):
    encoded = pickle.dumps(value, 2)[2:-1]
    return encoded


def tuple_of(*parts):
    return b"(" + b"".join(parts) + b"t"


def storage(word="FloatStorage", key="0", count=6, kind="storage"):
    return tuple_of(text(kind), f"ctorch\n{word}\n".encode(), text(key), text("cpu"), number(count)) + b"Q"


HOOKS = b"ccollections\nOrderedDict\n)R"
MAKE = b"ctorch._utils\n_rebuild_tensor_v2\n"


def tensor(store=None, offset=0, size=(2, 3), stride=(3, 1), grad=b"\x89", hooks=HOOKS, more=b""):
    numbers = (number(offset), tuple_of(*map(number, size)), tuple_of(*map(number, stride)))
    return MAKE + tuple_of(store or storage(), *numbers, grad, hooks, more) + b"R"


def read_pickle(tmp_path, contents, **data):
    put(
        tmp_path / "a.pt",
        b"\x80\x02" + contents + b".",
        {"data/0": np.arange(6, dtype=np.float32).tobytes(), **data},
    )
    return read(tmp_path / "a.pt")
