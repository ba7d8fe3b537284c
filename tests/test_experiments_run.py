"""Whole runs through the command line on a tiny model: what they leave, resuming bit for bit, and every
kind of bad input.
"""

import json
import os
import runpy
import shutil
import signal
import sys

import jax
import numpy as np
import pytest

import lora_jax
from experiments import config as configs
from experiments.command_line import main
from experiments.running.run import run
from experiments.training import trainer as train
from lora_jax.interop import hf, loralib, peft


GENERATE = {"seed": 0, "meanings": 12, "held_out": 4, "references": 2}
BASE = {
    "name": "tiny_base",
    "source": {"paper": None, "note": "a test"},
    "generate": GENERATE,
    "base": {"architecture": {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 160}, "vocabulary": 400},
    "data": {"task": "text", "train": "train.txt", "valid": "valid.txt", "seq_len": 32},
    "method": {"name": "Full"},
    "targets": [".*"],
    "train": {"steps": 3, "batch": 4, "lr": 0.01, "log_every": 1, "eval_batches": 1},
}
LORA = {
    "name": "tiny",
    "source": {"paper": "a paper", "table": "a table", "expected": {"BLEU": 70.4}},
    "generate": GENERATE,
    "base": {"run": "base.json"},
    "data": {"task": "e2e", "train": "train.txt", "valid": "valid.txt", "test": "test.txt", "seq_len": 144},
    "method": {"name": "LoRA", "rank": 2, "alpha": 4, "dropout": 0.1, "blocks": [True, False, True]},
    "targets": ["attn/c_attn/kernel"],
    "train": {
        "steps": 8,
        "batch": 4,
        "lr": 0.01,
        "warmup": 1,
        "log_every": 1,
        "eval_every": 4,
        "eval_batches": 1,
        "checkpoint_every": 3,
    },
    "decode": {
        "max_tokens": 4,
        "shown": 2,
        "beams": 3,
        "length_penalty": 0.9,
        "no_repeat_ngram": 2,
        "end": ["\n"],
        "before": True,
    },
    "compare_full": True,
}


@pytest.fixture(autouse=True, scope="module")
def _optax_promotes():
    """Optax raises floats to integer powers of its counters, which strict promotion refuses. Ranks stay
    strict.
    """
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A directory with the two configs and the finished run `done`, of the command line."""
    root = tmp_path_factory.mktemp("runs")
    (root / "base.json").write_text(json.dumps(BASE))
    (root / "tiny.json").write_text(json.dumps(LORA))
    assert main(["run", "--config", str(root / "tiny.json"), "--workdir", str(root / "done")]) == 0
    return root


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


def snapshot(directory):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.rglob("*") if path.is_file()
    }


def numbers_of(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds_per_step"} for line in lines]


def refused(capsys, monkeypatch, *arguments):
    """The one line on standard error of a command that fails, through `python -m experiments`."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["experiments", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("experiments", run_name="__main__")
    assert caught.value.code not in (0, None)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


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


def test_a_finished_work_directory(root):
    done = root / "done"
    names = {path.name for path in done.iterdir()}
    assert {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "adapter",
        "merged",
        "predictions.txt",
        "report.md",
        "figures",
    } <= names
    assert not {name for name in names if name.endswith(".tmp")}
    assert json.loads((done / "config.json").read_text()) == configs.to_json(configs.load(root / "tiny.json"))
    assert len((done / "predictions.txt").read_text().splitlines()) == GENERATE["held_out"]
    lines = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "valid_loss" in line] == [0, 4, 8]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert lines[1]["lr"] == 0, "the first step has rate 0"
    assert (done / "figures" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    page = (done / "report.md").read_text()
    assert "Samples (beam search, width 3, test inputs)" in page
    assert "Published: BLEU 70.4" in page and "merged result of base.json" in page
    facts = json.loads((done / "report.json").read_text())
    assert facts["comparison"]["max_difference"] < 1e-4
    in_pytorch = facts["comparison"]["pytorch"]
    assert in_pytorch is None or (in_pytorch["max_difference"] < 1e-4 and not in_pytorch["keys"])
    assert all(f" {word} |" in page or f"| {word}" in page for word in ("command", "data", "commit, date"))
    assert (done / "base" / "report.md").is_file(), "the base was run first"


def test_the_adapter_beside_the_merged_model(root):
    """In PEFT's format, on the base that its config names; nothing is there where nothing is adapted."""
    done = root / "done"
    file = done / "adapter" / "adapter_model.safetensors"
    facts, page = json.loads((done / "report.json").read_text()), (done / "report.md").read_text()
    assert facts["adapter"] == {
        "bytes": file.stat().st_size,
        "merged_bytes": (done / "merged" / "model.safetensors").stat().st_size,
        "missing": None,
    }
    assert "`adapter/` is what was trained, in PEFT's format: a file of " in page
    named = json.loads((done / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == "base/merged"
    model, params = hf.load(done / named)
    frozen, delta = peft.load(done / "adapter", model, params)
    assert lora_jax.count(delta) == facts["trainable"]
    close(lora_jax.merge(frozen, delta), hf.load(done / "merged")[1])
    assert not (done / "base" / "adapter").exists()
    assert "There is no `adapter/`: the method is Full" in (done / "base" / "report.md").read_text()


def close(left, right):
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, atol=1e-6), left, right)


def test_the_report_scores_and_weighs(root, capsys):
    """The scores are those of the files beside the report, and the costs are those of this model."""
    done = root / "done"
    facts, page = json.loads((done / "report.json").read_text()), (done / "report.md").read_text()
    capsys.readouterr()
    for when, file in (("after", "predictions.txt"), ("before", "predictions_before.txt")):
        assert main(["score", "e2e", "--refs", str(done / "references.txt"), "--hyps", str(done / file)]) == 0
        assert json.loads(capsys.readouterr().out) == facts["scores"][when]
    assert "| base, untouched |" in page and "| published | 70.4 | - |" in page
    ours, full = facts["cost"]["this run"], facts["cost"]["full fine-tuning"]
    for method, cost in ((facts["trainable"], ours), (facts["base"]["parameters"], full)):
        assert cost["trained parameters"] == method
        assert 8 * method < cost["optimiser bytes"] < 8 * method + 64, "two float32 moments, and counters"
    assert ours["FLOPs"] < full["FLOPs"] and ours["bytes"] < full["bytes"]
    assert facts["bytes"] == {"base": 4 * facts["base"]["parameters"], "delta": 4 * facts["trainable"]}
    assert main(["report", str(done)]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.count("|") == 10 and f"{100 * facts['scores']['after']['BLEU']:.2f}" in row


def test_the_base_stays_and_the_merged_model_moves(root):
    _, base = hf.load(root / "done" / "base" / "merged")
    _, merged = hf.load(root / "done" / "merged")
    moved = jax.tree.map(lambda one, two: not np.array_equal(one, two), base, merged)
    assert moved["h"]["0"]["attn"]["c_attn"].pop("kernel")
    assert not any(jax.tree.leaves(moved))
    width = base["h"]["0"]["attn"]["c_attn"]["kernel"].shape[0]
    difference = np.asarray(
        merged["h"]["0"]["attn"]["c_attn"]["kernel"] - base["h"]["0"]["attn"]["c_attn"]["kernel"]
    )
    assert not difference[:, width : 2 * width].any(), "the key block is not adapted"


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


def test_export_and_report(root, tmp_path, capsys, monkeypatch):
    assert (
        main(["export", "--workdir", str(root / "done"), "--to", str(tmp_path / "out"), "--format", "hf"])
        == 0
    )
    exported, merged = (hf.load(directory)[1] for directory in (tmp_path / "out", root / "done" / "merged"))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, exported, merged)))
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert "not empty" in refused(
        capsys, monkeypatch, "export", "--workdir", root / "done", "--to", tmp_path / "out", "--format", "hf"
    )
    assert "no finished run" in refused(
        capsys, monkeypatch, "export", "--workdir", tmp_path, "--to", tmp_path / "new", "--format", "hf"
    )
    runs = [str(root / "done"), str(root / "done" / "base")]
    assert main(["report", *runs, "--figure", str(tmp_path / "losses.png")]) == 0
    table = capsys.readouterr().out
    assert "| tiny |" in table and "| tiny_base |" in table
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert "no finished run" in refused(capsys, monkeypatch, "report", tmp_path)


def test_export_of_the_adapter(root, tmp_path, capsys, monkeypatch):
    done, (model, merged) = root / "done", hf.load(root / "done" / "merged")
    _, params = hf.load(done / "base" / "merged")
    arguments = ["export", "--workdir", done, "--format"]
    assert main([*map(str, arguments), "peft", "--to", str(tmp_path / "adapter")]) == 0
    close(lora_jax.merge(*peft.load(tmp_path / "adapter", model, params)), merged)
    assert main([*map(str, arguments), "loralib", "--to", str(tmp_path / "adapter.pt")]) == 0
    assert (
        f"wrote {tmp_path / 'adapter.pt'}; its lora_alpha is 4, which the file does not hold"
        in capsys.readouterr().out
    )
    close(lora_jax.merge(*loralib.load(tmp_path / "adapter.pt", model, params, alpha=4)), merged)
    assert main(["convert", str(done / "adapter"), str(tmp_path / "again"), "--to", "hf"]) == 0, (
        "the base is found beside it"
    )
    close(hf.load(tmp_path / "again")[1], merged)

    assert "nothing is overwritten" in refused(
        capsys, monkeypatch, *arguments, "loralib", "--to", tmp_path / "adapter.pt"
    )
    assert "must be a file .pt or .bin" in refused(
        capsys, monkeypatch, *arguments, "loralib", "--to", tmp_path / "new"
    )
    assert "is a finished run: pass its adapter" in refused(
        capsys, monkeypatch, "convert", done, tmp_path / "new", "--to", "hf"
    )
    line = refused(
        capsys,
        monkeypatch,
        "export",
        "--workdir",
        done / "base",
        "--format",
        "peft",
        "--to",
        tmp_path / "new",
    )
    assert "has no adapter/: the method is Full" in line
    old = tmp_path / "old"
    old.mkdir()
    (old / "report.md").write_text("")
    (old / "report.json").write_text("{}")
    line = refused(
        capsys, monkeypatch, "export", "--workdir", old, "--format", "loralib", "--to", tmp_path / "new.pt"
    )
    assert "has no adapter/: it was finished by a version that wrote none" in line
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.pt").exists()


def test_pytorch_reads_the_export(root, torch):
    import transformers

    model, report = transformers.GPT2LMHeadModel.from_pretrained(
        root / "done" / "merged", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ours, params = hf.load(root / "done" / "merged")
    ids = np.arange(12)[None]
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(ours.apply({"params": params}, ids), theirs, atol=1e-5)


BAD_ARGUMENTS = {
    "unknown key": (["--set", "train.lrr=1"], "unknown key `train.lrr`; did you mean `train.lr`?"),
    "wrong type": (["--set", "train.lr=fast"], '`train.lr` must be a number, got "fast" (a string)'),
    "no config": (["--config", "nowhere.json"], "no config file `nowhere.json`"),
    "missing data": (["--set", "data.train=absent.txt"], "no data file"),
    "empty data": (["--set", "data.train=empty.txt"], "the data set `empty.txt` is empty"),
    "no separator": (["--set", "data.valid=bare.txt"], "row 2: expected exactly one `||`"),
    "too long for seq_len": (["--set", "data.seq_len=20"], "more than `data.seq_len` (20)"),
    "too long for the model": (
        ["--set", "data.seq_len=500"],
        "`data.seq_len` (500) is longer than the model, which has 160 positions",
    ),
    "too long to decode": (
        ["--set", "decode.max_tokens=150"],
        "`decode.max_tokens` (150) exceed the model's 160 positions",
    ),
    "end of two tokens": (
        ["--set", 'decode.end=["no one"]'],
        "`decode.end` has 'no one', which the tokenizer encodes as",
    ),
    "missing base": (["--set", 'base={"path": "/absent"}'], "`base.path`: no directory"),
    "unreachable hub": (["--set", 'base={"path": "gpt2-medium"}'], "the hub does not give it"),
    "truncated safetensors": (["--set", 'base={"path": "truncated"}'], "model.safetensors"),
    "no target": (["--set", 'targets=["c_attn"]'], "`targets` pattern 'c_attn' matches no leaf"),
    "rank too large": (["--set", "method.rank=99"], "`rank` is 99"),
    "mesh too large": (["--set", "mesh.tensor=16"], "needs 16 devices, but there are 8"),
    "mesh that does not divide": (["--set", "mesh.tensor=5"], "does not divide"),
}


@pytest.fixture(scope="module")
def inputs(root):
    """Data and bases to be refused, beside good ones, and the config of a run that would use them."""
    inputs = root / "inputs"
    inputs.mkdir()
    for name in ("train.txt", "valid.txt", "test.txt"):
        (inputs / name).write_bytes((root / "done" / "data" / name).read_bytes())
    (inputs / "empty.txt").write_text("")
    (inputs / "bare.txt").write_text("name : A||A .\nno separator\n")
    truncated = inputs / "truncated"
    truncated.mkdir()
    for path in (root / "done" / "base" / "merged").iterdir():
        content = path.read_bytes()
        (truncated / path.name).write_bytes(
            content[: len(content) // 2] if path.suffix == ".safetensors" else content
        )
    tree = {**LORA, "base": {"path": str(root / "done" / "base" / "merged")}, "generate": None}
    (root / "plain.json").write_text(json.dumps(tree))
    return inputs


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_input_is_one_line(root, inputs, tmp_path, capsys, monkeypatch, case):
    arguments, message = BAD_ARGUMENTS[case]
    config = [] if "--config" in arguments else ["--config", root / "plain.json"]
    line = refused(
        capsys, monkeypatch, "run", *config, "--data", inputs, "--workdir", tmp_path / "work", *arguments
    )
    assert message in line
    assert not (tmp_path / "work").exists(), "nothing was written"


def test_a_base_beside_the_config(root, tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text(
        json.dumps({**LORA, "base": {"path": "./bases/tiny"}, "compare_full": False})
    )
    arguments = [
        "run",
        str(tmp_path / "config.json"),
        "--data",
        str(root),
        "--workdir",
        str(tmp_path / "run"),
    ]
    line = refused(capsys, monkeypatch, *arguments)
    assert f"no directory `{tmp_path / 'bases' / 'tiny'}`" in line
    shutil.copytree(root / "done" / "base" / "merged", tmp_path / "bases" / "tiny")
    run(
        configs.load(tmp_path / "config.json"), tmp_path / "config.json", root, tmp_path / "run", stop_after=1
    )
    assert (tmp_path / "run" / "metrics.jsonl").is_file()


@pytest.mark.parametrize(
    "override, message",
    [
        ('targets=["attn/c_atn/kernel"]', "matches no leaf"),
        ("data.seq_len=161", "`data.seq_len` (161) is longer than the model, which has 160 positions"),
        ("method.rank=9", "`rank` is 9, above min(in, out) = 8"),
    ],
)
def test_what_a_base_would_not_fit_is_found_before_it_is_trained(
    root, tmp_path, capsys, monkeypatch, override, message
):
    line = refused(
        capsys, monkeypatch, "run", root / "tiny.json", "--workdir", tmp_path / "work", "--set", override
    )
    assert message in line
    assert not (tmp_path / "work").exists(), "nothing was written"


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


def test_another_config_is_refused(root, capsys, monkeypatch):
    before = snapshot(root / "done")
    line = refused(
        capsys, monkeypatch, "run", root / "tiny.json", "--workdir", root / "done", "--set", "train.lr=0.5"
    )
    assert "holds a run of another config: `train.lr` was 0.01 and is now 0.5" in line
    assert snapshot(root / "done") == before


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


def test_a_directory_of_something_else_is_refused(root, tmp_path, capsys, monkeypatch):
    (tmp_path / "thesis.tex").write_text("chapter one")
    line = refused(capsys, monkeypatch, "run", root / "tiny.json", "--workdir", tmp_path)
    assert "is not empty and holds no run" in line
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_command_line_itself(root, capsys, monkeypatch):
    assert "takes one config" in refused(capsys, monkeypatch, "run")
    assert "takes one config" in refused(capsys, monkeypatch, "run", "a.json", "--config", "b.json")
    assert "invalid choice" in refused(
        capsys, monkeypatch, "export", "--workdir", "a", "--to", "b", "--format", "onnx"
    )
    assert "unrecognized arguments" in refused(capsys, monkeypatch, "run", "a.json", "--worckdir", "x")
    assert "required" in refused(capsys, monkeypatch)
    for arguments in (
        ["--help"],
        ["run", "--help"],
        ["export", "--help"],
        ["convert", "--help"],
        ["report", "--help"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
    with pytest.raises(FileNotFoundError):
        main(["run", "nowhere.json", "--traceback"])
