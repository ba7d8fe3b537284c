"""A run that was stopped goes on, bit for bit, also with other devices; one whose base or data has changed
does not.
"""

import json
import shutil
import signal

import jax
import numpy as np
import pytest
from runs import (
    BASE,
    close,
    numbers_of,
    refused,
    root as root,
    snapshot,
    without_java as without_java,
)
from stopping import lost_in, told_after
from training import optax_promotes as optax_promotes

from experiments import config as configs
from experiments.command_line import main
from experiments.reports import provenance
from experiments.running.run import run
from lora_jax.interop import hf


# The run that all of them look at.
pytestmark = pytest.mark.slow


def words(root, workdir, *more):
    """The command of `done`, but for what is only measured."""
    sets = [word for item in ("compare_full=false", *more) for word in ("--set", item)]
    return ["run", str(root / "tiny.json"), "--workdir", str(workdir), *sets]


@pytest.fixture(scope="module")
def stopped(root, tmp_path_factory):
    """A run on `done`'s base that was lost twice: before its first checkpoint, and between two of them."""
    stopped = tmp_path_factory.mktemp("stopped") / "run"
    shutil.copytree(root / "done" / "base", stopped / "base")
    for step in (2, 6):
        with lost_in(step):
            main(words(root, stopped))
    return stopped


@pytest.fixture
def parts(stopped, tmp_path):
    """A copy of it to go on with."""
    return shutil.copytree(stopped, tmp_path / "parts")


def test_resume_is_bit_for_bit(root, parts, capsys):
    """Lost as `stopped` was, then told to stop where it would have been evaluated, where nothing was due, and
    at the last step: the run ends as the uninterrupted one, told step by step.
    """
    assert not (parts / "report.md").exists() and len(numbers_of(parts)) > 3
    before = signal.getsignal(signal.SIGTERM)
    for kept, step in ((3, 4), (4, 5)):
        with told_after(step):
            assert main(words(root, parts)) == 0
        out = capsys.readouterr().out
        assert f"resuming after step {kept}" in out
        assert f"stopped after step {step}, as asked, and saved: the same command goes on" in out
        assert {int(entry.name) for entry in (parts / "checkpoints").iterdir()} >= {step}
        assert signal.getsignal(signal.SIGTERM) is before
    with told_after(8):  # the last: nothing is left to be stopped
        assert main(words(root, parts)) == 0
    out = capsys.readouterr().out
    assert "resuming after step 5" in out and "finished, see" in out
    for name in ("merged/model.safetensors", "predictions.txt"):
        assert (parts / name).read_bytes() == (root / "done" / name).read_bytes()
    assert numbers_of(parts) == numbers_of(root / "done"), "each step is told once"
    said = [json.loads(line) for line in (parts / "provenance.jsonl").read_text().splitlines()]
    assert [line["step"] for line in said] == [0, 3, 4, 5]


def test_a_packed_run_resumes_bit_for_bit(root, tmp_path, capsys):
    """Over two devices, with a row for each."""
    settings = "train.pack=2", "mesh.data=2", "decode.prompts=1", "decode.before=false"
    for name in ("whole", "lost"):
        shutil.copytree(root / "done" / "base", tmp_path / name / "base")
    assert main(words(root, tmp_path / "whole", *settings)) == 0
    with lost_in(5):
        main(words(root, tmp_path / "lost", *settings))
    assert main(words(root, tmp_path / "lost", *settings)) == 0
    assert "resuming after step 3" in capsys.readouterr().out
    assert numbers_of(tmp_path / "lost") == numbers_of(tmp_path / "whole")
    merged = [(tmp_path / name / "merged" / "model.safetensors").read_bytes() for name in ("lost", "whole")]
    assert merged[0] == merged[1]
    # Without dropout they would be those of `done`; the number of examples and of counted tokens is.
    counted = lambda directory: [line["tokens"] for line in numbers_of(directory) if "tokens" in line]
    assert counted(tmp_path / "whole") == counted(root / "done")


def test_another_mesh_goes_on(root, parts, capsys):
    """Begun on one device and ended on four: the numbers of `done`, to float32 rounding, and the
    directory says which mesh was the last.
    """
    assert main(words(root, parts, "mesh.data=2", "mesh.tensor=2")) == 0
    assert "resuming after step 3" in capsys.readouterr().out
    assert json.loads((parts / "config.json").read_text())["mesh"] == {"data": 2, "fsdp": 1, "tensor": 2}
    close(hf.load(parts / "merged")[1], hf.load(root / "done" / "merged")[1])
    for found, expected in zip(numbers_of(parts), numbers_of(root / "done"), strict=True):
        assert found.keys() == expected.keys()
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-4)


def test_the_report_names_the_commit_of_every_step(root, parts, monkeypatch):
    """The first two processes were lost, and the second had saved step 3."""
    for step, commit in ((5, "1a2b"), (8, "3c4d")):
        here = {**provenance.provenance(), "commit": commit, "date": "2026-11-30"}
        monkeypatch.setattr(provenance, "provenance", lambda here=here: here)
        with told_after(step):
            assert main(words(root, parts)) == 0
    facts = json.loads((parts / "report.json").read_text())
    assert facts["commit"] == "3c4d"
    assert [(line["step"], line["commit"]) for line in facts["processes"][1:]] == [(3, "1a2b"), (5, "3c4d")]
    page = (parts / "report.md").read_text()
    assert "; after step 3 1a2b, 2026-11-30; after step 5 3c4d, 2026-11-30 |" in page


@pytest.mark.parametrize("changed", ["base", "data"])
def test_another_base_or_data_is_refused(root, parts, capsys, monkeypatch, changed):
    """The config is the same, but what it names has changed since the checkpoint."""
    if changed == "base":
        merged = parts / "base" / "merged"
        model, params = hf.load(merged)
        shutil.move(merged, parts / "base" / "old")
        other = jax.tree.map(lambda leaf: leaf + 1e-3, params)
        hf.save(merged, model, other, source=parts / "base" / "old")
    else:
        file = parts / "data" / "train.txt"
        text = file.read_text()
        file.write_text(text + text.splitlines()[0] + "\n")
    before = snapshot(parts)
    line = refused(capsys, monkeypatch, *words(root, parts))
    assert f"holds a run with another {changed}" in line
    assert snapshot(parts) == before


def test_sigterm_while_the_base_is_made_stops_both(root, tmp_path, capsys):
    with told_after(1):
        assert main(words(root, tmp_path / "run")) == 0
    assert "stopped after step 1, as asked" in capsys.readouterr().out
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert (tmp_path / "run" / "base" / "checkpoints" / "1").is_dir()


def test_again_is_already_finished(root, capsys):
    """A run and, with a tokenizer of its own, its base."""
    for config, workdir in (("tiny.json", root / "done"), ("base.json", root / "done" / "base")):
        before = snapshot(workdir)
        assert main(["run", "--config", str(root / config), "--workdir", str(workdir)]) == 0
        assert "already finished" in capsys.readouterr().out
        assert snapshot(workdir) == before


def test_a_tokenizer_of_its_own(root):
    """`base.vocabulary`: trained on the training text, and carried along in both exports."""
    done = root / "done"
    model, _ = hf.load(done / "base" / "merged")
    assert model.config.vocab_size == BASE["base"]["vocabulary"] == 400
    trained = (done / "base" / "tokenizer" / "tokenizer.json").read_bytes()
    for directory in (done / "base" / "merged", done / "merged"):
        assert (directory / "tokenizer.json").read_bytes() == trained


def test_what_a_crash_leaves(root, tmp_path, capsys, monkeypatch):
    """A tokenizer cut short is made again, and kept by a second start; a configuration that is cut short is
    named.
    """
    run_directory, kept = tmp_path / "run", tmp_path / "run" / "tokenizer" / "tokenizer.json"
    (run_directory / "tokenizer.tmp").mkdir(parents=True)
    tree = {**BASE, "base": {"architecture": BASE["base"]["architecture"], "vocabulary": 300}}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    config, times = configs.load(tmp_path / "config.json"), []
    for _ in range(2):
        with lost_in(1):
            run(config, tmp_path / "config.json", root, run_directory)
        times.append(kept.stat().st_mtime_ns)
    assert times[0] == times[1] and not (run_directory / "tokenizer.tmp").exists()
    (run_directory / "config.json").write_text("")
    line = refused(capsys, monkeypatch, "run", tmp_path / "config.json", "--workdir", run_directory)
    assert f"`{run_directory / 'config.json'}` is not valid JSON" in line
