"""Checkpoints: everything comes back bit for bit, and another base or config is refused by name."""

import checkpoint_states
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_states import same_state, state

from lora_jax.checkpoint import Checkpoints, fingerprint, State


collected = checkpoint_states.collected


def test_round_trip(tmp_path):
    saved = state()
    with Checkpoints(tmp_path / "c", identity={"base": "x"}) as checkpoints:
        assert checkpoints.latest() is None
        assert not (tmp_path / "c").exists(), "looking creates nothing"
        checkpoints.save(saved)
    blank = jax.tree.map(jnp.zeros_like, (saved.delta, saved.opt_state))
    with Checkpoints(tmp_path / "c", identity={"base": "x"}) as checkpoints:
        found = checkpoints.restore(*blank)
    same_state(found, saved)


def test_a_key_of_another_kind_comes_back_as_that(tmp_path):
    saved = state()._replace(key=jax.random.key(5, impl="rbg"))
    with Checkpoints(tmp_path, identity={}) as checkpoints:
        checkpoints.save(saved)
        same_state(checkpoints.restore(saved.delta, saved.opt_state), saved)


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


def test_refuses_arrays_of_another_optimiser(tmp_path):
    with Checkpoints(tmp_path, identity={}) as checkpoints:
        checkpoints.save(state())
        plain = optax.sgd(1e-3).init(state().delta)
        with pytest.raises(ValueError, match="opt_state .* is unexpected in the checkpoint"):
            checkpoints.restore(state().delta, plain)
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state().opt_state)
        with pytest.raises(ValueError, match=r"opt_state '0.count' has shape and dtype .*int32.*float32"):
            checkpoints.restore(state().delta, wide)


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
