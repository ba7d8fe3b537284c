"""The file layer of safetensors: no bit changes unnoticed, and what misleads is refused."""

import hashlib
import os
import struct

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors_files import DTYPES, FACTS, raw, read, write

from lora_jax.interop import _safetensors
from lora_jax.interop._safetensors import digest, facts_of, Pending, stored_tensors, write_tensors
from lora_jax.interop._strict import check_beside


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
@hypothesis.settings(max_examples=150)
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
@hypothesis.settings(max_examples=150)
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
    no_digests = "of the facts that it carries is no mapping from names to digests"
    for facts, message in (
        ("[1]", "a JSON list"),
        ("{", "are not JSON"),
        ("[" * 100_000, "are not JSON"),
        ('{"base":["a"]}', f"'base' {no_digests}"),
        ('{"base":{"a":1}}', f"'base' {no_digests}"),
        ('{"beside":{"a":null}}', f"'beside' {no_digests}"),
    ):
        save_file(tensors, file, metadata={**metadata, "lora_jax": facts})
        with pytest.raises(ValueError, match=f"is damaged.*{message}"):
            facts_of(file, verify=False)


def test_what_lies_beside_a_file_is_nowhere_else(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "config.json").write_text("{}")
    facts = {"beside": {"../config.json": digest(tmp_path / "config.json")}}
    with pytest.raises(ValueError, match="in/config.json is missing, which was saved with a.safetensors"):
        check_beside(tmp_path / "in" / "a.safetensors", facts)


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
