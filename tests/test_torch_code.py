"""PyTorch's files: no code in them is ever run."""

import argparse
import collections
import copyreg
import os
import pickle

import pytest
from torch_files import put

from lora_jax.interop._torch_files import read


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
