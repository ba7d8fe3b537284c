"""Checkpoints: everything comes back bit for bit, and another base or config is refused by name."""

import gc
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax._paths import named_leaves
from lora_jax.checkpoint import Checkpoints, State, fingerprint


def state(step=3, scale=1.0):
    delta = {"h": [{"a": scale * jnp.arange(6.0).reshape(2, 3), "b": None}, {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.zeros(())}]}
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
    [({"base": "y", "config": "c"}, "another base"), ({"base": "x", "config": "d"}, "another config"), ({"base": "x"}, "another config")],
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
        ({"h": [{"a": jnp.zeros((2, 4))}, {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.zeros(())}]}, "'h.0.a' has shape"),
        ({"h": [{"a": jnp.zeros((2, 3)), "c": jnp.ones(1)}, {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.zeros(())}]}, "'h.0.c' is missing"),
    ],
)
def test_refuses_other_arrays(tmp_path, delta, message):
    with Checkpoints(tmp_path, identity={}) as checkpoints:
        checkpoints.save(state())
        with pytest.raises(ValueError, match=message):
            checkpoints.restore(delta, state().opt_state)


def test_nothing_to_restore(tmp_path):
    with Checkpoints(tmp_path, identity={}) as checkpoints, pytest.raises(ValueError, match="holds no checkpoint"):
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


# --- damage -----------------------------------------------------------------------------------------------------------

# Orbax leaves the other reads of a damaged checkpoint unawaited.
orbax_gives_up = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* was never awaited:RuntimeWarning")


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
@pytest.mark.parametrize("change", [_cut, _flipped, lambda content, draw: None], ids=["cut short", "a bit flipped", "gone"])
def test_damage_is_known_and_the_one_before_is_taken(two, tmp_path, change):
    """Any file of the newest checkpoint: what comes back is that checkpoint, to the bit, or the one before it; never something else."""
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
    with pytest.warns(UserWarning, match="step 7 .* is damaged: its arrays do not have the checksum that they were saved with; going on from step 3"):
        found = restored(tmp_path / "run")
    same(found.delta, state(3, 1.0).delta)


@orbax_gives_up
def test_nothing_intact(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    for file in files_of(tmp_path / "run"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="holds no intact checkpoint .step 7: .*; step 3: .*take one from a copy"):
        restored(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["3", "7"], "nothing is put aside where nothing is left"


@orbax_gives_up
def test_a_step_that_is_asked_for_is_not_another(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    for file in files_of(tmp_path / "run" / "7" / "arrays"):
        file.unlink()
    with Checkpoints(tmp_path / "run", identity={"base": "x"}) as checkpoints, pytest.raises(ValueError, match="holds no intact checkpoint .step 7"):
        checkpoints.restore(state().delta, state().opt_state, step=7)
