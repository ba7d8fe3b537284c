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
    return State(delta, optax.adamw(1e-3).init(delta), step, (1, 2), jax.random.key(7))


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
        checkpoints.save(state(3, 1.0))
        checkpoints.save(state(7, 2.0))
    return dir


def restored(dir):
    with Checkpoints(dir, identity={"base": "x"}) as checkpoints:
        return checkpoints.restore(state().delta, state().opt_state)


def files_of(dir):
    return sorted(path for path in dir.rglob("*") if path.is_file() and path.stat().st_size)
