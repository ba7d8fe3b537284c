"""What bitsandbytes stores: its files are read, and where it is installed, its bytes and values are ours."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_numpy import (
    assert_same,
    assert_same_arrays,
    DTYPES,
    normal,
    PLAIN,
    QUANTILES,
    unpacked,
    unpacked_absmax,
)

import lora_jax
from lora_jax import LoRA, quant
from lora_jax._packed.formats import _DYNAMIC as DYNAMIC, from_bitsandbytes, NF4


# --- what bitsandbytes stores -------------------------------------------------------------------------------


def stored(weight, double=True, block=64, name="weight"):
    """What is in bitsandbytes' file of `weight`."""
    arrays = NF4(block, double=double).pack(jnp.asarray(weight), 0)
    state = {"quant_type": "nf4", "blocksize": block, "dtype": str(weight.dtype), "shape": list(weight.shape)}
    tensors = {
        name: np.asarray(arrays["codes"])[:, None],
        f"{name}.absmax": np.asarray(arrays["absmax"]),
        f"{name}.quant_map": QUANTILES,
    }
    if double:
        tensors |= {
            f"{name}.nested_absmax": np.asarray(arrays["nested_absmax"]),
            f"{name}.nested_quant_map": DYNAMIC,
        }
        state |= {
            "nested_blocksize": 256,
            "nested_dtype": "float32",
            "nested_offset": float(arrays["nested_offset"]),
        }
    return tensors | {f"{name}.quant_state.bitsandbytes__nf4": json_bytes(state)}, arrays


def json_bytes(state):
    return np.frombuffer(json.dumps(state).encode(), np.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double, block", [(True, 64), (False, 64), (True, 128)])
def test_from_bitsandbytes(double, block, dtype):
    weight = normal((33, 35), dtype)
    tensors, arrays = stored(weight, double, block, "h.0.weight")
    tensors["h.1.weight"] = np.zeros(3, np.float32)
    format, read, shape, read_dtype = from_bitsandbytes(tensors, "h.0.weight")
    assert (format, shape, read_dtype) == (NF4(block, double=double), (33, 35), jnp.dtype(dtype))
    assert_same_arrays(read, arrays | ({"nested_map": DYNAMIC} if double else {}))
    assert all(isinstance(array, jax.Array) for array in read.values())


def test_from_bitsandbytes_keeps_the_map_of_the_file():
    tensors, arrays = stored(normal((64, 512)))
    changed = tensors["weight.nested_quant_map"].copy()
    changed[0] = -1  # as older versions did before they quantised on the CPU
    tensors["weight.nested_quant_map"] = changed
    tensors["weight.absmax"] = np.zeros_like(tensors["weight.absmax"])
    format, read, shape, dtype = from_bitsandbytes(tensors)
    assert read.keys() == {*arrays, "nested_map"}
    assert_same(read["nested_map"], changed)
    assert_same(format.unpack(read, shape, dtype), unpacked(read, shape, "float32"))


def without(key):
    return lambda tensors, state: tensors.pop(key)


def replaced(key, change):
    return lambda tensors, state: tensors.update({key: change(tensors[key])})


def field(name, value):
    return lambda tensors, state: state.update({name: value})


BAD = [
    *[
        (key, without(key))
        for key in (
            "weight",
            "weight.absmax",
            "weight.quant_map",
            "weight.nested_absmax",
            "weight.nested_quant_map",
        )
    ],
    ("weight", replaced("weight", lambda array: array[:-1])),
    ("weight", replaced("weight", lambda array: array[:, 0])),
    ("weight", replaced("weight", lambda array: array.reshape(-1, 2).view(np.float16))),
    ("weight.absmax", replaced("weight.absmax", lambda array: array.astype(np.float32))),
    ("weight.absmax", replaced("weight.absmax", lambda array: array[1:])),
    ("weight.quant_map", replaced("weight.quant_map", lambda array: array[::-1])),
    ("weight.nested_absmax", replaced("weight.nested_absmax", lambda array: np.append(array, array))),
    ("weight.nested_quant_map", replaced("weight.nested_quant_map", lambda array: array[:16])),
    *[
        ("weight.quant_state.bitsandbytes__nf4", field(name, value))
        for name, value in [
            *[
                (name, None)
                for name in (
                    "quant_type",
                    "blocksize",
                    "dtype",
                    "shape",
                    "nested_blocksize",
                    "nested_dtype",
                    "nested_offset",
                )
            ],
            ("quant_type", "fp4"),
            ("dtype", "int8"),
            ("nested_dtype", "float16"),
            ("blocksize", 63),
            ("nested_offset", "1.0"),
        ]
    ],
]


@pytest.mark.parametrize("key, change", BAD)
def test_from_bitsandbytes_is_strict(key, change):
    tensors, _ = stored(normal((64, 70)))
    state_key = "weight.quant_state.bitsandbytes__nf4"
    state = json.loads(tensors.pop(state_key).tobytes())
    change(tensors, state)
    tensors[state_key] = json_bytes({name: value for name, value in state.items() if value is not None})
    with pytest.raises(ValueError, match=f"`{key}`"):
        from_bitsandbytes(tensors)


def test_from_bitsandbytes_without_a_readable_state():
    tensors, _ = stored(normal((64, 70)))
    key = "weight.quant_state.bitsandbytes__nf4"
    with pytest.raises(ValueError, match=f"`{key}` is not the bytes of a JSON object"):
        from_bitsandbytes({**tensors, key: np.frombuffer(b"\xff{", np.uint8)})
    with pytest.raises(ValueError, match=f"`{key}` is not the bytes of a JSON object"):
        from_bitsandbytes({**tensors, key: np.frombuffer(b"[1]", np.uint8)})
    state = tensors.pop(key)
    with pytest.raises(ValueError, match=f"`{key}` is missing\\.$"):
        from_bitsandbytes(tensors)
    with pytest.raises(ValueError, match=f"`{key}` is missing; there is .*__fp4'.*, but only NF4 is read"):
        from_bitsandbytes({**tensors, "weight.quant_state.bitsandbytes__fp4": state})


# --- bitsandbytes -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bnb(torch):
    return pytest.importorskip(
        "bitsandbytes",
        reason="bitsandbytes is not installed: pip install 'lora_jax[torch]' (on Linux), or bitsandbytes",
    )


@pytest.fixture
def bnb_stored(torch, bnb):
    """A function of a NumPy weight: bitsandbytes' tensors, and what it makes of them."""

    def store(weight, double, block=64):
        tensor = torch.from_numpy(weight.astype(np.float32)).to(getattr(torch, str(weight.dtype)))
        with torch.compiler.set_stance(
            "force_eager"
        ):  # odd sizes are compiled, for seconds, with a C compiler
            codes, state = bnb.functional.quantize_4bit(
                tensor, blocksize=block, compress_statistics=double, quant_type="nf4"
            )
            values = bnb.functional.dequantize_4bit(codes, state)
        parts = {"weight": codes} | {
            f"weight.{key}": part for key, part in state.as_dict(packed=True).items()
        }
        return {key: part.numpy() for key, part in parts.items()}, values.to(torch.float32).numpy().astype(
            weight.dtype
        )

    return store


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize(
    "shape, block", [((256, 512), 64), ((70, 90), 64), ((33, 7), 64), ((70, 90), 32), ((128, 130), 4096)]
)
def test_values_are_those_of_bitsandbytes(bnb_stored, shape, block, double, dtype):
    weight = normal(shape, dtype) * np.exp(normal((shape[0], 1), dtype))
    tensors, values = bnb_stored(weight, double, block)
    format, arrays, read_shape, read_dtype = from_bitsandbytes(tensors)
    assert (format, read_shape, read_dtype) == (NF4(block, double=double), shape, weight.dtype)
    assert_same(format.unpack(arrays, read_shape, read_dtype), values)
    assert_same(jax.jit(lambda arrays: format.unpack(arrays, read_shape, read_dtype))(arrays), values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(256, 512), (64, 3), (70, 90)])
def test_bytes_are_those_of_bitsandbytes(bnb_stored, shape, dtype):
    weight = normal(shape, dtype)
    tensors, _ = bnb_stored(weight, double=False)
    arrays = PLAIN.pack(jnp.asarray(weight), 0)
    assert_same_arrays(arrays, from_bitsandbytes(tensors)[1])
    # bitsandbytes searches the map in another way, which does not always find the nearest: one code in
    # hundreds.
    tensors, _ = bnb_stored(weight, double=True)
    ours, theirs = (
        jax.tree.map(np.asarray, arrays)
        for arrays in (NF4().pack(jnp.asarray(weight), 0), from_bitsandbytes(tensors)[1])
    )
    assert_same(ours["codes"], theirs["codes"])
    np.testing.assert_allclose(ours["nested_offset"], theirs["nested_offset"], rtol=1e-6)
    np.testing.assert_allclose(ours["nested_absmax"], theirs["nested_absmax"], rtol=1e-5, atol=1e-6)
    assert (ours["absmax"] != theirs["absmax"]).sum() <= 1 + 0.01 * ours["absmax"].size
    # The widest gap between the map's values is 0.0142.
    assert (
        np.abs(unpacked_absmax(ours) - unpacked_absmax(theirs)).max() <= 0.0143 * ours["nested_absmax"].max()
    )


def test_maps_are_those_of_bitsandbytes(torch, bnb):
    theirs = bnb.functional.create_dynamic_map(signed=True).numpy()
    ours = DYNAMIC
    assert_same(QUANTILES, bnb.functional.get_4bit_type("nf4", device="cpu").numpy())
    # Without fused multiply-add torch.linspace has other last bits.
    np.testing.assert_array_max_ulp(ours, theirs, maxulp=1)
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert_same(ours, theirs)


def test_a_layer_as_bitsandbytes_saves_it(torch, bnb):
    # 128 in features: with a multiple of 32 that is none of the block, the AVX-512 kernel of 0.50.2 takes
    # other blocks' absmax.
    layer = bnb.nn.Linear4bit(
        128, 40, bias=False, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=True
    )
    layer.load_state_dict({"weight": torch.from_numpy(normal((40, 128)))})
    layer = layer.to("cpu")
    tensors = {f"layer.{key}": tensor.numpy() for key, tensor in layer.state_dict().items()}
    format, arrays, shape, dtype = from_bitsandbytes(tensors, "layer.weight")
    assert (format, shape, dtype) == (NF4(), (40, 128), jnp.float32)
    values = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert_same(format.unpack(arrays, shape, dtype), values.numpy())


def test_weights_of_bitsandbytes(torch, bnb):
    """Its bytes in a place of `frozen`: transposed, as Flax has kernels, and adapted."""
    weight = torch.from_numpy(np.array(normal((96, 64))))
    parameter = bnb.nn.Params4bit(weight, quant_type="nf4", compress_statistics=True, requires_grad=False).to(
        "cpu"
    )
    tensors = {"weight": parameter.data.numpy()} | {
        f"weight.{name}": value.numpy() for name, value in parameter.quant_state.as_dict(packed=True).items()
    }
    expected = bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state).numpy()
    leaf = quant.from_bitsandbytes(tensors)
    assert leaf.shape == (64, 96)
    np.testing.assert_array_equal(leaf.value(), expected.T)
    np.testing.assert_array_equal(quant.from_bitsandbytes(tensors, transpose=False).value(), expected)
    frozen, delta = lora_jax.lorafy({"w": leaf}, "w", method=LoRA(rank=2))
    delta = jax.tree.map(jnp.ones_like, delta)
    x = normal((4, 64))
    found = lora_jax.adapt(lambda params, x: x @ params["w"])(lora_jax.combine(frozen, delta), x)
    np.testing.assert_allclose(found, x @ (expected.T + 16), rtol=1e-4, atol=1e-4)
