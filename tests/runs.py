"""Runs of a tiny model through the command line, as several files of tests look at them."""

import functools
import json
import runpy
import sys

import jax
import numpy as np
import pytest

from experiments.command_line import main


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
def without_java():
    """METEOR starts java, which costs more than any of these runs. `test_metrics` has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        yield


@functools.cache
def _finished(directory):
    root = directory / "runs"
    root.mkdir()
    (root / "base.json").write_text(json.dumps(BASE))
    (root / "tiny.json").write_text(json.dumps(LORA))
    assert main(["run", "--config", str(root / "tiny.json"), "--workdir", str(root / "done")]) == 0
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A directory with the two configs and the finished run `done`, of the command line. Made once a
    process, so that nothing may change it.
    """
    return _finished(tmp_path_factory.getbasetemp())


def by_transformers(directory):
    """The tokenizer in a directory, as a user of the exported model reads it."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)


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


def close(left, right):
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, atol=1e-6), left, right)
