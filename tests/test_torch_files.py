"""PyTorch's files: read and written as PyTorch does it."""

import argparse
import collections
import os
import pickle
import struct
import warnings
import zipfile

import numpy as np
import pytest
from torch_files import assert_same, FACTS, some_tensors

from lora_jax.interop import _torch_files, _torch_pickle
from lora_jax.interop._torch_files import facts_of, read, write


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
