"""One run on several processes with real collectives: what one process computes, each file written once,
and nothing lost when one of them ends.
"""

import json
import re
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import processes
import pytest
import small_base
import training
from runs import without_java as without_java
from safetensors.numpy import load_file
from training import optax_promotes as optax_promotes

from benchmarks.ports import free_port, is_free
from experiments.command_line import main
from experiments.config import Mesh
from experiments.training import sharded


CONFIG = {
    "name": "several",
    "source": {"paper": None, "note": "a test"},
    "generate": {"seed": 0, "meanings": 12, "held_out": 4, "references": 2},
    "base": {"architecture": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 160}},
    "data": {"task": "e2e", "train": "train.txt", "valid": "valid.txt", "test": "test.txt", "seq_len": 144},
    "method": {"name": "LoRA", "rank": 2, "alpha": 4, "dropout": 0.1},
    "targets": ["attn/c_attn/kernel"],
    "train": {
        "steps": 14,
        "batch": 8,
        "accumulate": 2,
        "lr": 0.01,
        "log_every": 1,
        "eval_every": 7,
        "eval_batches": 2,
        "checkpoint_every": 5,
    },
    "mesh": {"data": 2, "fsdp": 2},
    "decode": {"max_tokens": 4, "prompts": 4, "shown": 1},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The config, and the run of one process on four devices, `one`."""
    root = tmp_path_factory.mktemp("several")
    tree = {**CONFIG, "base": {**CONFIG["base"], "tokenizer": str(small_base.TOKENIZER)}}
    (root / "config.json").write_text(json.dumps(tree))
    assert main(["run", str(root / "config.json"), "--workdir", str(root / "one")]) == 0
    return root


def command(root, workdir, *more, end="none", step=0):
    words = [sys.executable, str(Path(__file__).with_name("ending.py")), end, str(step)]
    return [*words, "run", str(root / "config.json"), "--workdir", str(root / workdir), *more]


def start(root, workdir, **how):
    """The same command line, but for its last word, in each of two processes. The second may end itself."""
    told = ["--coordinator", f"localhost:{free_port()}", "--num-processes", "2", "--process-id"]
    commands = [command(root, workdir, *told, "0"), command(root, workdir, *told, "1", **how)]
    return processes.start(commands, devices=2)


def succeed(started):
    ended = processes.finish(started)
    assert [code for code, _, _ in ended] == [0] * len(started), ended
    return [out for _, out, _ in ended]


def steps_of(directory):
    file = directory / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [{name: value for name, value in line.items() if name != "seconds_per_step"} for line in lines]


def assert_alike(directory, other):
    """The numbers of every step, to float32 rounding; tokens and rates, and so the examples of each step,
    exactly.
    """
    ours, theirs = steps_of(directory), steps_of(other)
    assert [(line["step"], line.get("tokens"), line.get("lr")) for line in ours] == [
        (line["step"], line.get("tokens"), line.get("lr")) for line in theirs
    ]
    for name in ("loss", "valid_loss", "gradient_norm"):
        found, expected = ([line[name] for line in lines if name in line] for lines in (ours, theirs))
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=name)
    for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        found, expected = load_file(directory / name), load_file(other / name)
        assert found.keys() == expected.keys()
        for key in found:
            np.testing.assert_allclose(found[key], expected[key], atol=2e-6, err_msg=key)
    assert (directory / "predictions.txt").read_text() == (other / "predictions.txt").read_text()


@pytest.fixture(scope="module")
def two(root):
    """The run of two processes with two devices each, and what they printed. SLURM started them: nothing
    on the command line says that there are two.
    """
    job = next(job for job in range(1, 4096) if is_free(61440 + job))  # the port that JAX makes of it
    every = {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_LOCALID": "0",
    }
    tasks = [{**every, "SLURM_PROCID": str(index)} for index in range(2)]
    return root / "two", succeed(
        [processes.start([command(root, "two")], devices=2, environment=task)[0] for task in tasks]
    )


@pytest.mark.slow
def test_two_processes_do_what_one_does(root, two):
    directory, (first, second) = two
    assert_alike(directory, root / "one")
    names = lambda directory: sorted(
        str(path.relative_to(directory)) for path in directory.rglob("*") if "checkpoints" not in path.parts
    )
    assert names(directory) == names(root / "one"), "each file is there, and nothing else"
    assert "2 processes with 4 devices" in first and "finished, see" in first
    # Gloo's threads write their lines piece by piece, and so into one another's.
    pieces = (
        r"\[Gloo\] Rank |\d+| is connected to | peer ranks\. |Expected number of connected peer ranks is : "
        r"|\s"
    )
    assert not re.sub(pieces, "", second), "one of them speaks"


@pytest.mark.slow
def test_killed_and_asked_to_stop_it_ends_bit_for_bit(root, two):
    """One process is killed: the other does not hang. One is told to stop: both stop after the same step,
    saved. Then it ends as if nothing had been.
    """
    stopped = root / "stopped"
    codes = [
        code for code, _, _ in processes.finish(start(root, "stopped", end="killed", step=8), timeout=180)
    ]
    assert codes[0] != 0 and codes[1] == -signal.SIGKILL
    first, _ = succeed(start(root, "stopped", end="told", step=7))
    assert "resuming after step 5" in first and "as asked, and saved" in first
    last = max(line["step"] for line in steps_of(stopped))
    assert 7 <= last < CONFIG["train"]["steps"] and (stopped / "checkpoints" / str(last)).is_dir()

    assert f"resuming after step {last}" in succeed(start(root, "stopped"))[0]
    assert steps_of(stopped) == steps_of(two[0]), "each step is told once, with the same digits"
    for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors", "predictions.txt"):
        assert (stopped / name).read_bytes() == (two[0] / name).read_bytes(), name


@pytest.mark.slow
def test_four_processes_train_what_one_does_and_learn_what_one_finds(tmp_path):
    """Three steps on a mesh of 2 x 2 x 2, of which each process has two devices: every batch, loss and
    adapter is that of one process with eight. Then values, errors, SIGTERM, a directory that is not shared.
    """
    script = """
    import json, os, pathlib, signal, time
    sys.path.insert(0, sys.argv.pop(1))
    jax.config.update("jax_numpy_rank_promotion", "raise")
    from experiments.config import Mesh
    from experiments.running import processes
    from experiments.running.preemption import StopRequest
    from lora_jax.processes import Elsewhere, on_first, on_host
    from training import config, examples, steps

    settings = config(mesh=Mesh(2, 2, 2), accumulate=2)
    ran = steps(settings)
    batch = ran.trainer.device_batch(examples(), np.arange(8), 2)
    rows = {shard.data.shape[1] for array in batch.values() for shard in array.addressable_shards}
    trained = {
        "batch": {name: on_host(array).tolist() for name, array in batch.items()},
        "rows": sorted(rows),
        "losses": ran.losses,
        "delta": [on_host(leaf).tolist() for leaf in jax.tree.leaves(ran.state.delta)],
    }

    index, (shared, own) = jax.process_index(), map(pathlib.Path, sys.argv[1:])
    learnt = {"value": on_first(lambda: {"index": jax.process_index(), "text": "x" * 100})}
    learnt["first"] = processes.first()
    def fail():
        raise FileNotFoundError("no such thing")
    try:
        on_first(fail)
    except Exception as error:
        elsewhere = isinstance(error, Elsewhere) and error.process
        learnt["error"] = [elsewhere, isinstance(error, OSError), str(error)]
    processes.check_shared(shared)
    learnt["left"] = [path.name for path in shared.iterdir()]
    on_first(lambda: None)
    with StopRequest() as asked:  # the signal comes before the first step, whatever its number
        if index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(3)
        on_first(lambda: None)
        learnt["asked"] = [asked() for _ in range(3)]
    processes.VISIBLE = 0.1
    try:
        processes.check_shared(own / str(index))
    except ValueError as error:
        learnt["not shared"] = str(error)
    print("found", json.dumps([trained, learnt]))
    """
    arguments = (Path(__file__).parent, tmp_path / "shared", tmp_path / "own")
    texts = processes.run(4, script, *map(str, arguments))
    trained, learnt = zip(*(json.loads(text.split("found ", 1)[1]) for text in texts), strict=True)

    alone = training.steps(training.config(mesh=Mesh(2, 2, 2), accumulate=2))
    expected = training.examples().batch(np.arange(8))
    for each in trained:
        assert each["rows"] == [1], "a fourth of the four examples of a part"
        for name, array in expected.items():
            np.testing.assert_array_equal(np.reshape(each["batch"][name], array.shape), array)
        np.testing.assert_allclose(each["losses"], alone.losses, rtol=1e-6)
        for leaf, other in zip(each["delta"], jax.tree.leaves(alone.state.delta), strict=True):
            np.testing.assert_allclose(leaf, other, atol=1e-6)

    first, *others = learnt
    assert [each.pop("first") for each in learnt] == [True, False, False, False]
    assert first.pop("error") == [False, True, "no such thing"]
    for each in others:
        assert each.pop("error") == [0, True, "no such thing (process 0)"]
    for each in learnt:
        assert "process 0 writes there, and process 1 does not see it" in each.pop("not shared")
        said = {"index": 0, "text": "x" * 100}
        assert each == {"value": said, "left": [], "asked": [True, False, False]}


@pytest.mark.slow
def test_an_error_ends_all(root, tmp_path):
    """One that only the first meets, at the directory: each process ends with a failure, and the first
    says why.
    """
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("chapter one")
    ended = processes.finish(start(root, tmp_path / "other"))
    assert [code for code, _, _ in ended] == [1, 1], ended
    assert "is not empty and holds no run" in ended[0][2] and "error:" not in ended[1][2]
    assert "Traceback" not in ended[1][2], "it was told what happened, and nothing is wrong with it"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--coordinator", "localhost:1234"], "go together; missing: --num-processes"),
        (["--no-distributed", "--process-id", "1"], "`--no-distributed` goes without"),
    ],
)
def test_half_of_what_several_processes_need(tmp_path, capsys, words, message):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert main(["run", str(tmp_path / "config.json"), "--workdir", str(tmp_path / "none"), *words]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_an_mpirun_of_which_jax_learns_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "4")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert main(["run", str(tmp_path / "config.json"), "--workdir", str(tmp_path / "none")]) == 1
    assert "pass --coordinator HOST:PORT" in capsys.readouterr().err


def test_an_idle_process(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(
        ValueError,
        match=r"takes 2 devices, and the 2 processes have 8, of which none may be idle: set `mesh.data` to 4",
    ):
        sharded.make_mesh(Mesh(1, 2, 1))


@pytest.mark.slow
def test_nothing_says_which_processes_there_are(root):
    ended = processes.finish(processes.start([command(root, "none", "--distributed")]))
    assert ended[0][0] == 1 and "`--distributed`: nothing here says which processes there are" in ended[0][2]
    assert "start them with srun or mpirun, or pass --coordinator HOST:PORT" in ended[0][2]
