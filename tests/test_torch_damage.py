"""PyTorch's files: no bit changes unnoticed, and damage gives an error or the values."""

import collections
import os

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from torch_files import assert_same, FACTS, HOOKS, MAKE, read_pickle, storage, tensor, text

from lora_jax.interop._torch_files import facts_of, read, write


def test_no_flipped_bit_passes(tmp_path):
    """Every bit of a file, one at a time: in names, sums, offsets, padding, digits, pickle and data."""
    file = tmp_path / "a.bin"
    write(file, {"w": np.array([1, 2], np.float32)}, facts={"r": 4})
    content = file.read_bytes()
    passed = []
    with open(file, "r+b", buffering=0) as stream:
        for bit in range(8 * len(content)):
            place = bit // 8
            os.pwrite(stream.fileno(), bytes([content[place] ^ 1 << bit % 8]), place)
            try:
                facts_of(file)
                read(file)
            except ValueError as error:
                assert str(file) in str(error), error
            else:
                passed.append(bit)
            os.pwrite(stream.fileno(), content[place : place + 1], place)
    assert passed == []
    assert file.read_bytes() == content and facts_of(file) == {"r": 4}


def test_half_a_mark_is_damage(tmp_path):
    file = tmp_path / "a.bin"
    write(file, {"w": np.array([1, 2], np.float32)}, facts={})
    content = file.read_bytes()
    for old, new, message in (
        (b"lora_jax.json", b"lora_jax.jsom", "a checksum of lora_jax and no facts"),
        (b"lora_jax sha256", b"lora_jax sha257", "facts of lora_jax and no checksum"),
    ):
        file.write_bytes(content.replace(old, new))
        for verify in (True, False):
            with pytest.raises(ValueError, match=f"a.bin is damaged: it carries {message}"):
                facts_of(file, verify=verify)


def test_a_change_on_purpose_is_said_to_be_one(tmp_path):
    file = tmp_path / "a.bin"
    write(file, {"weight": np.array([1, 2], np.float32)}, facts=FACTS)
    file.write_bytes(file.read_bytes().replace(b"byteorder", b"byteorden"))
    with pytest.raises(
        ValueError, match="a.bin is damaged: its contents do not have the checksum.*verify=False"
    ):
        facts_of(file)
    assert facts_of(file, verify=False) == FACTS
    assert_same(read(file), {"weight": np.array([1, 2], np.float32)})


def damaged(content, data):
    position = st.integers(0, len(content) - 1)
    match data.draw(st.sampled_from(["cut", "append", "overwrite", "remove", "swap"])):
        case "cut":
            return content[: data.draw(position)]
        case "append":
            return content + data.draw(st.binary(min_size=1, max_size=9))
        case "overwrite":
            at, new = data.draw(position), data.draw(st.binary(min_size=1, max_size=20))
            return content[:at] + new + content[at + len(new) :]
        case "remove":
            at = data.draw(position)
            return content[:at] + content[at + data.draw(st.integers(1, 20)) :]
        case "swap":
            at, to = sorted([data.draw(position), data.draw(position)])
            return content[:at] + content[to:] + content[at:to]


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=150)
def test_other_damage_passes_neither(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("damage") / "a.bin"
    write(file, {"w": np.array([1, 2], np.float32)}, facts={"r": 4})
    content = file.read_bytes()
    changed = damaged(content, data)
    file.write_bytes(changed)
    if changed == content:
        assert facts_of(file) == {"r": 4}
    else:
        with pytest.raises(ValueError, match="a.bin"):
            facts_of(file)
            read(file)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=150)
def test_damage_to_the_files_of_others_gives_the_values_or_an_error(torch, tmp_path_factory, data):
    """They have no checksum but the records' own, which leave the names open."""
    file = tmp_path_factory.mktemp("damage") / "a.pt"
    contents = {"a": torch.arange(4.0), "b": [torch.ones(2, dtype=torch.bfloat16), 3]}
    torch.save(contents, file)
    file.write_bytes(damaged(file.read_bytes(), data))
    try:
        found = read(file)
    except ValueError as error:
        assert "a.pt" in str(error)
    else:
        assert_same(found, contents)


@hypothesis.given(st.one_of(st.binary(max_size=60), st.lists(st.sampled_from([
    b"}", b"]", b")", b"(", b"t", b"e", b"u", b"s", b"a", b"R", b"b", b"Q", b"N", b"\x85", b"\x86", b"q\x00", b"h\x00", b"q\x01", b"h\x01",  # noqa: E501
    b"\x94", b"K\x02", HOOKS, MAKE, storage(), tensor(), text("a"), text("torch"), text("Size"), b"\x93", b"ctorch\nSize\n", b"\x81", b"0", b"2",  # noqa: E501
]), max_size=25).map(b"".join)))  # fmt: skip
@hypothesis.settings(max_examples=500)
def test_random_pickles_give_plain_values_or_an_error(tmp_path_factory, contents):
    try:
        found = read_pickle(tmp_path_factory.mktemp("random"), contents)
    except ValueError as error:
        assert "a.pt" in str(error)
        return
    left = [found]
    while left:
        value = left.pop()
        assert type(value) in (
            dict,
            collections.OrderedDict,
            list,
            tuple,
            str,
            int,
            float,
            bool,
            type(None),
            np.ndarray,
        )
        left += (
            value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
        )
