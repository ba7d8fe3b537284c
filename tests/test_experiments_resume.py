"""A run that was stopped goes on, bit for bit; one whose config, base or data has changed does not."""

import json
import os
import signal

import jax
import numpy as np
import pytest
from runs import BASE, close, inputs as inputs, LORA, numbers_of, refused, root as root, snapshot
from training import optax_promotes as optax_promotes

from experiments import config as configs, train
from experiments.command_line import main
from experiments.run import run
from lora_jax.interop import hf


class _AskedAt:
    """SIGTERM to this very process as a step begins, as a cluster sends it."""

    def __init__(self, monkeypatch, step):
        compiled = train.Trainer.compiled_step
        calls = []

        def wrapped(trainer, state):
            inner = compiled(trainer, state)

            def step_and_signal(*args):
                calls.append(None)
                if len(calls) == step:
                    os.kill(os.getpid(), signal.SIGTERM)
                return inner(*args)

            step_and_signal.lower = inner.lower
            return step_and_signal

        monkeypatch.setattr(train.Trainer, "compiled_step", wrapped)


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 6, 8])
def test_sigterm_saves_and_the_same_command_goes_on(root, tmp_path, step, capsys, monkeypatch):
    """At a step that would have been evaluated, and at one that would not: the run ends as the
    uninterrupted one, told step by step.
    """
    command = [
        "run",
        str(root / "tiny.json"),
        "--data",
        str(root),
        "--workdir",
        str(tmp_path / "parts"),
        "--set",
        f"base.workdir={root / 'done' / 'base'}",
    ]
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        _AskedAt(patch, step)
        assert main(command) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    out = capsys.readouterr().out
    if step == 8:  # the last: nothing is left to be stopped
        assert "finished, see" in out
        assert numbers_of(tmp_path / "parts") == numbers_of(root / "done")
        return
    assert f"stopped after step {step}, as asked, and saved: the same command goes on" in out
    assert {int(entry.name) for entry in (tmp_path / "parts" / "checkpoints").iterdir()} >= {step}
    assert main(command) == 0
    assert f"resuming after step {step}" in capsys.readouterr().out
    for name in ("merged/model.safetensors", "predictions.txt"):
        assert (tmp_path / "parts" / name).read_bytes() == (root / "done" / name).read_bytes()
    assert numbers_of(tmp_path / "parts") == numbers_of(root / "done"), "each step is told once"


def test_sigterm_while_the_base_is_made_stops_both(root, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        _AskedAt(patch, 1)
        assert (
            main(["run", str(root / "tiny.json"), "--data", str(root), "--workdir", str(tmp_path / "run")])
            == 0
        )
    assert "stopped after step 1, as asked" in capsys.readouterr().out
    assert (
        not (tmp_path / "run" / "checkpoints").exists()
        and (tmp_path / "run" / "base" / "checkpoints" / "1").is_dir()
    )


def test_again_is_already_finished(root, capsys):
    before = snapshot(root / "done")
    assert main(["run", str(root / "tiny.json"), "--workdir", str(root / "done")]) == 0
    assert "already finished" in capsys.readouterr().out
    assert snapshot(root / "done") == before


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 5])
def test_resume_is_bit_for_bit(root, tmp_path, stop, capsys):
    """Stopped before the first checkpoint or between two, the run ends with the adapter of the
    uninterrupted one, `done`.
    """
    config = configs.load(root / "tiny.json", [f"base.workdir={root / 'done' / 'base'}"])
    run(config, root / "tiny.json", root, tmp_path / "parts", stop_after=stop)
    assert not (tmp_path / "parts" / "report.md").exists()
    run(config, root / "tiny.json", root, tmp_path / "parts")
    assert ("resuming after step 3" in capsys.readouterr().out) == (stop == 5)
    for name in ("merged/model.safetensors", "predictions.txt"):
        assert (tmp_path / "parts" / name).read_bytes() == (root / "done" / name).read_bytes()

    assert numbers_of(tmp_path / "parts") == numbers_of(root / "done"), "each step is told once"


@pytest.mark.slow
def test_another_mesh_goes_on(root, tmp_path, capsys):
    """Begun on one device and ended on four: the numbers of `done`, to float32 rounding, and the
    directory says which mesh was the last.
    """
    file, base = root / "tiny.json", [f"base.workdir={root / 'done' / 'base'}"]
    run(configs.load(file, base), file, root, tmp_path / "run", stop_after=5)
    run(configs.load(file, [*base, "mesh.data=2", "mesh.tensor=2"]), file, root, tmp_path / "run")
    assert "resuming after step 3" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["mesh"] == {
        "data": 2,
        "fsdp": 1,
        "tensor": 2,
    }
    close(hf.load(tmp_path / "run" / "merged")[1], hf.load(root / "done" / "merged")[1])
    for found, expected in zip(numbers_of(tmp_path / "run"), numbers_of(root / "done"), strict=True):
        assert found.keys() == expected.keys()
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-4)


def test_what_a_crash_leaves(root, tmp_path, capsys, monkeypatch):
    """A tokenizer cut short is made again; a configuration that is cut short is named."""
    (tmp_path / "run" / "tokenizer.tmp").mkdir(parents=True)
    tree = {**BASE, "base": {"architecture": BASE["base"]["architecture"], "vocabulary": 300}}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    run(
        configs.load(tmp_path / "config.json"), tmp_path / "config.json", root, tmp_path / "run", stop_after=1
    )
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").is_file() and not (
        tmp_path / "run" / "tokenizer.tmp"
    ).exists()
    (tmp_path / "run" / "config.json").write_text("")
    line = refused(capsys, monkeypatch, "run", tmp_path / "config.json", "--workdir", tmp_path / "run")
    assert f"`{tmp_path / 'run' / 'config.json'}` is not valid JSON" in line


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["base", "data"])
def test_another_base_or_data_is_refused(root, inputs, tmp_path, capsys, monkeypatch, changed):
    """The config is the same, but what it names has changed since the checkpoint."""
    data, work = tmp_path / "data", tmp_path / "work"
    model, params = hf.load(root / "done" / "base" / "merged")
    hf.save(data / "model", model, params, source=root / "done" / "base" / "merged")
    for name in ("train.txt", "valid.txt", "test.txt"):
        (data / name).write_bytes((inputs / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**LORA, "base": {"path": "model"}, "generate": None}))
    config = configs.load(tmp_path / "config.json")
    run(config, tmp_path / "config.json", data, work, stop_after=3)
    if changed == "base":
        other = jax.tree.map(lambda leaf: leaf + 1e-3, params)
        hf.save(data / "other", model, other, source=data / "model")
        (data / "model").rename(data / "old")
        (data / "other").rename(data / "model")
    else:
        text = (data / "train.txt").read_text()
        (data / "train.txt").write_text(text + text.splitlines()[0] + "\n")
    before = snapshot(work)
    line = refused(capsys, monkeypatch, "run", tmp_path / "config.json", "--data", data, "--workdir", work)
    assert f"holds a run with another {changed}" in line
    assert snapshot(work) == before


def test_a_tokenizer_of_its_own(root, tmp_path):
    """`base.vocabulary`: trained on the training text, carried along in the export, and kept by a second
    start.
    """
    tree = {**BASE, "base": {"architecture": BASE["base"]["architecture"], "vocabulary": 300}}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    arguments = [
        "run",
        "--config",
        str(tmp_path / "config.json"),
        "--workdir",
        str(tmp_path / "run"),
        "--set",
        "train.steps=2",
    ]
    assert main(arguments) == 0
    model, _ = hf.load(tmp_path / "run" / "merged")
    assert model.config.vocab_size == 300
    files = [tmp_path / "run" / room / "tokenizer.json" for room in ("tokenizer", "merged")]
    assert files[0].read_bytes() == files[1].read_bytes()
    before = snapshot(tmp_path / "run")
    assert main(arguments) == 0 and snapshot(tmp_path / "run") == before
