"""The best checkpoint, and the mean of the last ones."""

import shutil

import checkpoint_states
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_states import files_of, orbax_gives_up, state
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax.checkpoint import Checkpoints, State


two = checkpoint_states.two
collected = checkpoint_states.collected


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
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
