"""One run on several processes with real collectives: what one process computes, each file written once,
and nothing lost when one of them ends.
"""

import json
import os
import re
import signal
import sys
import time

import jax
import numpy as np
import processes
import pytest
import training
from safetensors.numpy import load_file
from training import optax_promotes as optax_promotes

from benchmarks.ports import free_port, is_free
from experiments import train
from experiments.command_line import main
from experiments.config import Mesh


CONFIG = {
    "name": "several",
    "source": {"paper": None, "note": "a test"},
    "generate": {"seed": 0, "meanings": 12, "held_out": 4, "references": 2},
    "base": {"architecture": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 160}},
    "data": {"task": "e2e", "train": "train.txt", "valid": "valid.txt", "test": "test.txt", "seq_len": 144},
    "method": {"name": "LoRA", "rank": 2, "alpha": 4, "dropout": 0.1},
    "targets": ["attn/c_attn/kernel"],
    "train": {
        "steps": 120,
        "batch": 8,
        "accumulate": 2,
        "lr": 0.01,
        "log_every": 1,
        "eval_every": 60,
        "eval_batches": 2,
        "checkpoint_every": 7,
    },
    "mesh": {"data": 2, "fsdp": 2},
    "decode": {"max_tokens": 4, "prompts": 4, "shown": 1},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The config, and the run of one process on four devices, `one`."""
    root = tmp_path_factory.mktemp("several")
    words = processes.REPOSITORY / "experiments" / "bases" / "small"
    tree = {**CONFIG, "base": {**CONFIG["base"], "tokenizer": str(words)}}
    (root / "config.json").write_text(json.dumps(tree))
    assert main(["run", str(root / "config.json"), "--workdir", str(root / "one")]) == 0
    return root


def command(root, workdir, *more):
    return [
        sys.executable,
        "-m",
        "experiments",
        "run",
        str(root / "config.json"),
        "--workdir",
        str(root / workdir),
        *more,
    ]


def start(root, workdir, *more, count=2):
    """The same command line, but for its last word, in each of `count` processes."""
    told = ["--coordinator", f"localhost:{free_port()}", "--num-processes", str(count), "--process-id"]
    return processes.start(
        [command(root, workdir, *more, *told, str(index)) for index in range(count)], devices=4 // count
    )


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


def wait_for(directory, step, started):
    wait_until(lambda: any(line["step"] >= step for line in steps_of(directory)), started)


def wait_until(condition, started):
    end = time.monotonic() + processes.TIMEOUT
    while not condition():
        assert all(process.poll() is None for process in started), processes.finish(started)
        assert time.monotonic() < end
        time.sleep(0.01)


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
def test_four_processes_train_what_one_does():
    """Three steps on a mesh of 2 x 2 x 2, of which each process has two devices: every batch, loss and
    adapter is that of one process with eight.
    """
    script = """
    import json
    sys.path.insert(0, sys.argv[1])
    jax.config.update("jax_numpy_rank_promotion", "raise")
    from experiments.config import Mesh
    from experiments.processes import whole
    from training import config, examples, started, steps

    settings = config(mesh=Mesh(2, 2, 2), accumulate=2)
    trainer, _ = started(settings)
    batch = trainer.device_batch(examples(), np.arange(8), 2)
    rows = {shard.data.shape[1] for array in batch.values() for shard in array.addressable_shards}
    losses, state, _ = steps(settings)
    found = {"batch": {name: whole(array).tolist() for name, array in batch.items()}, "rows": sorted(rows), "losses": losses}
    print("found", json.dumps({**found, "delta": [whole(leaf).tolist() for leaf in jax.tree.leaves(state.delta)]}))
    """  # noqa: E501
    found = [
        json.loads(text.split("found ", 1)[1])
        for text in processes.run(4, script, processes.REPOSITORY / "tests")
    ]
    settings = training.config(mesh=Mesh(2, 2, 2), accumulate=2)
    losses, state, _ = training.steps(settings)
    expected = training.examples().batch(np.arange(8))
    for each in found:
        assert each["rows"] == [1], "a fourth of the four examples of a part"
        for name, array in expected.items():
            np.testing.assert_array_equal(np.reshape(each["batch"][name], array.shape), array)
        np.testing.assert_allclose(each["losses"], losses, rtol=1e-6)
        for leaf, other in zip(each["delta"], jax.tree.leaves(state.delta), strict=True):
            np.testing.assert_allclose(leaf, other, atol=1e-6)


@pytest.mark.slow
def test_killed_and_asked_to_stop_it_ends_bit_for_bit(root, two):
    """One process is killed: the other does not hang. One is told to stop: both stop after the same step,
    saved. Then it ends as if nothing had been.
    """
    started = start(root, "stopped")
    wait_for(root / "stopped", 8, started)
    wait_until(
        lambda: (root / "stopped" / "checkpoints" / "7").is_dir(), started
    )  # it is written while training goes on
    started[1].kill()
    codes = [code for code, _, _ in processes.finish(started, timeout=180)]
    assert codes[0] != 0 and codes[1] == -signal.SIGKILL

    kept = max(
        int(entry.name) for entry in (root / "stopped" / "checkpoints").iterdir() if entry.name.isdecimal()
    )
    told = (root / "stopped" / "metrics.jsonl").stat().st_ino
    started = start(root, "stopped")
    # Each start writes a file of its own, from the checkpoint on; the old one may know of later steps.
    wait_until(lambda: (root / "stopped" / "metrics.jsonl").stat().st_ino != told, started)
    wait_for(root / "stopped", kept + 2, started)
    os.kill(started[1].pid, signal.SIGTERM)
    first, _ = succeed(started)
    assert kept % 7 == 0 and f"resuming after step {kept}" in first and "as asked, and saved" in first
    last = max(line["step"] for line in steps_of(root / "stopped"))
    assert last < CONFIG["train"]["steps"] and (root / "stopped" / "checkpoints" / str(last)).is_dir()

    assert f"resuming after step {last}" in succeed(start(root, "stopped"))[0]
    assert steps_of(root / "stopped") == steps_of(two[0]), "each step is told once, with the same digits"
    for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors", "predictions.txt"):
        assert (root / "stopped" / name).read_bytes() == (two[0] / name).read_bytes(), name


@pytest.mark.slow
def test_what_one_finds_all_learn():
    """Values, errors, and a directory that is not shared."""
    script = """
    import json, pathlib
    from experiments import processes

    found = [processes.by_first(lambda: {"index": jax.process_index(), "text": "x" * 100}), processes.first()]
    def fail():
        raise FileNotFoundError("no such thing")
    try:
        processes.by_first(fail)
    except Exception as error:
        found.append([type(error).__name__, str(error)])
    shared, own = sys.argv[1:]
    processes.check_shared(pathlib.Path(shared))
    found.append([path.name for path in pathlib.Path(shared).iterdir()])
    from experiments.preemption import Asked
    processes.by_first(lambda: None)
    with Asked() as asked:  # the signal comes before the first step, whatever its number
        if jax.process_index() == 1:
            import os, signal, time
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(3)
        processes.by_first(lambda: None)
        found.append([asked() for _ in range(3)])
    processes.VISIBLE = 0.1
    try:
        processes.check_shared(pathlib.Path(own) / str(jax.process_index()))
    except ValueError as error:
        found.append(str(error))
    print("found", json.dumps(found))
    """
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        texts = processes.run(2, script, f"{directory}/shared", f"{directory}/own")
    first, second = (json.loads(text.split("found ", 1)[1]) for text in texts)
    assert first[0] == second[0] == {"index": 0, "text": "x" * 100} and (first[1], second[1]) == (True, False)
    assert first[2] == ["FileNotFoundError", "no such thing"] and second[2] == [
        "StoppedElsewhere",
        "FileNotFoundError: no such thing",
    ]
    assert first[3] == second[3] == []
    assert first[4] == second[4] == [True, False, False]
    assert all(
        "process 0 writes there, and process 1 does not see it" in found[5] for found in (first, second)
    )


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
        train.make_mesh(Mesh(1, 2, 1))


@pytest.mark.slow
def test_nothing_says_which_processes_there_are(root):
    ended = processes.finish(processes.start([command(root, "none", "--distributed")]))
    assert ended[0][0] == 1 and "`--distributed`: nothing here says which processes there are" in ended[0][2]
    assert "start them with srun or mpirun, or pass --coordinator HOST:PORT" in ended[0][2]
