"""A run that begins at the adapter of another: MRPC, RTE and STS-B at MNLI's."""

import json

import glue_files
import numpy as np
import pytest
import safetensors.numpy
from runs import refused
from test_glue import CONFIG
from training import optax_promotes as optax_promotes

from experiments.command_line import main


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A finished run of glue/mnli, and the files of glue/rte."""
    root = tmp_path_factory.mktemp("starting")
    for name in ("mnli", "rte", "stsb"):
        glue_files.write(root / "glue", name)
    glue_files.write_bert(root / "bert")
    assert main(command(root, "mnli", {"steps": 2})) == 0
    return root


def command(root, name, train, **base):
    settings = {
        **CONFIG,
        "base": {"path": "./bert", **base},
        "data": {"task": f"glue/{name}", "seq_len": 40},
        "train": {**CONFIG["train"], "eval_every": 1, "result": "last", **train},
        "decode": {"shown": 0},
    }
    (root / f"{name}.json").write_text(json.dumps(settings))
    return ["run", str(root / f"{name}.json"), "--data", str(root), "--workdir", str(root / f"run_{name}")]


def adapter(root, name):
    arrays = safetensors.numpy.load_file(root / f"run_{name}" / "adapter" / "adapter_model.safetensors")
    return {key: value for key, value in arrays.items() if "lora_" in key}, arrays


@pytest.mark.parametrize("name, outputs", [("rte", 2), ("stsb", 1)])
def test_it_begins_at_a_and_b_and_with_a_new_head(root, name, outputs):
    """At rate 0 the result is the start."""
    assert main(command(root, name, {"steps": 1, "lr": 0.0}, adapter="./run_mnli")) == 0
    (theirs, _), (ours, arrays) = adapter(root, "mnli"), adapter(root, name)
    assert ours.keys() == theirs.keys() and any(np.abs(value).max() > 1e-3 for value in ours.values())
    assert max(np.abs(theirs[key]).max() for key in theirs if "lora_B" in key) > 1e-3
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key])
    (head,) = (value for key, value in arrays.items() if key.endswith("classifier.weight"))
    assert head.shape == (outputs, 16)


@pytest.mark.parametrize(
    "change, base, message",
    [
        ({"method": {"name": "LoRA", "rank": 3}}, {}, "has the shape (16, 2) in"),
        (
            {"method": {"name": "VeRA", "rank": 2}},
            {},
            "where LoRA and DoRA can begin, and `method.name` is VeRA",
        ),
        (
            {"targets": ["query/kernel"]},
            {},
            "the adapter has more: 'encoder/layer/0/attention/self/value/kernel/",
        ),
        ({}, {"adapter": "nowhere"}, "`base.adapter`: no `adapter_config.json` in"),
    ],
)
def test_what_does_not_fit(root, capsys, monkeypatch, tmp_path, change, base, message):
    command(root, "rte", {"steps": 1}, **{"adapter": "run_mnli/adapter", **base})
    settings = {**json.loads((root / "rte.json").read_text()), **change}
    (root / "other.json").write_text(json.dumps(settings))
    line = refused(
        capsys, monkeypatch, "run", root / "other.json", "--data", root, "--workdir", tmp_path / "run"
    )
    assert message in line
