"""A state to save, and a directory with two checkpoints, for the tests of checkpoints."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax._paths import named_leaves
from lora_jax.checkpoint import Checkpoints, State


def state(step=3, scale=1.0):
    delta = {
        "h": [
            {"a": scale * jnp.arange(6.0).reshape(2, 3), "b": None},
            {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.zeros(())},
        ]
    }
    # Nothing in it is as another step has it, the optimiser's moments included.
    moments = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(step + scale, leaf.dtype), optax.adamw(1e-3).init(delta)
    )
    return State(delta, moments, step, (step + 1, 2 * step), jax.random.key(step))


def same_state(found, expected):
    """All five parts, to the bit."""
    same(found.delta, expected.delta)
    same(found.opt_state, expected.opt_state)
    assert (found.step, found.position) == (expected.step, expected.position)
    assert found.key.dtype == expected.key.dtype
    assert np.array_equal(jax.random.key_data(found.key), jax.random.key_data(expected.key))


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, one), two in zip(named_leaves(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == two.dtype and np.array_equal(one, two), path


# Orbax leaves the other reads of a damaged checkpoint unawaited.
orbax_gives_up = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* was never awaited:RuntimeWarning"
)


@pytest.fixture(autouse=True)
def collected():
    """Here, and not in another test, which warns of it then."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A directory with the checkpoints of steps 3 and 7."""
    dir = tmp_path_factory.mktemp("checkpoints") / "two"
    with Checkpoints(dir, identity={"base": "x"}) as checkpoints:
        for step, scale in SCALES.items():
            checkpoints.save(state(step, scale))
    return dir


SCALES = {3: 1.0, 7: 2.0}


def intact(found):
    """That a state restored from `two` is one of those saved there."""
    same_state(found, state(found.step, SCALES[found.step]))


def restored(dir):
    with Checkpoints(dir, identity={"base": "x"}) as checkpoints:
        return checkpoints.restore(state().delta, state().opt_state)


def files_of(dir):
    return sorted(path for path in dir.rglob("*") if path.is_file() and path.stat().st_size)
