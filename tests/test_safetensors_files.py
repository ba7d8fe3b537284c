"""The file layer of safetensors: exact, and one tensor in memory at a time."""

import json
import os
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors_files import assert_same, FACTS, header_of, raw, read, some_tensors, write

from lora_jax.interop import hf
from lora_jax.interop._safetensors import digest, facts_of, Pending, stored_tensors, write_tensors


# Exact


@pytest.mark.parametrize("facts", [None, FACTS], ids=["plain", "checked"])
@pytest.mark.parametrize("shard_bytes", [10**9, 300], ids=["whole", "shards"])
def test_every_dtype_and_shape_comes_back(tmp_path, shard_bytes, facts):
    tensors = some_tensors()
    write(tmp_path, tensors, shard_bytes, facts=facts)
    assert_same(read(tmp_path), tensors)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 1 if shard_bytes == 10**9 else len(files) > 3
    if facts is not None and len(files) > 1:
        facts = {
            **facts,
            "beside": {
                **facts["beside"],
                "model.safetensors.index.json": digest(tmp_path / "model.safetensors.index.json"),
            },
        }
    assert all(facts_of(file) == facts for file in files)


@pytest.mark.parametrize("facts", [None, FACTS], ids=["plain", "checked"])
def test_the_library_reads_the_same(tmp_path, facts):
    tensors = {name: array for name, array in some_tensors().items() if "float8" not in name}
    file = write(tmp_path, tensors, facts=facts)
    assert_same(load_file(file), tensors)
    with safe_open(file, framework="np") as opened:
        assert opened.metadata()["format"] == "pt"
        assert set(opened.metadata()) == ({"format"} if facts is None else {"format", "lora_jax", "sha256"})


def test_pytorch_reads_the_same(torch, tmp_path):
    from safetensors.torch import load_file as load

    tensors = some_tensors()
    found = load(write(tmp_path, tensors, facts=FACTS))
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert tuple(found[name].shape) == array.shape
        if array.size:
            assert found[name].reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes(), name


def test_we_read_what_the_library_writes(tmp_path):
    tensors = {name: array for name, array in some_tensors().items() if "float8" not in name}
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(read(tmp_path), tensors)
    assert facts_of(tmp_path / "model.safetensors") is None
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt", "made by": "others"})
    assert facts_of(tmp_path / "model.safetensors") is None


def test_equal_tensors_and_facts_make_equal_files(tmp_path):
    one = write(tmp_path / "a", some_tensors(), facts=FACTS).read_bytes()
    assert write(tmp_path / "b", some_tensors(), facts=dict(reversed(FACTS.items()))).read_bytes() == one
    assert write(tmp_path / "c", some_tensors(), facts={**FACTS, "rank": 5}).read_bytes() != one


def test_the_layout_is_the_librarys(tmp_path):
    """The header ends, and each tensor begins, at a multiple of what it needs; nothing lies between."""
    file = write(tmp_path, some_tensors(), facts=FACTS)
    text, data = header_of(file)
    assert len(text) % 8 == 0 and text.startswith(b"{") and text.rstrip(b" ").endswith(b"}")
    header = json.loads(text)
    header.pop("__metadata__")
    end = 0
    for name, entry in header.items():
        begin = entry["data_offsets"][0]
        assert begin == end and begin % some_tensors()[name].dtype.itemsize == 0, name
        end = entry["data_offsets"][1]
    assert end == len(data)
    four = [name for name in header if some_tensors()[name].dtype.itemsize == 4]
    assert four == [name for name in some_tensors() if some_tensors()[name].dtype.itemsize == 4]  # stable


def test_a_transposed_array_is_written_as_it_reads(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write(tmp_path, {"a": array})
    np.testing.assert_array_equal(read(tmp_path)["a"], array)


# Little memory


def test_a_read_tensor_is_a_read_only_map_of_its_file(tmp_path):
    file = write(tmp_path, {"a": np.arange(6, dtype=np.float32), "empty": np.zeros((0, 2), np.float32)})
    array = stored_tensors(tmp_path)["a"].read()
    content = bytearray(file.read_bytes())
    content[-1] ^= 0xC0  # a sign and an exponent
    with open(file, "r+b") as stream:
        stream.write(content)
    assert array[5] != 5, "the array is a copy: the file changed and it did not"
    for name in ("a", "empty"):
        assert not stored_tensors(tmp_path)[name].read().flags.writeable


def test_a_file_without_padding_is_read_aligned(tmp_path):
    data = np.arange(3, dtype=np.float64)
    text = '{"a":{"dtype":"F64","shape":[3],"data_offsets":[0,24]}}'
    for extra in range(8):
        raw(tmp_path / "model.safetensors", text + " " * extra, data.tobytes())
        array = read(tmp_path)["a"]
        assert array.flags.aligned
        np.testing.assert_array_equal(array, data)


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    """What lets a model larger than memory be written: each array is gone before the next is fetched."""
    alive, written = [], []

    def fetch():
        assert not any(reference() is not None for reference in alive), "an earlier array is still in memory"
        written.append(len(list(tmp_path.glob("*.safetensors"))))
        array = np.ones(10, np.float32)
        alive.append(weakref.ref(array))
        return array

    write_tensors(
        tmp_path, [Pending(str(i), (10,), np.dtype(np.float32), fetch) for i in range(5)], 80, facts={}
    )
    assert written == [1, 1, 2, 2, 3], "tensors are fetched when their own file is open, not before"
    with safe_open(tmp_path / "model-00003-of-00003.safetensors", framework="np") as file:
        assert list(file.keys()) == ["4"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 200}


@pytest.mark.parametrize("scan", [False, True])
def test_loaded_parameters_do_not_live_in_the_file(tmp_path, scan):
    from lora_jax.models import GPT2, GPT2Config

    model = GPT2(
        GPT2Config(
            vocab_size=64,
            n_positions=16,
            n_embd=16,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    params = jax.device_get(model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    hf.save(tmp_path / "a", model, params)
    file = tmp_path / "a" / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt"})  # without the checksum
    text, data = header_of(file)
    raw(file, text + b" " * (-(8 + len(text)) % 64), data)  # so aligned that `jax.device_put` copies nothing
    _, loaded = hf.load(tmp_path / "a", scan=scan)
    before = [np.array(leaf) for leaf in jax.tree.leaves(loaded)]
    with open(file, "r+b") as stream:
        stream.seek(-len(data), os.SEEK_END)
        stream.write(b"\x55" * len(data))
    for leaf, expected in zip(jax.tree.leaves(loaded), before, strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), expected)
