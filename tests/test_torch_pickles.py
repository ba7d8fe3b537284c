"""PyTorch's files: pickles and zips that PyTorch would not write are refused."""

import io
import struct
import warnings
import zipfile

import numpy as np
import pytest
from torch_files import HOOKS, MAKE, number, put, read_pickle, storage, tensor, text, tuple_of

from lora_jax.interop._torch_files import facts_of, read


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [[0, 1, 2], [3, 4, 5]]),
        ({"size": (3, 2), "stride": (1, 3)}, [[0, 3], [1, 4], [2, 5]]),
        ({"offset": 4, "size": (2,), "stride": (1,)}, [4, 5]),
        ({"offset": 5, "size": (), "stride": ()}, 5),
        ({"offset": 5, "size": (1, 1), "stride": (2**40, 7)}, [[5]]),
        ({"size": (3, 2), "stride": (0, 1)}, [[0, 1]] * 3),
        ({"offset": 6, "size": (0, 2), "stride": (2, 1)}, np.zeros((0, 2))),
    ],
)
def test_views_within_their_storage_are_read(tmp_path, options, expected):
    np.testing.assert_array_equal(read_pickle(tmp_path, tensor(**options)), expected)


OUTSIDE = [
    {"offset": 1},
    {"offset": -1, "size": (1,), "stride": (1,)},
    {"offset": 6, "size": (), "stride": ()},
    {"offset": 7, "size": (0,), "stride": (1,)},
    {"size": (2, 4)},
    {"size": (3, 3)},
    {"size": (7,), "stride": (1,)},
    {"size": (-1,), "stride": (1,)},
    {"size": (2,), "stride": (-1,), "offset": 5},
    {"size": (2,), "stride": (6,)},
    {"size": (2, 3), "stride": (3,)},
    {"size": (2**62, 2**62), "stride": (0, 0)},
    {"size": (2**40,), "stride": (0,)},
    {"size": (0, 2**63), "stride": (1, 1)},
    {"size": (2**1000,), "stride": (2**1000,)},
    {"size": (True,), "stride": (1,)},
    {"size": (2.0,), "stride": (1,)},
    {"offset": 1.0, "size": (1,), "stride": (1,)},
    {"size": ("2",), "stride": (1,)},
    {"size": (1,) * 65, "stride": (1,) * 65},
]


@pytest.mark.parametrize("options", OUTSIDE, ids=str)
def test_nothing_outside_a_storage_is_read(tmp_path, options):
    with pytest.raises(ValueError, match="a.pt is damaged, or no plain PyTorch file"):
        read_pickle(tmp_path, tensor(**options))


def doubled(start, times, pair):
    """A value that holds itself's predecessor twice, over and over: small in the file, 2 ** times when
    written out.
    """
    out = [start, b"q\x00"]
    for i in range(times):
        out += [pair(b"h" + bytes([i])), b"q" + bytes([i + 1])]
    return b"".join(out)


TUPLES = b"(" + doubled(b")", 60, lambda one: one + one + b"\x86") + b"t"
LISTS = b"(" + doubled(b"]", 60, lambda one: b"](" + one + one + b"e") + b"t"

MISLEADING = {
    "storage of another size": tensor(storage(count=5)),
    "storage without bytes": tensor(storage(key="1")),
    "storage outside": tensor(storage(key="../data.pkl")),
    "storage of another dtype": b"(" + tensor() + tensor(storage("IntStorage")) + b"t",
    "storage half as wide": tensor(storage("HalfStorage")),
    "storage of a kind unknown": tensor(storage(kind="module")),
    "storage of a function": tuple_of(text("storage"), MAKE, text("0"), text("cpu"), number(6)) + b"Q",
    "storage as text": text("0") + b"Q",
    "storage as a value": b"]" + storage() + b"a",
    "function as a value": b"}" + text("a") + MAKE + b"s",
    "function as a result": MAKE,
    "text as a storage": tensor(text("0")),
    "text as gradient": tensor(grad=text("")),
    "no hooks": tensor(hooks=b"N"),
    "conjugated": tensor(more=b"}" + text("conj") + b"\x88s"),
    "one too many": tensor(more=b"}}"),
    "few arguments": MAKE + tuple_of(storage()) + b"R",
    "arguments that are no tuple": MAKE + b"]R",
    "call of text": text("os.system") + tuple_of(text("ls")) + b"R",
    "call of a tensor": tensor() + b")R",
    "call of a storage type": b"ctorch\nFloatStorage\n" + tuple_of(number(10)) + b"R",
    "call of a call": HOOKS + b")R",
    "OrderedDict of pairs": b"ccollections\nOrderedDict\n"
    + tuple_of(b"](" + text("a") + number(1) + b"\x86e")
    + b"R",
    "parameter of text": b"ctorch._utils\n_rebuild_parameter\n" + tuple_of(text("a"), b"\x89", HOOKS) + b"R",
    "size of text": b"ctorch\nSize\n" + tuple_of(tuple_of(text("a"))) + b"R",
    "device of dicts": b"ctorch\ndevice\n" + tuple_of(b"}") + b"R",
    "state of a function": MAKE + b"}" + text("__code__") + number(1) + b"sb",
    "state of a function, by slots": MAKE + b"N}" + text("__defaults__") + b")s\x86b",
    "state of a type": b"ccollections\nOrderedDict\n}" + text("items") + number(1) + b"sb",
    "state of a tensor": tensor() + b"}b",
    "state of a dict": b"}}b",
    "state that is no dict": HOOKS + b"N}" + text("items") + number(1) + b"s\x86b",
    "items for a tuple": b")N\x61",
    "items for a dict": b"}N\x61",
    "pairs for a list": b"]" + text("a") + b"Ns",
    "pair for a list, by number": b"](NNe" + number(0) + number(1) + b"s",
    "half a pair": b"}(" + text("a") + b"u",
    "twice": b"}(" + text("a") + b"N" + text("a") + b"Nu",
    "tuple as a key": b"})Ns",
    "tensor as a key": b"}" + tensor() + b"Ns",
    "long hash": b"}" + TUPLES + b"Ns",
    "long name": TUPLES + text("a") + b"\x93",
    "long size": MAKE + tuple_of(storage(), number(0), TUPLES, TUPLES, b"\x89", HOOKS) + b"R",
    "long offset": MAKE
    + tuple_of(storage(), TUPLES, tuple_of(number(1)), tuple_of(number(1)), b"\x89", HOOKS)
    + b"R",
    "long identity": TUPLES + b"Q",
    "few tuples for many": TUPLES,
    "few lists for many": LISTS,
    "list in itself": b"]q\x00h\x00a",
    "dict in itself, far in": b"}q\x00" + text("a") + b"](h\x00t",
    "deep": b"(" * 100_000 + b"t" * 100_000,
    "deep lists": b"]" * 100_000 + b"a" * 99_999,
    "nothing": b"",
    "two values": b"NN",
    "open mark": b"(N",
    "no mark": b"t",
    "memo unset": b"h\x05",
    "memo far out, unset": b"j\xff\xff\xff\xff",
    "dropped": b"N0N",
    "bytes that are not there": b"\x96\xff\xff\xff\xff\xff\xff\xff\x00",
    "text that is not there": b"X\xff\xff\xff\x7fab",
    "number that is not there": b"\x8b\xff\xff\xff\x7f1",
    "numbers of many digits": b"L" + b"9" * 100_000 + b"L\n",
    "not Unicode": b"X\x01\x00\x00\x00\xff",
    "nameless": b"c\n\n",
    "three names": b"ctorch FloatStorage\nx\n",
    "unknown": b"\xfe",
}


@pytest.mark.parametrize("kind", MISLEADING)
def test_pickles_that_mislead_are_refused(tmp_path, kind):
    with pytest.raises(ValueError, match="a.pt"):
        read_pickle(tmp_path, MISLEADING[kind])


def test_a_high_memo_number_costs_nothing(tmp_path):
    """An array as long as the highest number, as `pickle` makes it, would have 64 GB."""
    assert read_pickle(tmp_path, b"]r\xff\xff\xff\xffj\xff\xff\xff\xff\x86") == ([], [])


def test_a_value_that_occurs_twice_is_no_error(tmp_path):
    assert read_pickle(tmp_path, b"(" + doubled(b"]", 9, lambda one: b"](" + one + one + b"e") + b"t")


# Zips


@pytest.mark.parametrize(
    "name, contents, message",
    [
        ("byteorder", b"big", "has the byte order b'big' and must have b'little'"),
        ("byteorder", b"", "has the byte order b''"),
        ("b/data.pkl", b"N.", None),
    ],
)
def test_what_else_a_zip_holds(tmp_path, name, contents, message):
    put(tmp_path / "a.pt", b"N.", {name: contents})
    if message is None:
        assert read(tmp_path / "a.pt") is None
        return
    with pytest.raises(ValueError, match=f"a.pt {message}"):
        read(tmp_path / "a.pt")


def test_zips_that_pytorch_does_not_write_are_refused(tmp_path):
    file = tmp_path / "a.pt"
    put(file, b"N.", {"data/0": b"0" * 10**6}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="a.pt is a compressed zip"):
        read(file)

    for names in ([], ["data.pkl"], ["a/b/data.pkl"], ["a/data.pkl", "b/data.pkl"]):
        with zipfile.ZipFile(file, "w") as archive:
            for name in ["a/x", *names]:
                archive.writestr(name, b"N.")
        with pytest.raises(ValueError, match="records `.*/data.pkl`, not the one"):
            read(file)

    with zipfile.ZipFile(file, "w") as archive, warnings.catch_warnings(action="ignore"):
        archive.writestr("a/data.pkl", b"N.")
        archive.writestr("a/data.pkl", b"N.")
    with pytest.raises(ValueError, match="two records of one name"):
        read(file)

    for content in (b"", b"PK", b"PK\x03\x04", b"GIF89a", b"\x80", b"\x80\x02N.", b"version https://git-lfs"):
        file.write_bytes(content)
        for act in (read, facts_of):
            with pytest.raises(ValueError, match="a.pt (is not a|is damaged, or no|has the format)"):
                act(file)


def test_records_that_lie_over_each_other_are_refused(tmp_path):
    """A zip of a few bytes may list one record under many names."""
    one = io.BytesIO()
    with zipfile.ZipFile(one, "w") as archive:
        archive.writestr("a/data.pkl", b"N.")
        archive.writestr("a/data/0", b"0" * 1000)
        for i in range(1, 9):
            archive.writestr(f"a/data/{i}", b"0" * 1000)
            archive.infolist()[-1].header_offset = archive.infolist()[1].header_offset
    # Keep the first thousand bytes and the directory, which now points at them alone.
    content = one.getvalue()
    directory = content.index(b"PK\x01\x02")
    second = content.index(b"a/data/1") - 30
    end = bytearray(content[directory:])
    struct.pack_into("<I", end, len(end) - 6, second)
    (tmp_path / "a.pt").write_bytes(content[:second] + bytes(end))
    with pytest.raises(ValueError, match="its records are larger than itself"):
        read(tmp_path / "a.pt")
