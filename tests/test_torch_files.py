"""PyTorch's files: read and written as PyTorch does it, no code in them ever run, and no bit that changes
unnoticed.
"""

import argparse
import collections
import copyreg
import io
import os
import pickle
import struct
import warnings
import zipfile

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.interop import _torch_files, _torch_pickle
from lora_jax.interop._torch_files import facts_of, read, write


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


# With PyTorch


@pytest.mark.parametrize(
    "options", [{"weights_only": True}, {"weights_only": True, "mmap": True}, {"weights_only": False}]
)
def test_pytorch_reads_what_we_write(torch, tmp_path, options):
    tensors = some_tensors()
    write(tmp_path / "a.bin", tensors, facts=FACTS)
    found = torch.load(tmp_path / "a.bin", **options)
    assert type(found) is dict and list(found) == list(tensors)
    for name, array in tensors.items():
        assert found[name].stride() == torch.empty(array.shape).stride() and not found[name].requires_grad
        assert_same(array, found[name])


def test_a_module_loads_what_we_write(torch, tmp_path):
    module = torch.nn.Linear(3, 2)
    write(
        tmp_path / "a.bin", {"weight": np.ones((2, 3), np.float32), "bias": np.zeros(2, np.float32)}, facts={}
    )
    module.load_state_dict(torch.load(tmp_path / "a.bin", weights_only=True))
    assert module(torch.ones(3)).tolist() == [3, 3]


def contents_of_pytorch(torch):
    base = torch.arange(24.0).reshape(2, 3, 4)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    module[0].weight.requires_grad = False
    marked = torch.nn.Parameter(torch.ones(2))
    marked.note = "kept by PyTorch, of no use here"
    optimizer = torch.optim.AdamW(module[1].parameters())
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    dtypes = [
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    ]
    return {
        "plain": {
            f"{dtype}": torch.tensor([0, 1, 2.5, -3] if dtype.is_floating_point else [0, 1, 1, 0]).to(dtype)
            for dtype in dtypes
        },
        "ordered": collections.OrderedDict(b=base, a=torch.tensor(2.0), empty=torch.zeros(0, 3)),
        "state dict, with _metadata": module.state_dict(),
        "nested": {
            "epoch": 3,
            "model_state_dict": module.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "loss": 0.1,
        },
        "parameters": {"a": module[1].weight, "frozen": module[0].weight, "with an attribute": marked},
        "views": {
            "t": base.transpose(0, 2),
            "s": base[:, 1:, ::2],
            "e": torch.arange(4).expand(3, 4),
            "offset": base[1, 2, 3],
            "none": base[:, 3:],
        },
        "others": {
            "size": torch.Size([2, 3]),
            "none": None,
            "yes": True,
            "large": 2**40,
            "minus": -(2**33),
            "list": [1, (2.5, "x"), []],
            7: "number",
        },
        "one tensor": torch.arange(3),
        "many": {
            f"layer.{i}.weight": torch.full((2,), i) for i in range(1200)
        },  # more than one batch of pickle's, and long memo numbers
    }


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_we_read_what_pytorch_writes(torch, tmp_path, protocol):
    for name, contents in contents_of_pytorch(torch).items():
        torch.save(contents, tmp_path / "a.pt", pickle_protocol=protocol)
        assert facts_of(tmp_path / "a.pt") is None
        found = read(tmp_path / "a.pt")
        assert_same(found, contents)
        assert isinstance(found, dict | np.ndarray), name


def test_tensors_that_shared_memory_share_it_still(torch, tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    torch.save(
        {"embedding": weight, "head": weight, "turned": weight.T, "other": weight.clone()}, tmp_path / "a.pt"
    )
    found = read(tmp_path / "a.pt")
    assert np.shares_memory(found["embedding"], found["head"]) and np.shares_memory(
        found["embedding"], found["turned"]
    )
    assert not np.shares_memory(found["embedding"], found["other"])
    assert not any(array.flags.writeable for array in found.values())


def test_devices_and_layouts_are_their_names(torch, tmp_path):
    torch.save(
        {"a": torch.device("cpu"), "b": torch.device("cuda", 1), "c": torch.strided}, tmp_path / "a.pt"
    )
    assert read(tmp_path / "a.pt") == {"a": "cpu", "b": "cuda:1", "c": "torch.strided"}


@pytest.mark.parametrize(
    "value",
    [
        "complex64",
        "sparse",
        "negated",
        "quantised",
        "dtype",
        "storage",
        "module",
        "namespace",
        "set",
        "numpy",
    ],
)
def test_what_is_left_out_is_refused(torch, tmp_path, value):
    with warnings.catch_warnings(action="ignore"):
        values = {
            "complex64": lambda: torch.ones(2, dtype=torch.complex64),
            "sparse": lambda: torch.eye(2).to_sparse(),
            "negated": lambda: torch.ones(2, dtype=torch.complex64).conj().imag,
            "quantised": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
            "dtype": lambda: torch.float32,
            "storage": lambda: torch.ones(2).untyped_storage(),
            "module": lambda: torch.nn.Linear(2, 2),
            "namespace": lambda: argparse.Namespace(rank=4),
            "set": lambda: {1, 2},
            "numpy": lambda: np.float32(1),
        }
        torch.save({"a": values[value]()}, tmp_path / "a.pt")
    with pytest.raises(
        ValueError,
        match=(
            "a.pt (asks for '.*', and code that files ask for is never run; .*save `.name: tensor.`|is "
            "damaged, or no plain)"
        ),
    ):
        read(tmp_path / "a.pt")


def test_files_of_before_1_6_are_named_as_such(torch, tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    for act in (read, facts_of):
        with pytest.raises(
            ValueError,
            match="a.pt has the format that PyTorch wrote before 1.6; load it with PyTorch.*save it again",
        ):
            act(tmp_path / "a.pt")


# Alone


def test_what_we_write_comes_back(tmp_path):
    write(tmp_path / "a.bin", some_tensors(), facts=FACTS)
    assert facts_of(tmp_path / "a.bin") == FACTS
    assert_same(read(tmp_path / "a.bin"), some_tensors())
    write(tmp_path / "a.bin", {}, facts={})
    assert (read(tmp_path / "a.bin"), facts_of(tmp_path / "a.bin")) == ({}, {})
    assert os.listdir(tmp_path) == ["a.bin"]


def test_equal_tensors_and_facts_make_equal_files(tmp_path):
    for name, facts in (("a.bin", FACTS), ("b.pt", dict(reversed(FACTS.items()))), ("c.bin", {})):
        write(tmp_path / name, some_tensors(), facts=facts)
    one, two, three = ((tmp_path / name).read_bytes() for name in ("a.bin", "b.pt", "c.bin"))
    assert one == two != three


def test_tensors_lie_aligned(tmp_path):
    write(tmp_path / "a.bin", some_tensors(), facts=FACTS)
    content = (tmp_path / "a.bin").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.bin") as archive:
        assert archive.testzip() is None
        for record in archive.infolist():
            name, extra = struct.unpack("<HH", content[record.header_offset + 26 : record.header_offset + 30])
            assert (record.header_offset + 30 + name + extra) % 64 == 0, record.filename


@pytest.mark.parametrize("number", [0, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**40])
def test_sizes_of_large_tensors_are_written(number):
    assert pickle.loads(b"\x80\x02" + _torch_pickle._integer(number) + b".") == number


def test_a_write_that_fails_leaves_everything_as_it_was(tmp_path, monkeypatch):
    write(tmp_path / "a.bin", {"a": np.ones(2, np.float32)}, facts={})
    before = (tmp_path / "a.bin").read_bytes()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(_torch_files, "digest", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "a.bin", {"a": np.zeros(2, np.float32)}, facts={})
    assert os.listdir(tmp_path) == ["a.bin"] and (tmp_path / "a.bin").read_bytes() == before


@pytest.mark.parametrize(
    "tensors, facts, message",
    [
        ({"a": np.ones(2, np.uint16)}, {}, "'a' with dtype uint16"),
        ({"a": np.ones(2, ">f4")}, {}, "'a' with dtype >f4"),
        ({"a": np.ones(2, object)}, {}, "'a' with dtype object"),
        ({"\ud800": np.ones(2)}, {}, "surrogates"),
        ({}, {"a": {1}}, "`facts` is .* cannot be written as JSON"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, tensors, facts, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "a.bin", tensors, facts=facts)
    assert os.listdir(tmp_path) == []


# Code


def put(file, contents, data=(), **options):
    """A file as `torch.save` lays it out, of these bytes."""
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr("a/data.pkl", contents)
        for key, value in dict(data).items():
            archive.writestr(f"a/{key}", value)
    return file


class Calls:
    """An object that its pickle makes by calling a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Sets(collections.OrderedDict):
    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        return collections.OrderedDict, (), self.state


def hostile(mark):
    """Pickles, each of which makes the file `mark` when it is loaded."""
    touch = Calls(os.system, f"touch {mark}")
    evaluated = Calls(eval, f"open({str(mark)!r}, 'w').close()")
    command = f"(S'touch {mark}'\n"
    return {
        "os.system": pickle.dumps(touch, 2),
        "eval": pickle.dumps(evaluated, 2),
        "exec": pickle.dumps(Calls(exec, f"open({str(mark)!r}, 'w').close()"), 5),
        "as a value": pickle.dumps({"weight": touch}, 2),
        "behind an OrderedDict": pickle.dumps(collections.OrderedDict(a=[1, (touch,)]), 2),
        "in a state": pickle.dumps({"a": Sets({"_metadata": touch})}, 2),
        "as a key": pickle.dumps({(touch,): 1}, 2),
        "with protocol 0": pickle.dumps(touch, 0),
        "with protocol 4": pickle.dumps(touch, 4),
        "INST": command.encode() + b"ios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'touch " + str(mark).encode() + b"'\no.",
        "NEWOBJ": b"csubprocess\nPopen\n(]S'touch'\naS'" + str(mark).encode() + b"'\nat\x81.",
        "after an end": b"N." + pickle.dumps(touch, 2),
        "before a refusal": pickle.dumps([touch, argparse.Namespace()], 2),
        "getattr": pickle.dumps(Calls(getattr, Calls(__import__, "os"), "system"), 2)
        + pickle.dumps(touch, 2),
    }


@pytest.mark.parametrize("kind", hostile("x"))
def test_code_is_refused_and_does_not_run(tmp_path, kind):
    mark = tmp_path / "ran"
    content = hostile(mark)[kind]
    put(tmp_path / "a.pt", content)
    with pytest.raises(ValueError, match="a.pt"):
        read(tmp_path / "a.pt")
    assert not mark.exists()


@pytest.mark.parametrize("kind", sorted(set(hostile("x")) - {"after an end", "getattr", "NEWOBJ"}))
def test_the_code_of_the_test_above_works(tmp_path, kind):
    """It proves nothing to refuse what would not have run."""
    try:
        pickle.loads(hostile(tmp_path / "ran")[kind])
    except TypeError:  # unhashable, after the fact
        pass
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "asked",
    "os.system builtins.eval builtins.getattr builtins.set torch.storage._load_from_bytes "
    "torch._utils._rebuild_tensor_v3 torch.load "
    "argparse.Namespace numpy._core.multiarray.scalar numpy.core.multiarray._reconstruct _codecs.encode "
    "torch.nn.modules.linear.Linear "
    "torch.ComplexFloatStorage torch.FloatTensor collections.defaultdict copyreg._reconstructor torch.float32".split(),  # noqa: E501
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_is_asked_for_is_named(tmp_path, asked, protocol):
    module, _, name = asked.rpartition(".")
    by_name = (
        f"c{module}\n{name}\n"
        if protocol == 2
        else f"\x8c{chr(len(module))}{module}\x8c{chr(len(name))}{name}\x93"
    )
    put(tmp_path / "a.pt", b"\x80" + bytes([protocol]) + by_name.encode("latin-1") + b")R.")
    with pytest.raises(
        ValueError,
        match=(
            f"a.pt asks for '{asked}', and code that files ask for is never run; load it with PyTorch where "
            "you trust it"
        ),
    ):
        read(tmp_path / "a.pt")


def test_numbers_registered_for_code_are_refused(tmp_path):
    copyreg.add_extension(os.system.__module__, "system", 0xF0)
    try:
        content = pickle.dumps(Calls(os.system, f"touch {tmp_path / 'ran'}"), 2)
        assert b"\x82\xf0" in content
        put(tmp_path / "a.pt", content)
        with pytest.raises(ValueError, match="a.pt has the opcode EXT1 in its pickle"):
            read(tmp_path / "a.pt")
    finally:
        copyreg.remove_extension(os.system.__module__, "system", 0xF0)
    assert not (tmp_path / "ran").exists()


# Pickles that PyTorch would not write: `(` … `t` is a tuple, `X` text, `K` a number, `Q` a storage, `R` a
# call


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


# Damage


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
@hypothesis.settings(max_examples=300)
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
@hypothesis.settings(max_examples=300)
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
@hypothesis.settings(max_examples=1500)
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
