"""Checkpoints: everything comes back bit for bit, and another base or config is refused by name."""

import gc
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lora_jax._paths import named_leaves
from lora_jax.checkpoint import _checksum, _storage, Checkpoints, fingerprint, NoneIntact, State


def state(step=3, scale=1.0):
    delta = {
        "h": [
            {"a": scale * jnp.arange(6.0).reshape(2, 3), "b": None},
            {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.zeros(())},
        ]
    }
    return State(delta, optax.adamw(1e-3).init(delta), step, (1, 2), jax.random.key(7))


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, one), two in zip(named_leaves(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == two.dtype and np.array_equal(one, two), path


def test_round_trip(tmp_path):
    saved = state()
    with Checkpoints(tmp_path / "c", identity={"base": "x"}) as checkpoints:
        assert checkpoints.latest() is None
        assert not (tmp_path / "c").exists(), "looking creates nothing"
        checkpoints.save(saved)
    blank = jax.tree.map(jnp.zeros_like, (saved.delta, saved.opt_state))
    with Checkpoints(tmp_path / "c", identity={"base": "x"}) as checkpoints:
        found = checkpoints.restore(*blank)
    same(found.delta, saved.delta)
    same(found.opt_state, saved.opt_state)
    assert (found.step, found.position) == (3, (1, 2))
    assert jax.random.bits(found.key) == jax.random.bits(saved.key)


def test_keeps_the_newest(tmp_path):
    with Checkpoints(tmp_path, identity={}, keep=2) as checkpoints:
        for step in (1, 2, 5):
            checkpoints.save(state(step, float(step)))
        assert checkpoints.latest() == 5
        older = checkpoints.restore(state().delta, state().opt_state, step=2)
        with pytest.raises(
            ValueError, match="`step` is 1, of which .* holds no checkpoint; of these steps it does: 2, 5"
        ):
            checkpoints.restore(state().delta, state().opt_state, step=1)
    assert older.delta["h"][0]["a"][0, 1] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "5"]


def test_restores_onto_a_mesh(tmp_path):
    """Arrays take the shardings of what is passed in, whatever they had when they were saved."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("fsdp",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    delta = {"a": jnp.arange(8.0)}
    with Checkpoints(tmp_path, identity={}) as checkpoints:
        checkpoints.save(State(delta, (), 1, (0, 1), jax.random.key(0)))
        found = checkpoints.restore({"a": jax.device_put(jnp.zeros(8), split)}, ())
    assert found.delta["a"].sharding.is_equivalent_to(split, 1)
    assert np.array_equal(found.delta["a"], delta["a"])


@pytest.mark.parametrize(
    "identity, message",
    [
        ({"base": "y", "config": "c"}, "another base"),
        ({"base": "x", "config": "d"}, "another config"),
        ({"base": "x"}, "another config"),
    ],
)
def test_refuses_another_identity(tmp_path, identity, message):
    with Checkpoints(tmp_path, identity={"base": "x", "config": "c"}) as checkpoints:
        checkpoints.save(state())
    with Checkpoints(tmp_path, identity=identity) as checkpoints, pytest.raises(ValueError, match=message):
        checkpoints.restore(state().delta, state().opt_state)


@pytest.mark.parametrize(
    "delta, message",
    [
        ({"h": [{"a": jnp.zeros((2, 3))}]}, "unexpected in the checkpoint"),
        (
            {"h": [{"a": jnp.zeros((2, 4))}, {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.zeros(())}]},
            "'h.0.a' has shape",
        ),
        (
            {
                "h": [
                    {"a": jnp.zeros((2, 3)), "c": jnp.ones(1)},
                    {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.zeros(())},
                ]
            },
            "'h.0.c' is missing",
        ),
    ],
)
def test_refuses_other_arrays(tmp_path, delta, message):
    with Checkpoints(tmp_path, identity={}) as checkpoints:
        checkpoints.save(state())
        with pytest.raises(ValueError, match=message):
            checkpoints.restore(delta, state().opt_state)


def test_nothing_to_restore(tmp_path):
    with (
        Checkpoints(tmp_path, identity={}) as checkpoints,
        pytest.raises(ValueError, match="holds no checkpoint"),
    ):
        checkpoints.restore({}, ())


def test_fingerprint_sees_everything():
    params = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.zeros(2, jnp.bfloat16)}
    others = [
        {"v": params["w"], "b": params["b"]},
        {"w": params["w"].reshape(3, 2), "b": params["b"]},
        {"w": params["w"], "b": jnp.zeros(2, jnp.float16)},
        {"w": params["w"].at[1, 2].add(1e-6), "b": params["b"]},
        {"w": params["w"]},
    ]
    assert fingerprint(params) == fingerprint(jax.tree.map(np.asarray, dict(reversed(params.items()))))
    assert len({fingerprint(params), *map(fingerprint, others)}) == 6


# --- damage -------------------------------------------------------------------------------------------------

# Orbax leaves the other reads of a damaged checkpoint unawaited.
orbax_gives_up = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* was never awaited:RuntimeWarning"
)


@pytest.fixture(autouse=True)
def _collected():
    """Here, and not in another test, which warns of it then."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A directory with the checkpoints of steps 3 and 7."""
    dir = tmp_path_factory.mktemp("checkpoints") / "two"
    with Checkpoints(dir, identity={"base": "x"}) as checkpoints:
        checkpoints.save(state(3, 1.0))
        checkpoints.save(state(7, 2.0))
    return dir


def restored(dir):
    with Checkpoints(dir, identity={"base": "x"}) as checkpoints:
        return checkpoints.restore(state().delta, state().opt_state)


def files_of(dir):
    return sorted(path for path in dir.rglob("*") if path.is_file() and path.stat().st_size)


def _cut(content, draw):
    return content[: draw.integers(0, len(content))]


def _flipped(content, draw):
    bit = int(draw.integers(0, 8 * len(content)))
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << (bit % 8)]) + content[bit // 8 + 1 :]


@orbax_gives_up
@pytest.mark.parametrize(
    "change", [_cut, _flipped, lambda content, draw: None], ids=["cut short", "a bit flipped", "gone"]
)
def test_damage_is_known_and_the_one_before_is_taken(two, tmp_path, change):
    """Any file of the newest checkpoint: what comes back is that checkpoint, to the bit, or the one
    before it; never something else.
    """
    draw, outcomes = np.random.default_rng(0), set()
    for number, file in enumerate(files_of(two / "7")):
        copied = tmp_path / str(number)
        shutil.copytree(two, copied)
        target = copied / file.relative_to(two)
        content = change(target.read_bytes(), draw)
        target.write_bytes(content) if content is not None else target.unlink()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = restored(copied)
        same(found.delta, state(found.step, {3: 1.0, 7: 2.0}[found.step]).delta)
        outcomes.add(found.step)
        messages = [str(warning.message) for warning in said if "is damaged" in str(warning.message)]
        assert len(messages) == (found.step == 3)
        if messages:
            assert "the checkpoint of step 7" in messages[0] and "going on from step 3" in messages[0]
            assert (copied / "7.damaged").is_dir() and not (copied / "7").exists()
    assert 3 in outcomes


@orbax_gives_up
def test_after_damage_the_step_can_be_saved_again(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    for file in files_of(tmp_path / "run" / "7" / "arrays"):
        file.write_bytes(file.read_bytes()[:-1])
    with Checkpoints(tmp_path / "run", identity={"base": "x"}) as checkpoints:
        with pytest.warns(UserWarning, match="step 7 .* is damaged"):
            found = checkpoints.restore(state().delta, state().opt_state)
        assert checkpoints.latest() == found.step == 3
        checkpoints.save(state(7, 5.0))
        assert checkpoints.restore(state().delta, state().opt_state).delta["h"][0]["a"][0, 1] == 5


def test_arrays_of_another_checkpoint_are_not_taken_for_its_own(two, tmp_path):
    """Whole and readable, and not what was saved with the rest: what the checksum of the values is for."""
    shutil.copytree(two, tmp_path / "run")
    with Checkpoints(tmp_path / "other", identity={"base": "x"}) as checkpoints:
        checkpoints.save(state(7, 9.0))
    shutil.rmtree(tmp_path / "run" / "7" / "arrays")
    shutil.copytree(tmp_path / "other" / "7" / "arrays", tmp_path / "run" / "7" / "arrays")
    with pytest.warns(
        UserWarning,
        match=(
            "step 7 .* is damaged: its arrays do not have the checksum that they were saved with; going on "
            "from step 3"
        ),
    ):
        found = restored(tmp_path / "run")
    same(found.delta, state(3, 1.0).delta)


@orbax_gives_up
def test_any_bit_of_what_is_noted_beside_the_arrays(two, tmp_path):
    """Of Orbax's own notes, which make arrays of the files: the state comes back to the bit, or the
    checkpoint before it does.
    """
    shutil.copytree(two, tmp_path / "run")
    file = tmp_path / "run" / "7" / "arrays" / "_METADATA"
    whole, draw = file.read_bytes(), np.random.default_rng(0)
    # What once passed for an array and was none, and some drawn.
    changed = [
        whole.replace(b"jax.Array", b"jax.Qrray"),
        *(_flipped(whole, draw.integers(len(whole)), draw.integers(8)) for _ in range(40)),
    ]
    steps = set()
    for content in changed:
        file.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = restored(tmp_path / "run")
        same(found.delta, state(found.step, {3: 1.0, 7: 2.0}[found.step]).delta)
        steps.add(found.step)
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(two, tmp_path / "run")
    assert steps == {3, 7}


def _flipped(content, place, bit):
    return content[:place] + bytes([content[place] ^ 1 << int(bit)]) + content[place + 1 :]


@orbax_gives_up
def test_the_best_that_is_intact(tmp_path):
    """The best is damaged: it is put aside, and the next best is found. Without a finite loss there is
    none.
    """
    with Checkpoints(tmp_path, identity={}, keep=4) as checkpoints:
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, float("nan"))):
            checkpoints.save(state(step, float(step)), loss)
    for file in files_of(tmp_path / "2" / "arrays"):
        file.write_bytes(b"")
    with Checkpoints(tmp_path, identity={}, keep=4) as checkpoints:
        assert checkpoints.best() == 2, "what it says of itself is not damaged"
        with pytest.warns(UserWarning, match="step 2 .* is damaged.*; going on from step 3"):
            assert checkpoints.restore(state().delta, state().opt_state, best=True).step == 3
        assert checkpoints.best() == 3 and checkpoints.steps() == [1, 3, 4]
        with pytest.warns(UserWarning):
            (tmp_path / "4" / "facts" / "metadata").write_text("")
            mean = checkpoints.average(state().delta, last=3)
        same(mean["h"][0]["a"], 2 * state().delta["h"][0]["a"])  # of steps 1 and 3
    with Checkpoints(tmp_path / "new", identity={}) as checkpoints:
        checkpoints.save(state(1), float("inf"))
        with pytest.raises(ValueError, match="no checkpoint that was saved with a finite loss"):
            checkpoints.restore(state().delta, state().opt_state, best=True)


def test_saved_in_passing(tmp_path):
    """It is gone on from, takes the place of no other, goes with the next, and is in no average."""
    with Checkpoints(tmp_path, identity={}, keep=2) as checkpoints:
        for step in (4, 8):
            checkpoints.save(state(step, float(step)))
        checkpoints.save(state(10, 10.0), temporary=True)
        assert checkpoints.steps() == [4, 8, 10] and checkpoints.steps(temporary=False) == [4, 8]
    with Checkpoints(tmp_path, identity={}, keep=2) as checkpoints:
        assert checkpoints.restore(state().delta, state().opt_state).step == 10
        same(checkpoints.average(state().delta, last=2)["h"][0]["a"], 6 * state().delta["h"][0]["a"])
        checkpoints.save(state(12, 12.0))
        assert checkpoints.steps() == [8, 12]
        same(checkpoints.average(state().delta, last=2)["h"][0]["a"], 10 * state().delta["h"][0]["a"])


@orbax_gives_up
def test_nothing_intact(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    for file in files_of(tmp_path / "run"):
        file.write_bytes(b"")
    with pytest.raises(
        NoneIntact, match="holds no intact checkpoint .step 7: .*; step 3: .*take one from a copy"
    ):
        restored(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["3", "7"], (
        "nothing is put aside where nothing is left"
    )
    with Checkpoints(tmp_path / "run", identity={"base": "x"}) as checkpoints:
        checkpoints.put_aside()
        checkpoints.save(state(3))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["3", "3.damaged", "7.damaged"]


def test_what_is_no_damage_of_the_files(two, tmp_path, monkeypatch):
    """Too little memory, or no permission: nothing is put aside for it."""
    shutil.copytree(two, tmp_path / "run")
    for error in (
        MemoryError("none left"),
        PermissionError(13, "not yours"),
        OSError(5, "the cable"),
        RuntimeError("RESOURCE_EXHAUSTED: 3 GB"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(_storage, "_read", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
            with pytest.raises(type(error), match=re.escape(str(error))):
                restored(tmp_path / "run")
    assert (
        sorted(path.name for path in (tmp_path / "run").iterdir()) == ["3", "7"]
        and restored(tmp_path / "run").step == 7
    )


@orbax_gives_up
def test_a_step_that_is_asked_for_is_not_another(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    for file in files_of(tmp_path / "run" / "7" / "arrays"):
        file.unlink()
    with (
        Checkpoints(tmp_path / "run", identity={"base": "x"}) as checkpoints,
        pytest.raises(ValueError, match="holds no intact checkpoint .step 7"),
    ):
        checkpoints.restore(state().delta, state().opt_state, step=7)


# --- the checksum -------------------------------------------------------------------------------------------

_DTYPES = "bool int2 uint4 int4 int8 uint8 int16 int32 uint32 float8_e4m3fn float8_e5m2 float4_e2m1fn float16 bfloat16 float32 complex64".split()  # noqa: E501


def some(dtype, shape=(16, 8)):
    """Values of any dtype, some of which differ."""
    return np.random.default_rng(0).integers(0, 2, shape).astype(jnp.dtype(dtype))


def sums(leaf):
    return tuple(np.asarray(_checksum.checksum(leaf)).tolist())


@pytest.mark.parametrize("dtype", _DTYPES)
def test_checksum_is_the_same_wherever_the_array_is(dtype):
    """NumPy, one device, and every way to lie on two meshes, one of which has its shardings in the types."""
    array = some(dtype)
    devices = np.array(jax.devices()[:8]).reshape(2, 4)
    meshes = [
        Mesh(devices, ("a", "b")),
        Mesh(devices, ("a", "b"), axis_types=(AxisType.Explicit, AxisType.Explicit)),
    ]
    specs = [
        PartitionSpec(),
        PartitionSpec("a"),
        PartitionSpec("b", "a"),
        PartitionSpec(None, "b"),
        PartitionSpec(("a", "b")),
    ]
    expected = sums(array)
    assert sums(jnp.asarray(array)) == expected
    # Each sharding compiles anew: every one for two dtypes, for the others the last.
    for mesh, spec in [(mesh, spec) for mesh in meshes for spec in specs][
        0 if dtype in ("float32", "int4") else -1 :
    ]:
        found = _checksum.checksum(jax.device_put(array, NamedSharding(mesh, spec)))
        assert tuple(np.asarray(found).tolist()) == expected, (mesh, spec)
        assert found.sharding.is_fully_replicated


@pytest.mark.parametrize("dtype", ["float64", "int64", "complex128"])
def test_checksum_of_64_bits_is_the_same_with_and_without_them(dtype):
    array = some(dtype) + np.array(1, dtype) / 3 if dtype != "int64" else some(dtype) << 40
    with jax.enable_x64(True):
        expected = sums(jnp.asarray(array))
    assert sums(array) == expected
    assert sums(array.astype(array.dtype.newbyteorder(">"))) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "float8_e4m3fn"])
def test_any_word_that_changes_changes_every_sum(dtype):
    """Not only probably: for a fixed index the mixing is a bijection of the word."""
    draw = np.random.default_rng(1)
    array = (
        draw.integers(0, 2, 1000).astype(bool)
        if dtype == "bool"
        else np.frombuffer(draw.bytes(1000 * jnp.dtype(dtype).itemsize), jnp.dtype(dtype))
    )
    before = sums(array)
    for position in draw.integers(0, 1000, 50):
        other = array.copy()
        if dtype == "bool":
            other[position] ^= True
        else:
            other.view(np.uint8)[position * array.itemsize + draw.integers(array.itemsize)] ^= (
                1 << draw.integers(8)
            )
        assert all(one != two for one, two in zip(before, sums(other), strict=True)), position


def test_mixing_is_a_bijection_of_the_word():
    """On words that its shifts would bring together if a multiplication lost a bit; odd factors lose none."""
    half = np.arange(1 << 16, dtype=np.uint32)
    words = np.unique(np.r_[half, half << 16, half * 0x10001, half * 0x8001])
    for lane in _checksum._LANES:
        assert all(factor % 2 for factor in lane[2:4])
        mixed = _checksum._mix(
            jnp.asarray(words), jnp.uint32(12345), jnp.uint32(6), *(jnp.uint32(constant) for constant in lane)
        )
        assert np.unique(np.asarray(mixed)).size == words.size


def test_checksum_sees_order_and_zeros():
    array = np.arange(64, dtype=np.float32)
    moved = [
        array[::-1],
        np.roll(array, 1),
        np.r_[array[1], array[0], array[2:]],
        np.r_[array, np.float32(0)],
        -0.0 * array,
        0.0 * array,
    ]
    assert len({sums(array), *map(sums, moved)}) == 7


def test_checksum_of_chunks(monkeypatch):
    """A memory map goes through the device in pieces, of which none knows the others."""
    array = np.random.default_rng(0).normal(size=(37, 11)).astype(np.float32)
    whole, wide = sums(array), sums(array.astype(np.float64))
    monkeypatch.setattr(_checksum, "_CHUNK", 100)
    assert (sums(array), sums(array.astype(np.float64))) == (whole, wide)


def test_checksum_beyond_32_bits_of_index():
    """Of arrays that no machine here holds: the index is that of Python's integers, in two words."""
    draw = np.random.default_rng(0)
    for shape in [(1 << 20, 1 << 20), (3, (1 << 32) - 1), (12345, 678, 91011, 7), ((1 << 31) + 5, 6, 7)]:
        places = [[int(draw.integers(size)) for size in shape] for _ in range(200)] + [
            [size - 1 for size in shape]
        ]
        low, high = _checksum.flat_index(
            [jnp.array(column, jnp.uint32) for column in zip(*places, strict=True)], shape
        )
        for place, one, two in zip(places, np.asarray(low).tolist(), np.asarray(high).tolist(), strict=True):
            assert one + (two << 32) == sum(
                c * int(np.prod(shape[axis + 1 :], dtype=object)) for axis, c in enumerate(place)
            )
    # A chunk that begins beyond 2**32, and one that crosses it.
    begin = (1 << 32) - 5
    crossing = np.arange(10, dtype=np.uint32)
    pieces = [
        _checksum._sums(
            jnp.asarray(crossing[start:stop]),
            jnp.uint32((begin + start) & 0xFFFFFFFF),
            jnp.uint32((begin + start) >> 32),
        )
        for start, stop in ((0, 10), (0, 5), (5, 10))
    ]
    assert np.array_equal(pieces[0], pieces[1] + pieces[2])
    assert not np.array_equal(
        pieces[2], _checksum._sums(jnp.asarray(crossing[5:]), jnp.uint32(0), jnp.uint32(0))
    ), "the high word counts"


def test_fingerprint_compiles_once_for_each_shape():
    params = {str(number): jnp.full((5, 3), float(number)) for number in range(6)}
    before = _checksum._on(None)._cache_size()
    fingerprint(params)
    fingerprint(params)
    assert _checksum._on(None)._cache_size() == before + 1


# --- saving goes on beside training -------------------------------------------------------------------------


def advance(tree):
    return jax.tree.map(lambda leaf: leaf + jnp.ones((), leaf.dtype), tree)


def test_what_is_written_is_the_state_at_the_save(tmp_path):
    """The next step takes the buffers, and writes over them, while they are being saved; and it does get
    them.
    """
    devices = Mesh(np.array(jax.devices()[:2]), ("d",))
    placed = [
        NamedSharding(devices, PartitionSpec("d")),
        NamedSharding(devices, PartitionSpec()),
        jax.devices()[0],
    ]
    step = jax.jit(advance, donate_argnums=0)
    delta = {
        str(number): jax.device_put(jnp.full((1024, 512), float(number)), where)
        for number, where in enumerate(placed)
    }
    with Checkpoints(tmp_path, identity={}, keep=4) as checkpoints:
        for done in range(1, 5):
            checkpoints.save(State(delta, (), done, (0, done), jax.random.key(0)))
            before = delta
            for _ in range(5):
                delta = {name: step(leaf) for name, leaf in delta.items()}
            assert all(leaf.is_deleted() for leaf in before.values()), (
                "saving keeps the step from its donation"
            )
        for done in range(1, 5):
            found = checkpoints.restore(delta, (), step=done)
            for number, leaf in enumerate(found.delta.values()):
                assert np.array_equal(leaf, np.full((1024, 512), number + 5.0 * (done - 1)))


def test_save_returns_before_the_checkpoint_is_complete(tmp_path, monkeypatch):
    go_on, rename = threading.Event(), os.rename
    monkeypatch.setattr(
        os, "rename", lambda *paths, **options: (go_on.wait(60), rename(*paths, **options))[1]
    )
    with Checkpoints(tmp_path, identity={}) as checkpoints:
        checkpoints.save(state(1))
        assert not (tmp_path / "1").exists()
        go_on.set()
        checkpoints.wait()
        assert (tmp_path / "1").is_dir()
        assert checkpoints.steps() == [1]


def test_a_step_is_not_saved_twice(tmp_path):
    with Checkpoints(tmp_path, identity={}) as checkpoints:
        checkpoints.save(state(1, 1.0))
        with pytest.raises(ValueError, match="holds a checkpoint of step 1 already"):
            checkpoints.save(state(1, 2.0))
        assert checkpoints.restore(state().delta, state().opt_state).delta["h"][0]["a"][0, 1] == 1


def test_checkpoints_of_an_older_format_are_refused(two, tmp_path, monkeypatch):
    """Not taken for damaged ones, which would be put aside."""
    monkeypatch.setattr("lora_jax.checkpoint._checkpoints._FORMAT", 3)
    with pytest.raises(
        ValueError, match="checkpoints of format 2, .* reads 3: resume the run with the version"
    ):
        restored(two)
    assert sorted(path.name for path in two.iterdir()) == ["3", "7"]


def in_a_process(script, *arguments):
    """What `script` prints, run by a Python of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


@pytest.mark.slow
def test_a_full_disk(tmp_path):
    """Really refused by the system, through a limit on the size of files: a line that says what to do,
    and nothing else is lost.
    """
    said = in_a_process(
        """
        import resource, sys, jax, numpy as np
        from lora_jax.checkpoint import Checkpoints, State
        delta = {"a": jax.numpy.asarray(np.random.default_rng(0).normal(size=1 << 20).astype(np.float32))}
        checkpoints = Checkpoints(sys.argv[1], identity={})
        checkpoints.save(State(delta, (), 1, (0, 1), jax.random.key(0)))
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
        for after in (checkpoints.wait, lambda: checkpoints.save(State(delta, (), 3, (0, 3), jax.random.key(0))), checkpoints.__exit__):
            try:
                checkpoints.save(State(delta, (), 2, (0, 2), jax.random.key(0)))
                after() if after != checkpoints.__exit__ else after(None)
            except OSError as error:
                print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(checkpoints.steps(), checkpoints.restore(delta, ()).step)
        """,  # noqa: E501
        tmp_path / "run",
    )
    assert len(said) == 4 and said[3] == "[1] 1"
    for line in said[:3]:
        assert line == (
            f"the checkpoint of step 2 could not be written to `{tmp_path / 'run'}`: File too large. Free "
            "space, or mend that; "
            "the earlier ones are intact, and the same command goes on from step 1"
        )
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["1"], "what the writes left is gone"
    blank = {"a": jnp.zeros(1 << 20)}
    with Checkpoints(tmp_path / "run", identity={}) as checkpoints:
        found = checkpoints.restore(blank, ())
        assert found.step == 1
        checkpoints.save(State(found.delta, (), 2, (0, 2), found.key))
        assert checkpoints.restore(blank, ()).step == 2


@pytest.mark.slow
def test_killed_while_saving(tmp_path):
    """SIGKILL at varied moments: every process that comes after finds an intact state, to the bit, and
    nothing damaged.
    """
    said = in_a_process(
        """
        import os, signal, sys, time, warnings, jax, numpy as np
        from lora_jax.checkpoint import Checkpoints, State
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)

        def train(begun):
            # Random, so that nothing compresses and writing takes a while.
            value = lambda step: {str(n): jax.numpy.asarray(np.random.default_rng([step, n]).random((512, 512), np.float32)) for n in range(8)}
            with Checkpoints(sys.argv[1], identity={}) as checkpoints:
                done = 0
                if checkpoints.latest() is not None:
                    found = checkpoints.restore(value(0), ())
                    done = found.step
                    assert all(np.array_equal(found.delta[n], leaf) for n, leaf in value(done).items()), done
                print("restored", done, flush=True)
                for number, done in enumerate(range(done + 1, done + 1000)):
                    checkpoints.save(State(value(done), (), done, (0, done), jax.random.key(0)))
                    if number > 0:  # the first one compiles
                        os.write(begun, b"x")

        # Forked before JAX has a backend, and so threads: to import it all again for each would take most of the time.
        unfinished = 0
        for number in range(6):
            reads, writes = os.pipe()
            child = os.fork()
            if child == 0:
                train(writes)
                os._exit(1)
            os.close(writes)
            assert os.read(reads, 1) == b"x"
            if number % 2:  # in the middle of a write, however fast or slow the machine is
                end = time.monotonic() + 20
                while all(name.isdecimal() for name in os.listdir(sys.argv[1])) and time.monotonic() < end:
                    time.sleep(0.001)
            else:
                time.sleep(0.02 * number)
            os.kill(child, signal.SIGKILL)
            assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
            unfinished += any(not name.isdecimal() for name in os.listdir(sys.argv[1]))
        print("unfinished", unfinished)
        """,  # noqa: E501
        tmp_path,
    )
    steps = [int(line.split()[1]) for line in said if line.startswith("restored")]
    assert steps[0] == 0 and len(steps) == 6 and steps == sorted(steps) and steps[-1] > 0
    assert int(said[-1].split()[1]) > 0, "none was killed in the middle of a write"
    delta = {str(number): jnp.zeros((512, 512)) for number in range(8)}
    with Checkpoints(tmp_path, identity={}) as checkpoints:
        found = checkpoints.restore(delta, ())
        assert found.step >= steps[-1] and np.array_equal(
            found.delta["3"], np.random.default_rng([found.step, 3]).random((512, 512), np.float32)
        )
        checkpoints.save(State(delta, (), 5000, (0, 0), found.key))
    assert all(path.name.isdecimal() for path in tmp_path.iterdir()), "what the killed have left is gone"


# --- the best, and the mean of the last ---------------------------------------------------------------------


def test_keeps_the_best_beside_the_newest(tmp_path):
    """Also after a restart, which knows the losses from the files alone."""
    losses = {1: 3.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: float("-inf"), 6: None, 7: 1.0}
    for step, loss in losses.items():
        with Checkpoints(tmp_path, identity={}, keep=2, keep_best=True) as checkpoints:
            checkpoints.save(state(step, float(step)), loss)
            assert checkpoints.best() == (1 if step == 1 else 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "6", "7"]
    with Checkpoints(tmp_path, identity={}, keep=2, keep_best=True) as checkpoints:
        assert (
            checkpoints.restore(state().delta, state().opt_state, step=checkpoints.best()).delta["h"][0]["a"][
                0, 1
            ]
            == 2
        )
        checkpoints.save(state(8, 8.0), np.float32(0.5))
        assert (checkpoints.best(), checkpoints.latest()) == (8, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["7", "8"], (
        "the one that was best is kept no longer"
    )


def test_no_best_without_a_loss(tmp_path):
    with Checkpoints(tmp_path / "c", identity={}, keep=1, keep_best=True) as checkpoints:
        assert checkpoints.best() is None
        for step in (1, 2):
            checkpoints.save(state(step), float("nan"))
        assert checkpoints.best() is None
        assert checkpoints.steps() == [2]


def test_a_best_one_whose_facts_are_damaged_is_none(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    with Checkpoints(tmp_path / "run", identity={"base": "x"}, keep=4) as checkpoints:
        checkpoints.save(state(8), 2.0)
        checkpoints.save(state(9), 1.0)
    for file in files_of(tmp_path / "run" / "9" / "facts"):
        file.write_bytes(file.read_bytes()[:-1])
    with Checkpoints(tmp_path / "run", identity={"base": "x"}) as checkpoints:
        assert checkpoints.best() == 8


def test_at_least_one_is_kept(tmp_path):
    with pytest.raises(ValueError, match="`keep` is 0: at least the newest"):
        Checkpoints(tmp_path, identity={}, keep=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_average_is_numpys_mean(tmp_path, dtype, x64):
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    split = NamedSharding(mesh, PartitionSpec("d"))
    draw = np.random.default_rng(0)
    values = {step: draw.normal(size=(4, 3)).astype(jnp.dtype(dtype)) for step in range(1, 5)}

    def delta(step):
        return {"w": jax.device_put(values[step], split), "count": jnp.array([step, 10 * step], jnp.int32)}

    with Checkpoints(tmp_path, identity={}, keep=3) as checkpoints:
        for step in values:
            checkpoints.save(
                State(
                    delta(step),
                    optax.sgd(0.1, momentum=0.9).init(delta(step)["w"]),
                    step,
                    (0, 0),
                    jax.random.key(0),
                )
            )
        found = checkpoints.average(jax.tree.map(jnp.zeros_like, delta(1)), last=3)
        newest = checkpoints.average(delta(1), last=1)
        with pytest.raises(
            ValueError,
            match=(
                r"`last` is 4, and .* holds 3 intact checkpoints: .*`Checkpoints\(..., keep=4\)` or more, "
                r"which is 3"
            ),
        ):
            checkpoints.average(delta(1), last=4)
        with pytest.raises(ValueError, match="`last` is 0"):
            checkpoints.average(delta(1), last=0)
    wide = np.promote_types(jnp.dtype(dtype), np.float32)
    expected = np.mean([values[step].astype(wide) for step in (2, 3, 4)], axis=0, dtype=wide).astype(
        values[1].dtype
    )
    assert found["w"].dtype == expected.dtype and found["w"].sharding == split
    if wide == dtype:  # NumPy may add in another order
        np.testing.assert_allclose(found["w"], expected, rtol=0, atol=8 * np.finfo(dtype).eps)
    else:
        assert np.array_equal(found["w"], expected), "sums that are not wide are off in the last places"
    assert found["count"].tolist() == [4, 40]
    assert np.array_equal(newest["w"], values[4])


@orbax_gives_up
def test_the_average_passes_over_a_damaged_one(tmp_path):
    with Checkpoints(tmp_path, identity={}, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(state(step, float(step)))
        checkpoints.wait()
        for file in files_of(tmp_path / "2" / "arrays"):
            file.write_bytes(file.read_bytes()[:-1])
        with pytest.warns(UserWarning, match="step 2 .* is damaged"):
            found = checkpoints.average(state().delta, last=2)
        assert found["h"][0]["a"][0, 1] == 2 and found["h"][1]["a"].dtype == jnp.bfloat16
        assert found["h"][0]["b"] is None
        assert checkpoints.steps() == [1, 3]
