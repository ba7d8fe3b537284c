"""Sweeps of tasks of labels: each adapter has its own new head, and they are compared by the task's
metric.
"""

import json
import shlex

import glue_files
import numpy as np
import pytest
from runs import numbers_of, refused, without_java as without_java
from safetensors.numpy import load_file
from sweeping import assert_is_that_of_its_own_run, facts_of, swept, words
from training import close, optax_promotes as optax_promotes

from experiments.command_line import main
from experiments.progress import read_metrics
from experiments.running import baselines, run as runs
from experiments.sweeps import compare, compared, page, results
from lora_jax.interop import hf


# Whole commands.
pytestmark = pytest.mark.slow

CONFIG = {
    "name": "tiny",
    "source": {"paper": None, "note": "a test"},
    "base": {"path": "bert"},
    "data": {"task": "glue/rte", "seq_len": 40},
    "method": {"name": "LoRA", "rank": 2},
    "targets": ["attention/self/(query|value)/kernel"],
    "train": {
        "steps": 8,
        "batch": 4,
        "lr": 0.01,
        "log_every": 1,
        "eval_every": 2,
        "checkpoint_every": 100,
        "buckets": 2,
    },
    "optimizer": {"name": "adamw", "eps": 1e-4},
    "decode": {"batch": 4, "shown": 2},
}
OVER = ["train.lr=0.01,0.03", "method.rank=2,1", "seed=0,1"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The config, its data and its base."""
    root = tmp_path_factory.mktemp("labels")
    glue_files.write(root / "data" / "glue", "rte")
    glue_files.write_bert(root / "data" / "bert")
    (root / "tiny.json").write_text(json.dumps(CONFIG))
    return root


@pytest.fixture(scope="module")
def done(root):
    """Of two rates, two ranks and two seeds."""
    return swept(root, root / "done", OVER)


@pytest.mark.parametrize("name", ["lr=0.01,rank=2,seed=0", "lr=0.03,rank=1,seed=1"])
def test_each_adapter_is_that_of_its_own_run(root, done, monkeypatch, name):
    """Its head begins as that of its own seed, its batches are of like length, and its accuracy is the
    same.
    """
    assert_is_that_of_its_own_run(root, done, monkeypatch, name)


def test_heads_are_drawn_by_seed(root, done):
    """As its own run draws it, and only the head: the frozen base is that of the files."""
    drawn = {}
    for seed in (0, 1):
        key = runs.inputs.keys(seed)["base"]
        how = {"head": "sequence_classification", "num_labels": 2, "key": key}
        drawn[seed] = hf.load(root / "data" / "bert", **how)[1]["classifier"]["kernel"]
    assert np.abs(drawn[0] - drawn[1]).max() > 0.01
    for member in done.together.members:
        mine = member.delta["classifier"]["kernel"]
        np.testing.assert_array_equal(mine, drawn[member.config.seed])
    _, plain = hf.load(root / "data" / "bert", head="sequence_classification", num_labels=2)
    frozen = done.together.trainer.frozen
    assert frozen["classifier"] == {"bias": None, "kernel": None}
    close({**frozen, "classifier": None}, {**plain, "classifier": None}, 0)


def test_the_table_is_of_the_metric(done):
    """The mean over the seeds after the last step, that of their best evaluations beside it, and the highest
    in bold.
    """
    facts, lines = facts_of(done.directory), read_metrics(done.directory / "metrics.jsonl")
    assert facts["metric"] == "accuracy"
    seen = [line["accuracy"] for line in lines if "accuracy" in line]
    for line in facts["table"]:
        rate, rank = line["values"]["train.lr"], line["values"]["method.rank"]
        names = [f"lr={rate:g},rank={rank},seed={seed}" for seed in (0, 1)]
        np.testing.assert_allclose(line["mean"], np.mean([seen[-1][name] for name in names]))
        best = [max(each[name] for each in seen) for name in names]
        np.testing.assert_allclose(line["best"]["mean"], np.mean(best))
        np.testing.assert_allclose(line["best"]["deviation"], np.std(best, ddof=1), atol=1e-12)
    most = max(facts["table"], key=lambda line: line["mean"])
    text = (done.directory / "sweep.md").read_text()
    assert f"| **{most['mean']:.4f} ± {most['deviation']:.4f}** |" in text
    assert "## Accuracy in validation" in text and "at the best evaluation" in text
    (best,) = facts["best"]
    accuracies = {row["name"]: row["metrics"]["accuracy"] for row in facts["rows"]}
    own = [row["name"] for row in facts["rows"] if line_of(row) == most["values"]]
    assert best in own and accuracies[best] == max(accuracies[name] for name in own)
    assert (done.directory / "figures" / "rate.png").read_bytes()[:4] == b"\x89PNG"


def line_of(row):
    return {key: value for key, value in row["values"].items() if key != "seed"}


def test_the_best_is_a_run_to_be_finished(root, done, capsys, monkeypatch):
    """Though its head, and so its base, is not that of the first adapter."""
    monkeypatch.setattr(runs.finish, "_in_pytorch", lambda *_: None)  # which `test_experiments_run` has
    place = next(i for i, member in enumerate(done.together.members) if member.config.seed == 1)
    member, lines = done.together.members[place], read_metrics(done.directory / "metrics.jsonl")
    results._as_run(member, done.together.single(place, done.state), lines, done.directory)
    directory = done.directory / "best" / member.name
    before = numbers_of(directory)
    # The page's command for the best adapter, with the name of this one.
    (best,) = facts_of(done.directory)["best"].values()
    words = shlex.split(best["run"])[3:]
    values = [item for item in words if not item.startswith(("train.lr=", "method.rank=", "seed="))]
    plain = [
        item for item, after in zip(values, [*values[1:], ""], strict=True) if item != "--set" or "=" in after
    ]
    plain[plain.index("--workdir") + 1] = str(directory)
    more = [word for key, value in member.values.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    assert main([*plain, *more]) == 0
    assert "resuming after step 8" in capsys.readouterr().out and numbers_of(directory) == before
    report = json.loads((directory / "report.json").read_text())
    accuracy = {row["name"]: row["metrics"]["accuracy"] for row in facts_of(done.directory)["rows"]}
    assert report["scores"]["after"]["accuracy"] == accuracy[member.name]


def test_adapters_of_a_baseline(root, tmp_path, monkeypatch):
    """Each seed draws its own head and adapters. The best is a run to be finished."""
    sets = ['baseline={"name": "Houlsby", "bottleneck": 2}', 'method={"name": "Full"}']
    sets += ["targets=[]", "train.steps=4"]
    more = [word for item in sets for word in ("--set", item)]
    done = swept(root, tmp_path / "sweep", ["train.lr=0.01,0.03", "seed=0,1"], *more)
    assert_is_that_of_its_own_run(root, done, monkeypatch, "lr=0.03,seed=1", *sets)
    monkeypatch.undo()
    facts = facts_of(done.directory)
    for member, row in zip(done.together.members, facts["rows"], strict=True):
        stored = load_file(done.directory / row["adapter"])
        single = done.together.single(done.together.names.index(member.name), done.state)
        assert stored.keys() == baselines.named(single.delta).keys()
        for path, array in baselines.named(single.delta).items():
            np.testing.assert_array_equal(stored[path], array, err_msg=path)
    ((name, words),) = facts["best"].items()
    assert main(shlex.split(words["run"])[3:]) == 0
    report = json.loads((done.directory / "best" / name / "report.json").read_text())
    (row,) = (row for row in facts["rows"] if row["name"] == name)
    assert report["scores"]["after"]["accuracy"] == row["metrics"]["accuracy"]
    text = (done.directory / "sweep.md").read_text()
    assert "| method | `Houlsby(bottleneck=2, " in text and "`trained.safetensors`" in text
    assert "PEFT" not in text and "`export`" not in text, "it has no form there"
    assert "| tiny | Houlsby | - | 2 |" in compare.table([done.directory])


def test_halving_goes_by_the_metric(root, tmp_path):
    """What is dropped has the lower accuracy, or the same."""
    half = swept(root, tmp_path / "half", ["train.lr=0.0,0.05,0.2", "method.rank=2,1"], "--halving", "0.5")
    lines = read_metrics(half.directory / "metrics.jsonl")
    (found,) = (line["accuracy"] for line in lines if line["step"] == 4 and "accuracy" in line)
    gone = {row["name"] for row in facts_of(half.directory)["rows"] if row["dropped"] == 4}
    assert len(gone) == 3 and len(set(found.values())) > 1
    assert max(found[name] for name in gone) <= min(found[name] for name in found if name not in gone)


def test_a_better_metric_wins_over_a_lower_loss():
    lower_loss, better = {"valid_loss": 0.1, "F1": 0.5}, {"valid_loss": 0.9, "F1": 0.6}
    assert compared.cost(better) < compared.cost(lower_loss)
    rows = [
        {"name": name, "values": {"train.lr": rate}, "metrics": {"F1": found["F1"]}, "lost": None}
        | {"best_metrics": {"F1": 0.7}, "valid_loss": found["valid_loss"], "dropped": None}
        for name, rate, found in (("a", 1, lower_loss), ("b", 2, better))
    ]
    table = results.grouped(rows, "F1")
    assert results.best_of(rows, table, "F1") == ["b"]
    facts = {"over": {"train.lr": [1, 2]}, "metric": "F1", "table": table}
    assert page.table(facts)[3] == "| 2 | 1 | **0.6000** | 0.7000 |"


def test_other_labels_are_refused(root, tmp_path, capsys, monkeypatch):
    section = {"task": "classification", "text": "text", "label": "label", "seq_len": 16}
    for name, labels in (("two", "ab"), ("three", "abc")):
        for part in ("train", "valid"):
            rows = "".join(f"the mill,{label}\n" for label in labels * 4)
            (root / "data" / f"{name}_{part}.csv").write_text(f"text,label\n{rows}")
    data = [
        {**section, "train": f"{name}_train.csv", "valid": f"{name}_valid.csv"} for name in ("two", "three")
    ]
    over = ["data=" + ",".join(json.dumps(each) for each in data)]
    line = refused(capsys, monkeypatch, *words(root, tmp_path / "work", over))
    assert "`--over data` has the labels a, b, c beside a, b" in line


def test_sweeps_of_other_measures_are_not_compared(done, tmp_path, capsys, monkeypatch):
    facts = facts_of(done.directory)
    other = tmp_path / "other"
    other.mkdir()
    (other / "sweep.md").write_text("")
    (other / "sweep.json").write_text(json.dumps({**facts, "name": "other", "metric": "F1"}))
    line = refused(capsys, monkeypatch, "report", str(done.directory), str(other))
    assert "sweeps of one measure are compared, and these have accuracy, F1" in line
