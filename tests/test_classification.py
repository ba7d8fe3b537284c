"""The user's own rows of labels: their files, their faults, and runs of an encoder and of a decoder."""

import csv
import json
import types

import glue_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_base
from runs import refused
from training import optax_promotes as optax_promotes

from experiments import tasks
from experiments.command_line import main
from experiments.running import starts
from experiments.strict_json import build
from lora_jax.interop import hf


ROWS = [(*glue_files.texts(number), "open" if number % 2 else "shut") for number in range(12)]


def section(**values):
    given = {"task": "classification", "train": "train.csv", "valid": "train.csv", "text": "said"}
    return build(tasks.Section, given | values, "data")


def write(file, rows=ROWS, names=("said", "then", "label")):
    if file.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
        file.write_text("\n".join(lines) + "\n")
        return
    with file.open("w", newline="") as handle:
        csv.writer(handle, delimiter="\t" if file.suffix == ".tsv" else ",").writerows([names, *rows])


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_every_form_has_the_same_rows(tmp_path, suffix):
    """Quotation marks, commas and line ends in a text, too."""
    rows = [('the "mill", opens', "a\nline", "x,y"), *ROWS]
    write(tmp_path / f"train.{suffix}", rows)
    names = {"train": f"train.{suffix}", "valid": f"train.{suffix}", "predict": f"train.{suffix}"}
    found = tasks.read(section(**names, pair="then"), tmp_path)
    assert found.labels == ("open", "shut", "x,y")
    assert [(row.first, row.second, row.label) for row in found.rows["train"]] == rows
    assert [row.label for row in found.further["train"]] == [None] * 13
    assert {row.second for row in tasks.read(section(**names), tmp_path).rows["train"]} == {None}


def test_numbers_are_labels_too(tmp_path):
    write(tmp_path / "train.jsonl", [("a", "b", 1), ("c", "d", 0), ("e", "f", True)])
    names = {"train": "train.jsonl", "valid": "train.jsonl"}
    assert tasks.read(section(**names), tmp_path).labels == ("0", "1", "true")


@pytest.mark.parametrize(
    "name, text, values, message",
    [
        ("a.csv", "", {}, r"a.csv` has the columns none, and `data.text` is 'said'"),
        ("a.csv", "said,label\n", {}, "a.csv` is empty: it has no row"),
        ("a.csv", "said,label\nx,1\ny\n", {}, "a.csv` row 3 has 1 columns, and must have 2: said, label"),
        (
            "a.csv",
            "text,label\nx,1\n",
            {},
            "has the columns text, label, and `data.text` is 'said': name one",
        ),
        ("a.csv", 'said,label\n"x,1\n', {}, "a.csv` cannot be read: unexpected end of data"),
        ("a.csv", "said,label\nx,1\ny,1\n", {}, "has the one label '1': a head needs two"),
        (
            "a.csv",
            "said,label\nx,1\n",
            {"labels": ["1", "2"]},
            "has no row with the label 2 among the 1 that",
        ),
        (
            "a.csv",
            "said,label\nx,1\ny,3\n",
            {"labels": ["1", "2"]},
            "row 3: the label is '3', and must be one",
        ),
        (
            "a.csv",
            "said,label\nx,1\ny,\n",
            {"task": "regression"},
            "row 3: the score is '', and must be a num",
        ),
        ("a.jsonl", '{"said": "x", "label": 1}\n{"said"', {}, "a.jsonl` row 2 is not valid JSON"),
        ("a.jsonl", "[1]\n", {}, "a.jsonl` row 1 is no object of JSON"),
        (
            "a.jsonl",
            '{"said": "x"}\n',
            {},
            "a.jsonl` row 1 has the columns said, and `data.label` is 'label'",
        ),
        ("a.jsonl", '{"said": null, "label": 1}\n', {}, "row 1: `said` is null, and must be a text"),
        ("a.txt", "x", {}, "a.txt` is none of .csv, .tsv, .jsonl"),
    ],
)
def test_faults_of_files_are_named(tmp_path, name, text, values, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        tasks.read(section(train=name, valid=name, **values), tmp_path)


def test_a_label_that_training_has_not(tmp_path):
    write(tmp_path / "train.csv")
    write(tmp_path / "valid.csv", [*ROWS[:2], ("a", "b", "ajar")])
    with pytest.raises(
        ValueError, match=r"valid.csv` row 4: the label is 'ajar', and must be one of open, shut"
    ):
        tasks.read(section(valid="valid.csv"), tmp_path)


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"metric": "Pearson"},
            "`data.metric` is 'Pearson', and classification has accuracy, macro F1, Matt",
        ),
        ({"task": "regression", "labels": ["a", "b"]}, "`data.labels` are two or more classes"),
    ],
)
def test_what_a_section_cannot_say(values, message):
    with pytest.raises(ValueError, match=message):
        section(**values)


class Words:
    """A tokenizer of words, whose ids are their lengths."""

    pad_token_id = 0

    def __call__(self, texts, **how):
        return {"input_ids": [[len(word) for word in text.split()] for text in texts]}


@pytest.mark.parametrize(
    "said, expected", [("balanced", [12 / (3 * 7), 12 / (3 * 4), 12 / 3]), ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])]
)
def test_class_weights(tmp_path, said, expected):
    """Balanced is as scikit-learn has it: rows / (classes · rows of the class)."""
    write(tmp_path / "train.csv", [("a", "b", label) for label in "xxxxxxxyyyyz"])
    data = section(class_weights=said)
    train = tasks.prepare(data, tasks.read(data, tmp_path), Words()).train
    batch = train.batch(np.array([0, 7, 11, -1]))
    np.testing.assert_allclose(batch["mask"][:, 0], [*expected, 0], rtol=1e-6)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"class_weights": [1.0, 0.0]}, r"`data.class_weights` must be positive numbers, got \[1.0, 0.0\]"),
        ({"class_weights": [1.0]}, "`data.class_weights` has 1 numbers, and the labels are 2: open, shut"),
        ({"task": "regression", "class_weights": "balanced"}, "are of classes, and regression has a score"),
    ],
)
def test_class_weights_that_do_not_fit(tmp_path, values, message):
    regression = values.get("task") == "regression"
    write(tmp_path / "train.csv", [(*row[:2], "1.5") for row in ROWS] if regression else ROWS)
    data = section(**values)
    with pytest.raises(ValueError, match=message):
        tasks.prepare(data, tasks.read(data, tmp_path), Words())


def ran(root, base, **data):
    config = {
        "name": "own",
        "source": {"paper": None},
        "base": {"path": base},
        "data": {"text": "said", "label": "label", "train": "train.csv", "valid": "train.csv", **data},
        "method": {"name": "LoRA", "rank": 2},
        "targets": ["attn/c_attn/kernel" if base == "./gpt2" else "attention/self/(query|value)/kernel"],
        "train": {"steps": 2, "batch": 4, "lr": 0.01, "log_every": 1, "eval_every": 2},
        "decode": {"batch": 8, "shown": 1},
    }
    (root / "own.json").write_text(json.dumps(config))
    done = root / "done"
    assert main(["run", str(root / "own.json"), "--data", str(root), "--workdir", str(done)]) == 0
    return json.loads((done / "report.json").read_text()), done


def test_a_decoder_with_a_head_of_classes(tmp_path):
    """Its pad is the end of text, which its head looks for."""
    write(tmp_path / "train.csv", ROWS)
    write(tmp_path / "new.jsonl", [(*row[:2], "") for row in ROWS[:3]])
    small_base.write(tmp_path / "gpt2")
    facts, done = ran(tmp_path, "./gpt2", task="classification", predict="new.jsonl", metric="macro F1")
    assert facts["comparison"]["max_difference"] < 1e-5 < facts["comparison"]["max_logit"]
    assert list(facts["scores"]["after"]) == ["accuracy", "macro F1", "Matthews"]
    lines = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    assert list(lines[-1]) == ["step", "valid_loss", "macro F1", "accuracy", "Matthews"]
    further = (done / "further" / "new.tsv").read_text().splitlines()
    assert further[0] == "index\tprediction\topen\tshut" and len(further) == 4
    # The first three rows are those of training: alone and in another batch they have the same answer.
    known = [line.split("\t") for line in (done / "probabilities.tsv").read_text().splitlines()[1:4]]
    for line, row in zip(further[1:], known, strict=True):
        np.testing.assert_allclose(
            np.array(line.split("\t")[2:], float), np.array(row[3:], float), rtol=0, atol=2e-6
        )


def test_a_regression(tmp_path):
    write(tmp_path / "train.csv", [(*row[:2], str(number / 4)) for number, row in enumerate(ROWS)])
    glue_files.write_bert(tmp_path / "bert")
    facts, done = ran(tmp_path, "./bert", task="regression", pair="then", seq_len=40)
    assert list(facts["scores"]["after"]) == ["Pearson", "Spearman"] and facts["labels"] == ["score"]
    head, first, *_ = (done / "probabilities.tsv").read_text().splitlines()
    assert head == "index\treference\tprediction" and len(first.split("\t")) == 3
    assert json.loads((done / "merged" / "config.json").read_text())["problem_type"] == "regression"
    # Two steps of at most the rate, from the mean of the scores.
    bias = hf.load(done / "merged")[1]["classifier"]["bias"]
    np.testing.assert_allclose(bias, sum(range(12)) / 4 / 12, rtol=0, atol=0.03)


def test_the_bias_of_a_new_head_begins_at_the_mean():
    """That of one output, where nothing has trained it: no other, and none of a head that the base has."""
    part = {"dense": {"bias": jnp.zeros(4)}, "out_proj": {"bias": jnp.zeros(1), "kernel": jnp.zeros((4, 1))}}
    delta = {"classifier": part, "encoder": {"bias": jnp.zeros(1)}}
    loaded = types.SimpleNamespace(head="classifier/.*")
    found = starts.with_bias(2.5, loaded, delta)
    assert found["classifier"]["out_proj"].pop("bias").tolist() == [2.5]
    assert len(jax.tree.leaves(found)) == 3 and not any(map(np.any, jax.tree.leaves(found)))
    trained = {"classifier": {"bias": jnp.full(1, 0.1)}}
    assert starts.with_bias(2.5, loaded, trained)["classifier"]["bias"] == trained["classifier"]["bias"]
    assert starts.with_bias(2.5, types.SimpleNamespace(head=None), delta) is delta


def test_a_base_without_such_a_head(tmp_path, capsys, monkeypatch):
    write(tmp_path / "train.csv")
    config = {
        "name": "own",
        "source": {"paper": None},
        "base": {
            "architecture": {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16},
            "tokenizer": str(small_base.TOKENIZER),
        },
        "data": {
            "task": "classification",
            "train": "train.csv",
            "valid": "train.csv",
            "text": "said",
            "seq_len": 16,
        },
        "method": {"name": "LoRA", "rank": 2},
        "targets": ["attn/c_attn/kernel"],
        "train": {"steps": 2, "batch": 4, "lr": 0.01},
    }
    (tmp_path / "own.json").write_text(json.dumps(config))
    line = refused(
        capsys, monkeypatch, "run", tmp_path / "own.json", "--data", tmp_path, "--workdir", tmp_path / "w"
    )
    assert "`base.architecture` is a GPT-2 to be pretrained, and the task has labels" in line
