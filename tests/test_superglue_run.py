"""Runs of SuperGLUE from the files to the scores: classes (CB), candidates that are compared (COPA) and
candidates that are right by themselves (ReCoRD).
"""

import json

import glue_files
import numpy as np
import pytest
import safetensors.numpy
import superglue_files
from test_glue import CONFIG
from training import optax_promotes as optax_promotes

from experiments.command_line import main


def run(root, name, **changes):
    """The work directory of a finished run of the set, and its report's facts."""
    superglue_files.write(root / "superglue", name)
    if not (root / "bert").exists():
        glue_files.write_bert(root / "bert")
    data = {"task": f"superglue/{name}", "submit": True, "seq_len": 40}
    train = {**CONFIG["train"], "result": "last"}
    config = {**CONFIG, "source": {"paper": None}, "data": data, "train": train, **changes}
    (root / f"{name}.json").write_text(json.dumps(config))
    done = root / f"done_{name}_{len(changes)}"
    command = ["run", str(root / f"{name}.json"), "--data", str(root), "--workdir", str(done)]
    assert main(command) == 0
    return done, json.loads((done / "report.json").read_text())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("superglue")


@pytest.fixture(scope="module")
def copa(root):
    return run(root, "copa")


def cells(file):
    return [line.split("\t") for line in file.read_text().splitlines()]


def scored_again(name, done, capsys):
    capsys.readouterr()
    files = ["--refs", str(done / "references.txt"), "--hyps", str(done / "predictions.txt")]
    assert main(["score", f"superglue/{name}", *files]) == 0
    return json.loads(capsys.readouterr().out)


def test_cb(root, capsys):
    done, facts = run(root, "cb")
    assert facts["labels"] == list(superglue_files.COMMITMENTS)
    assert facts["comparison"]["max_difference"] < 1e-5 < facts["comparison"]["max_logit"]
    assert list(facts["scores"]["after"]) == ["accuracy", "macro F1"]
    assert scored_again("cb", done, capsys) == facts["scores"]["after"]
    further = cells(done / "further" / "CB.tsv")
    lines = [json.loads(line) for line in (done / "submission" / "CB.jsonl").read_text().splitlines()]
    assert lines == [{"idx": number, "label": row[1]} for number, row in enumerate(further[1:])]
    page = (done / "report.md").read_text()
    assert f"| this run | {100 * facts['scores']['after']['accuracy']:.2f} " in page
    assert f" {100 * facts['scores']['after']['macro F1']:.2f} |" in page


def test_copa_trains_one_output(copa, capsys):
    done, facts = copa
    assert facts["trainable"] == 2 * 2 * (16 + 16) + 16 + 1 and facts["labels"] == ["score"]
    assert facts["examples"] == {"train": 12, "valid": 6, "test": 6}
    assert facts["comparison"]["max_difference"] < 1e-5 < facts["comparison"]["max_logit"]
    assert scored_again("copa", done, capsys) == facts["scores"]["after"]
    lines = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    assert [line["accuracy"] for line in lines if "accuracy" in line][-1] == facts["scores"]["after"][
        "accuracy"
    ]
    losses = [line["valid_loss"] for line in lines if "valid_loss" in line]
    assert losses[-1] < losses[0]


@pytest.mark.pytorch
def test_copa_is_pytorchs_multiple_choice(torch, copa, root):
    """The loss and the probabilities of `BertForMultipleChoice` with the merged weights."""
    import transformers

    done, _ = copa
    model = transformers.BertForMultipleChoice.from_pretrained(done / "merged").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "bert", local_files_only=True)
    rows = cells(done / "probabilities.tsv")[1:]
    objects = [json.loads(line) for line in (root / "superglue/COPA/val.jsonl").read_text().splitlines()]
    losses = []
    for place, each in enumerate(objects):
        asked = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}
        first = f"{each['premise']} {asked[each['question']]}"
        texts = [first] * 2, [each["choice1"], each["choice2"]]
        inputs = {
            key: value[None] for key, value in tokenizer(*texts, return_tensors="pt", padding=True).items()
        }
        with torch.no_grad():
            found = model(**inputs, labels=torch.tensor([each["label"]]))
        losses.append(float(found.loss))
        chances = found.logits.softmax(-1)[0].numpy()
        own = rows[2 * place : 2 * place + 2]
        np.testing.assert_allclose([float(row[4]) for row in own], chances, atol=2e-6)
        assert [row[:4] for row in own] == [
            [str(place), str(one), str(int(one == each["label"])), str(int(one == chances.argmax()))]
            for one in (0, 1)
        ]
    lines = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    last = [line["valid_loss"] for line in lines if "valid_loss" in line][-1]
    assert last == pytest.approx(np.mean(losses), rel=1e-3)


def test_copa_on_a_mesh_in_parts(root, copa):
    """A question's candidates stay together on a device and in a part of the batch. The head's bias shifts
    all candidates alike: its gradient is rounding, of which AdamW makes steps.
    """
    train = {**CONFIG["train"], "result": "last", "accumulate": 2}
    done, _ = run(root, "copa", mesh={"data": 2}, train=train)
    read = lambda directory: safetensors.numpy.load_file(directory / "adapter" / "adapter_model.safetensors")
    expected = read(copa[0])
    for key, found in read(done).items():
        if key == "base_model.model.classifier.bias":
            continue
        np.testing.assert_allclose(found, expected[key], rtol=0, atol=1e-5)


def test_record(root, capsys):
    done, facts = run(root, "record")
    assert facts["examples"] == {"train": 30, "valid": 15, "test": 6} and facts["labels"] == ["0", "1"]
    assert scored_again("record", done, capsys) == facts["scores"]["after"]
    lines = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "EM" in line][-1]
    assert {name: last[name] for name in ("F1", "EM")} == pytest.approx(facts["scores"]["after"])
    rows = cells(done / "further" / "ReCoRD.tsv")[1:]
    best = {}
    for index, name, _, chance in rows:
        best[index] = max(best.get(index, (0.0, "")), (float(chance), name))
    found = [json.loads(line) for line in (done / "submission" / "ReCoRD.jsonl").read_text().splitlines()]
    assert found == [{"idx": number, "label": name} for number, (_, name) in enumerate(best.values())]
