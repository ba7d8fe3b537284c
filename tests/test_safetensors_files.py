"""The file layer of safetensors: exact, streaming, and no bit that changes unnoticed."""

import hashlib
import json
import os
import struct
import weakref

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lora_jax.interop import _safetensors, hf
from lora_jax.interop._safetensors import digest, facts_of, Pending, stored_tensors, write_tensors


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


# Damage


def test_no_flipped_bit_passes(tmp_path):
    """Every bit of a file, one at a time: in its length, names, digits, padding and data."""
    tensors = {"ab": np.array([1, 2], np.float32), "c": np.array([3], np.int8), "e": np.zeros(0, np.int8)}
    file = write(tmp_path, tensors, facts={"r": 'a\\"b'})
    content = file.read_bytes()
    assert b"  " in content, "this file has no padding to flip"
    passed = []
    with open(file, "r+b", buffering=0) as stream:
        for bit in range(8 * len(content)):
            place = bit // 8
            os.pwrite(stream.fileno(), bytes([content[place] ^ 1 << bit % 8]), place)
            try:
                facts_of(file)
            except ValueError as error:
                assert str(file) in str(error), error
            else:
                passed.append(bit)
            os.pwrite(stream.fileno(), content[place : place + 1], place)
    assert passed == []
    assert file.read_bytes() == content and facts_of(file) == {"r": 'a\\"b'}


def test_a_name_that_one_bit_makes_the_metadata_is_no_way_round(tmp_path):
    file = write(tmp_path, {"__metadatc__": np.ones(1, np.float32)}, facts={})
    for old, new in ((b"__metadata__", b"__metadatb__"), (b"__metadatc__", b"__metadata__")):
        content = file.read_bytes()
        file.write_bytes(content.replace(old, new))
        with pytest.raises(ValueError, match="model.safetensors"):
            facts_of(file)
        file.write_bytes(content)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=300)
def test_other_damage_passes_neither(tmp_path_factory, data):
    dir = tmp_path_factory.mktemp("damage")
    file = write(dir, {"a": np.arange(3, dtype=np.float32), "b": np.ones(2, jnp.bfloat16)}, facts={"r": 4})
    content = file.read_bytes()
    position = st.integers(0, len(content) - 1)
    match data.draw(st.sampled_from(["cut", "append", "overwrite", "remove", "swap"])):
        case "cut":
            changed = content[: data.draw(position)]
        case "append":
            changed = content + data.draw(st.binary(min_size=1, max_size=9))
        case "overwrite":
            at, new = data.draw(position), data.draw(st.binary(min_size=1, max_size=20))
            changed = content[:at] + new + content[at + len(new) :]
        case "remove":
            at = data.draw(position)
            changed = content[:at] + content[at + data.draw(st.integers(1, 20)) :]
        case "swap":
            at, to = sorted([data.draw(position), data.draw(position)])
            changed = content[:at] + content[to:] + content[at:to]
    file.write_bytes(changed)
    if changed == content:
        assert facts_of(file) == {"r": 4}
    else:
        with pytest.raises(ValueError, match="model.safetensors"):
            facts_of(file)


@hypothesis.given(st.binary(max_size=200), st.booleans())
@hypothesis.settings(max_examples=300)
@hypothesis.example(b"{" * 50_000, True)
@hypothesis.example(b'{"a":' + b"[" * 50_000, True)
def test_random_bytes_are_refused_in_words(tmp_path_factory, content, with_length):
    dir = tmp_path_factory.mktemp("random")
    file = dir / "model.safetensors"
    file.write_bytes((struct.pack("<Q", len(content)) if with_length else b"") + content)
    with pytest.raises(ValueError, match="model.safetensors is not a complete safetensors file"):
        stored_tensors(dir)


ONE = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    "header, message",
    [
        ('{"a":%s,"a":%s}' % (ONE, ONE), "the name 'a' twice"),  # the library keeps the last
        ('{"__metadata__":{"format":"pt","format":"np"},"a":%s}' % ONE, "the name 'format' twice"),
        ('{"__metadata__":{},"__metadata__":{},"a":%s}' % ONE, "duplicate"),
        ('{"__metadata__":{"format":1},"a":%s}' % ONE, "expected a string"),
        ('{"__metadata__":[],"a":%s}' % ONE, "not a complete"),
        ('{"a":["F32",[1],[0,4]]}', "not a complete"),  # the library takes it
        ('{"\\ud800":%s}' % ONE, "not a complete"),
        ('{"\\ud800\\u0041":%s}' % ONE, "not a complete"),
        (b'{"\xff":' + ONE.encode() + b"}", "UTF-8"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}}', "not a complete"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "not a complete"),
        ('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', "not a complete"),
        ('{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}', "not a complete"),
        ('{"a":%s,"b":%s}' % (ONE, ONE), "not a complete"),
        ('{"a":%s,"x":{"y":%s1%s}}' % (ONE, "[" * 10_000, "]" * 10_000), "not a complete"),
        ("[]", "not a complete"),
        ("", "not a complete"),
    ],
)
def test_headers_that_mislead_are_refused(tmp_path, header, message):
    raw(tmp_path / "model.safetensors", header, b"1234")
    for act in (lambda: stored_tensors(tmp_path), lambda: facts_of(tmp_path / "model.safetensors")):
        with pytest.raises(ValueError, match=message):
            act()


@pytest.mark.parametrize(
    "description, message",
    [
        ('{"dtype":"F32","shape":[0,9223372036854775807,4],"data_offsets":[0,0]}', "cannot be read"),
        ('{"dtype":"F32","shape":[0,18446744073709551615],"data_offsets":[0,0]}', "cannot be read"),
        ('{"dtype":"F32","shape":[0%s],"data_offsets":[0,0]}' % (",1" * 70), "cannot be read"),
        ('{"dtype":"F8_E8M0","shape":[0],"data_offsets":[0,0]}', "dtype F8_E8M0, which NumPy does not have"),
    ],
)
def test_tensors_that_numpy_cannot_hold_are_refused_when_read(tmp_path, description, message):
    raw(tmp_path / "model.safetensors", '{"a":%s}' % description)
    with pytest.raises(ValueError, match=f"model.safetensors.*'a'.*{message}"):
        read(tmp_path)


def test_a_file_that_shrank_since_its_header_was_read_is_refused(tmp_path):
    file = write(tmp_path, {"a": np.ones(1000, np.float32)})
    stored = stored_tensors(tmp_path)["a"]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="'a'.*cannot be read"):
        stored.read()


@pytest.mark.parametrize(
    "gone, message",
    [("lora_jax", "a checksum of lora_jax and no facts"), ("sha256", "facts of lora_jax and no checksum")],
)
@pytest.mark.parametrize("verify", [True, False])
def test_half_a_mark_is_damage(tmp_path, gone, message, verify):
    tensors = {"a": np.ones(2, np.float32)}
    file = write(tmp_path, tensors, facts={})
    with safe_open(file, framework="np") as opened:
        metadata = opened.metadata()
    del metadata[gone]
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(ValueError, match=f"is damaged: it carries {message}"):
        facts_of(file, verify=verify)


def test_a_change_on_purpose_is_said_to_be_one(tmp_path):
    tensors = {"a": np.ones(2, np.float32)}
    file = write(tmp_path, tensors, facts=FACTS)
    with safe_open(file, framework="np") as opened:
        metadata = opened.metadata()
    save_file({"a": tensors["a"] + 1}, file, metadata=metadata)
    with pytest.raises(
        ValueError, match="model.safetensors is damaged: its contents do not have the checksum.*verify=False"
    ):
        facts_of(file)
    assert facts_of(file, verify=False) == FACTS
    for facts, message in (("[1]", "a JSON list"), ("{", "are not JSON"), ("[" * 100_000, "are not JSON")):
        save_file(tensors, file, metadata={**metadata, "lora_jax": facts})
        with pytest.raises(ValueError, match=f"is damaged.*{message}"):
            facts_of(file, verify=False)


def test_the_digest_is_of_the_whole_file(tmp_path):
    content = np.random.default_rng(0).bytes(3_000_000)
    (tmp_path / "a").write_bytes(content)
    assert digest(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    zeroed = content[:100] + b"0" * 64 + content[164:]
    assert digest(tmp_path / "a", digits_at=100) == hashlib.sha256(zeroed).hexdigest()


# Bad arguments


@pytest.mark.parametrize(
    "tensors, facts, message",
    [
        (
            [("a", (2,), "f4", np.ones(3, "f4"))],
            None,
            r"'a' was announced as float32 of shape \(2,\) and came as float32 of shape \(3,\)",
        ),
        ([("a", (2,), "f4", np.ones(2, "f8"))], None, r"'a' was announced as float32 .* came as float64"),
        ([("a", (2,), ">f4", np.ones(2, ">f4"))], None, "'a' has dtype .*>f4"),
        ([("a", (2,), "O", np.ones(2, "O"))], None, "'a' has dtype"),
        ([("a", (2,), "f4", np.ones(2, "f4"))] * 2, None, "the name 'a' twice"),
        (
            [("__metadata__", (2,), "f4", np.ones(2, "f4"))],
            None,
            "'__metadata__' which the format keeps for itself",
        ),
        ([("a\ud800", (2,), "f4", np.ones(2, "f4"))], None, "is not Unicode text"),
        ([], {"a": {1, 2}}, "`facts` is .* cannot be written as JSON"),
        ([], {"a": float("nan")}, "`facts` is .* cannot be written as JSON"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, tensors, facts, message):
    tensors = [
        Pending(name, shape, np.dtype(dtype), lambda array=array: array)
        for name, shape, dtype, array in tensors
    ]
    with pytest.raises(ValueError, match=message):
        write_tensors(tmp_path, tensors, 10**9, facts=facts)


def test_the_words_are_the_librarys():
    assert {_safetensors._WORDS[dtype] for dtype in DTYPES} == set(_safetensors._DTYPES)
