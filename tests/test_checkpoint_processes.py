"""Checkpoints of arrays that span processes: real ones on this machine, with two devices each and one
directory for all.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax.checkpoint import Checkpoints, fingerprint


# The same on every process, and in this one: what is trained, with nothing in it that repeats.
_STATE = """
import numpy as np

def arrays(step):
    draw = np.random.default_rng(step)
    return {
        "rows": draw.normal(size=(64, 6)).astype(np.float32),
        "columns": draw.integers(-9, 9, (3, 8)).astype(np.int8),
        "both": draw.normal(size=(8, 8)).astype(np.float16),
        "whole": draw.normal(size=(5,)).astype(np.float32),
    }
"""
exec(_STATE)

_TRAIN = (
    _STATE
    + """
import json, pathlib, shutil, warnings
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from lora_jax.checkpoint import Checkpoints, State, fingerprint, _storage
from lora_jax.checkpoint._storage import Damaged

me, run = jax.process_index(), pathlib.Path(sys.argv[1])
devices = np.array(jax.devices())
SPECS = {"rows": P("a"), "columns": P(None, "b"), "both": P("b", "a"), "whole": P()}

def placed(mesh, tree):
    put = lambda name: lambda array: jax.make_array_from_callback(array.shape, NamedSharding(mesh, SPECS[name]), lambda index: array[index])
    return {name: put(name)(array) for name, array in tree.items()}

def same(tree, expected):
    parts = [(tree[name].dtype, part.data, array[part.index]) for name, array in expected.items() for part in tree[name].addressable_shards]
    return all(dtype == want.dtype and np.array_equal(have, want) for dtype, have, want in parts)

mesh = Mesh(devices.reshape(2, -1), ("a", "b"))
other = Mesh(devices[::-1].reshape(-1, 2), ("a", "b"))
blank = placed(other, {name: np.zeros_like(array) for name, array in arrays(0).items()})
says = {"fingerprint": fingerprint(placed(mesh, arrays(3))), "on the other": fingerprint(placed(other, arrays(3))), "numpy": fingerprint(arrays(3))}
key = jax.random.key(5)

# Written while the devices exchange: the arrays that are saved are donated to steps that sum over all devices.
# Each step needs the one before it: CPU devices would run two at once, which deadlocks without any checkpoint.
step = jax.jit(lambda trees: jax.tree.map(lambda leaf: leaf + leaf.sum(dtype=leaf.dtype), trees), donate_argnums=0)
with Checkpoints(run / "kept", identity={"base": "x"}, keep=2, keep_best=True) as checkpoints:
    for done in (1, 2, 3, 4):
        delta, moments = placed(mesh, arrays(done)), placed(mesh, arrays(-done % 99))
        checkpoints.save(State(delta, moments, done, (0, done), key), loss=float("nan") if done == 4 else abs(done - 2.2))
        for _ in range(10):
            delta, moments = step((delta, moments))
        jax.block_until_ready((delta, moments))
    says["kept"] = [checkpoints.steps(), checkpoints.best(), checkpoints.latest()]
    found = checkpoints.restore(blank, blank)
    says["restored"] = [found.step, same(found.delta, arrays(4)), same(found.opt_state, arrays(-4 % 99)), found.delta["rows"].sharding.mesh == other]
    mean = checkpoints.average(blank, last=2)
    says["average"] = same(mean, {**arrays(4), **{n: ((arrays(4)[n].astype(np.float32) + arrays(3)[n].astype(np.float32)) / 2).astype(arrays(4)[n].dtype)
                                                  for n in ("rows", "both", "whole")}})

def damaged(name, change):
    if me == 0:
        shutil.copytree(run / "kept", run / name)
        change(run / name / "4")
    multihost_utils.sync_global_devices(name)
    with Checkpoints(run / name, identity={"base": "x"}) as checkpoints, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = checkpoints.restore(blank, blank)
        return [found.step, same(found.delta, arrays(found.step)), checkpoints.steps(), (run / name / "4.damaged").is_dir(),
                [str(w.message).split("damaged: ")[1] for w in said if "is damaged" in str(w.message)]]

def largest(path):
    return max((file for file in (path / "arrays").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)

def cut(path):
    for file in (path / "arrays").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

def flip(path):
    content = bytearray(largest(path).read_bytes())
    content[len(content) // 2] ^= 4
    largest(path).write_bytes(content)

wanted = sys.argv[2].split()
for name, change in {"cut": cut, "flipped": flip, "gone": lambda path: shutil.rmtree(path / "arrays")}.items():
    if name in wanted:
        says[name] = damaged(name, change)

# One process only: the last, at the facts, then at the arrays.
last = jax.process_count() - 1
for part in [part for part in ("read_facts", "read_arrays") if part in wanted]:
    whole = getattr(_storage, part)
    def fails(path, *rest):
        if me == last and path.name == "4":
            raise Damaged("its disk is gone")
        return whole(path, *rest)
    setattr(_storage, part, fails)
    says[part] = damaged(part, lambda path: None)
    setattr(_storage, part, whole)

with Checkpoints(run / "kept", identity={"base": "y" if me == last else "x"}) as checkpoints:
    try:
        checkpoints.restore(blank, blank)
    except ValueError as error:
        says["refused"] = str(error)
print(json.dumps(says))
"""  # noqa: E501
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "count, damages", [(2, "cut flipped gone read_facts read_arrays"), (4, "read_arrays")]
)
def test_processes(tmp_path, count, damages):
    printed = [json.loads(out.splitlines()[-1]) for out in processes.run(count, _TRAIN, tmp_path, damages)]
    expected = fingerprint(arrays(3))  # noqa: F821
    for index, said in enumerate(printed):
        assert said["fingerprint"] == said["on the other"] == said["numpy"] == expected
        assert said["kept"] == [[2, 3, 4], 2, 4]
        assert said["restored"] == [4, True, True, True]
        assert said["average"] is True
        for name in damages.split():
            step, intact, steps, aside, reasons = said[name]
            assert (step, intact, steps, aside) == (3, True, [2, 3], True), name
            assert len(reasons) == 1 and reasons[0].endswith("going on from step 3")
        own = "" if index == count - 1 else f" (process {count - 1})"
        assert said["read_arrays"][4] == [f"its disk is gone{own}; going on from step 3"]
        assert "holds a run with another base (saved: x, now: y)" in said["refused"] and said[
            "refused"
        ].endswith(f"{own or 'another directory'}.")
    # On this process, and on another mesh than either of theirs.
    where = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("only",)), PartitionSpec("only"))
    blank = {name: jax.device_put(jnp.zeros(array.shape, array.dtype), where if name != "whole" and array.shape[0] % 2 == 0 else jax.devices()[0])  # noqa: E501
             for name, array in arrays(0).items()}  # fmt: skip  # noqa: F821
    with Checkpoints(tmp_path / "kept", identity={"base": "x"}) as checkpoints:
        found = checkpoints.restore(blank, blank)
    assert (found.step, found.position) == (4, (0, 4))
    for name, array in arrays(4).items():  # noqa: F821
        assert found.delta[name].dtype == array.dtype and np.array_equal(found.delta[name], array)
    assert jax.random.bits(found.key) == jax.random.bits(jax.random.key(5))
