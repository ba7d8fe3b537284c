"""Checkpoints are written beside training, and survive a full disk and a killed process."""

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import checkpoint_states
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import restored, state
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax.checkpoint import Checkpoints, State


two = checkpoint_states.two
collected = checkpoint_states.collected


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


def test_an_array_of_numpy_may_change_after_the_save(tmp_path):
    values = np.arange(1 << 22, dtype=np.float32)
    with Checkpoints(tmp_path, identity={}) as checkpoints:
        checkpoints.save(State({"a": values}, (), 1, (0, 1), jax.random.key(0)))
        values[:] = -1
        found = checkpoints.restore({"a": jnp.zeros(values.shape)}, ())
    assert np.array_equal(found.delta["a"], np.arange(1 << 22, dtype=np.float32))


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
    monkeypatch.setattr("lora_jax.checkpoint._contents.FORMAT", 3)
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
            "the earlier ones are intact, and the same command goes on from step 1."
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
        for number in range(4):
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
    assert steps[0] == 0 and len(steps) == 4 and steps == sorted(steps) and steps[-1] > 0
    assert int(said[-1].split()[1]) > 0, "none was killed in the middle of a write"
    delta = {str(number): jnp.zeros((512, 512)) for number in range(8)}
    with Checkpoints(tmp_path, identity={}) as checkpoints:
        found = checkpoints.restore(delta, ())
        assert found.step >= steps[-1] and np.array_equal(
            found.delta["3"], np.random.default_rng([found.step, 3]).random((512, 512), np.float32)
        )
        checkpoints.save(State(delta, (), 5000, (0, 0), found.key))
    assert all(path.name.isdecimal() for path in tmp_path.iterdir()), "what the killed have left is gone"
