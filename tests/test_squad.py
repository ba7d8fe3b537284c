"""Runs of SQuAD from the files to the answers, of a tiny BERT whose windows are shorter than a context."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import small_base
import squad_rows
from peft_files import theirs as theirs
from runs import refused
from stopping import told_after
from training import optax_promotes as optax_promotes

import lora_jax
from experiments import config as configs
from experiments.command_line import main
from experiments.metrics import squad as metrics
from experiments.running import baselines
from experiments.running.base import Loaded
from experiments.training.trainer import together
from lora_jax.interop import hf
from lora_jax.models import Bert, BertConfig


CONFIG = {
    "name": "tiny",
    "source": {"paper": None, "note": "a test"},
    "base": {"path": "./bert"},
    "data": {
        "task": "squad",
        "train": "own.json",
        "valid": "own.json",
        "seq_len": 40,
        "doc_stride": 12,
        "max_query_length": 10,
        "max_answer_length": 6,
        "n_best_size": 5,
    },
    "method": {"name": "LoRA", "rank": 4, "alpha": 8},
    "targets": ["(query|key|value|dense)/kernel"],
    "train": {"steps": 120, "batch": 16, "lr": 0.01, "warmup": 4, "log_every": 20, "eval_every": 60},
    "decode": {"batch": 8, "shown": 2},
}


def command(root, done="done", **change):
    (root / "tiny.json").write_text(json.dumps({**CONFIG, **change}))
    return ["run", str(root / "tiny.json"), "--data", str(root), "--workdir", str(root / done)]


def made(root, version, kind="bert"):
    squad_rows.write(root, version)
    squad_rows.write_encoder(root / "bert", kind)
    return root


@pytest.fixture(scope="module", params=["1.1", "2.0"])
def root(request, tmp_path_factory):
    """A finished run of each version: made once, so that nothing may change it."""
    root = made(tmp_path_factory.mktemp("squad"), request.param)
    assert main(command(root)) == 0
    return root


def read(root, name):
    return json.loads((root / "done" / name).read_text("utf-8"))


def questions(root):
    tree = json.loads((root / "own.json").read_text("utf-8"))
    return [node for paragraph in tree["data"][0]["paragraphs"] for node in paragraph["qas"]]


def test_every_answer_is_found(root):
    """Those near either end of the long context too, and none where there is none."""
    texts, report = read(root, "predictions.json"), read(root, "report.json")
    for node in questions(root):
        expected = node["answers"][0]["text"] if node["answers"] else ""
        assert metrics.exact(expected, texts[node["id"]]), (node["question"], texts[node["id"]])
    scores = report["scores"]["after"]
    assert scores["f1"] == scores.get("exact_match", scores.get("exact")) == 1.0
    assert (root / "done" / "predictions.txt").read_text().splitlines() == list(texts.values())
    if len(texts) == 7:
        assert scores["best_f1"] == scores["best_exact"] == scores["NoAns_f1"] == 1.0
    # The long context has several windows.
    assert report["examples"]["train"] > len(texts) + 5 and report["labels"] == ["start", "end"]
    assert report["comparison"]["max_difference"] < 1e-4 < report["comparison"]["max_logit"]


def test_the_log_has_the_metrics(root):
    """F1 first: by it the best checkpoint is chosen."""
    lines = [json.loads(line) for line in (root / "done" / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "valid_loss" in line]
    assert all(list(line)[:3] == ["step", "valid_loss", "f1"] for line in found) and found[-1]["f1"] == 1.0
    assert found[0]["f1"] < 1.0


def test_its_files(root):
    texts, n_best = read(root, "predictions.json"), read(root, "nbest_predictions.json")
    ids = [node["id"] for node in questions(root)]
    assert list(texts) == list(n_best) == ids
    nullable = len(ids) == 7
    for name, each in n_best.items():
        assert sum(one["probability"] for one in each) == pytest.approx(1.0)
        scores = [one["start_logit"] + one["end_logit"] for one in each]
        assert scores == sorted(scores, reverse=True) and ("" in [one["text"] for one in each]) == nullable
        assert texts[name] == each[0]["text"]
    if nullable:
        odds, answers = read(root, "null_odds.json"), read(root, "answers.json")
        for name in ids:
            scores = {one["text"]: one["start_logit"] + one["end_logit"] for one in n_best[name]}
            assert odds[name] == pytest.approx(scores[""] - scores[answers[name]], abs=1e-6)
            assert texts[name] == ("" if odds[name] > 0 else answers[name])


def test_score_gives_its_numbers_again(root, capsys):
    """By the command of its page, with the run's own references and with the official file."""
    page = (root / "done" / "report.md").read_text("utf-8")
    line = next(line for line in page.splitlines() if line.startswith("`python -m experiments score squad"))
    words = line.removeprefix("`python -m experiments ").partition("`")[0].split()
    in_run = [str(root / "done" / word) if word.endswith(".json") else word for word in words]
    official = [str(root / "own.json") if word.endswith("references.json") else word for word in in_run]
    for arguments in (in_run, official):
        capsys.readouterr()
        assert main(arguments) == 0
        found = json.loads(capsys.readouterr().out)
        totals = {name: found.pop(name) for name in list(found) if name.endswith("total")}
        assert found == pytest.approx(read(root, "report.json")["scores"]["after"])
        assert list(totals.values()) in ([], [7, 5, 2])
    assert "## Samples (answered, test inputs)" in page and "When did the mill open?" in page


@pytest.mark.pytorch
def test_the_merged_model_in_pytorch(torch, root):
    import transformers

    done, context = root / "done", squad_rows.MILL
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(done / "merged").eval()
    assert type(model).__name__ == "BertForQuestionAnswering"
    tokenizer = transformers.AutoTokenizer.from_pretrained(done / "merged", local_files_only=True)
    inputs = tokenizer("Who bought the mill?", context, return_tensors="pt", return_offsets_mapping=True)
    (offsets,) = inputs.pop("offset_mapping").tolist()
    with torch.no_grad():
        theirs = model(**inputs)
    ours, params = hf.load(done / "merged")
    arrays = {name: array.numpy() for name, array in inputs.items()}
    logits = ours.apply({"params": params}, **arrays)
    expected = torch.stack([theirs.start_logits, theirs.end_logits], -1).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    first, last = int(theirs.start_logits.argmax()), int(theirs.end_logits.argmax())
    assert context[offsets[first][0] : offsets[last][1]] == "A cook from the town"
    found = read(root, "report.json")["comparison"]["pytorch"]
    assert found["max_difference"] < 1e-4 and not found["keys"]


@pytest.mark.pytorch
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_its_adapter_and_head_in_peft(torch, theirs, root):
    import transformers

    done = root / "done"
    assert json.loads((done / "adapter" / "adapter_config.json").read_text())["modules_to_save"] == [
        "qa_outputs"
    ]
    base = transformers.AutoModelForQuestionAnswering.from_pretrained(root / "bert")
    model = theirs.PeftModel.from_pretrained(base, done / "adapter").eval()
    merged = transformers.AutoModelForQuestionAnswering.from_pretrained(done / "merged").eval()
    ids = torch.tensor([[2, 7, 9, 3, 11, 12, 13, 3]])
    with torch.no_grad():
        for name in ("start_logits", "end_logits"):
            found, expected = (each(input_ids=ids)[name].numpy() for each in (model, merged))
            np.testing.assert_allclose(found, expected, atol=1e-4)
    card = (done / "adapter" / "README.md").read_text()
    assert 'AutoPeftModelForQuestionAnswering.from_pretrained("path/to/adapter")' in card


SHORT = {**CONFIG["train"], "steps": 4, "log_every": 1, "eval_every": 4}


def adapter(done):
    return safetensors.numpy.load_file(done / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A finished run of four steps: made once, so that nothing may change it."""
    root = made(tmp_path_factory.mktemp("short"), "2.0")
    assert main(command(root, train=SHORT)) == 0
    return root


def beside(short, root):
    """A directory with the same base and questions."""
    for name in ("bert", "own.json"):
        (root / name).symlink_to(short / name)
    return root


@pytest.mark.parametrize("name", ["resumed", "on a mesh"])
def test_the_same_result_whatever_happens(short, tmp_path, name):
    """Stopped in the middle, and split over four devices: the head and the adapters end as they did."""
    mesh = {"data": 2, "fsdp": 2} if name == "on a mesh" else {}
    other = command(beside(short, tmp_path), train=SHORT, mesh=mesh)
    if name == "resumed":
        with told_after(2):
            assert main(other) == 0
        assert not (tmp_path / "done" / "report.md").exists()
    assert main(other) == 0
    found, expected = adapter(tmp_path / "done"), adapter(short / "done")
    assert found.keys() == expected.keys() and any("qa_outputs" in key for key in found)
    for key in found:
        # What all tokens share changes no softmax: of the bias Adam follows the rounding of a gradient of
        # zero.
        if name == "resumed" or not key.endswith("qa_outputs.bias"):
            tolerance = 0 if name == "resumed" else 1e-5
            np.testing.assert_allclose(found[key], expected[key], rtol=0, atol=tolerance)


def test_a_run_that_begins_at_another(short, tmp_path):
    """At rate 0 its adapters are those of the finished run, and its head is new."""
    base = {"path": "./bert", "adapter": str(short / "done")}
    train = {**SHORT, "steps": 1, "lr": 0.0, "warmup": 0, "eval_every": 1}
    decode = {"shown": 0, "prompts": 1}
    assert main(command(beside(short, tmp_path), base=base, train=train, decode=decode)) == 0
    found, expected = adapter(tmp_path / "done"), adapter(short / "done")
    heads = [key for key in found if "qa_outputs" in key]
    assert len(heads) == 2 and found.keys() == expected.keys()
    for key in found.keys() - set(heads):
        np.testing.assert_array_equal(found[key], expected[key])
    assert not all(np.array_equal(found[key], expected[key]) for key in heads)
    assert list(read(tmp_path, "predictions.json")) == ["00"]


@pytest.mark.parametrize("kind", ["roberta", "deberta"])
def test_other_encoders(tmp_path, kind):
    """A RoBERTa has no token types, and two marks between the texts."""
    root = made(tmp_path, "2.0", kind)
    train = {**SHORT, "steps": 1, "warmup": 0, "eval_every": 1}
    targets = ["(query|query_proj)/kernel"]
    assert main(command(root, train=train, targets=targets)) == 0
    comparison = read(root, "report.json")["comparison"]
    assert comparison["max_difference"] < 1e-4 < comparison["max_logit"]
    if comparison["pytorch"] is not None:
        assert comparison["pytorch"]["max_difference"] < 1e-4 and not comparison["pytorch"]["keys"]
    assert any("qa_outputs" in key for key in adapter(root / "done"))


def test_a_decoder_has_no_such_head(tmp_path, capsys, monkeypatch):
    squad_rows.write(tmp_path, "1.1")
    small_base.write(tmp_path / "gpt2")
    arguments = command(tmp_path, base={"path": "./gpt2"}, targets=["attn/c_attn/kernel"])
    line = refused(capsys, monkeypatch, *arguments)
    assert "`base` is ./gpt2, a model of the kind 'gpt2', which has no head of the start and the end" in line


@pytest.mark.parametrize("name", ["max_answer_length", "doc_stride", "n_best_size"])
def test_what_its_section_cannot_say(tmp_path, name):
    (tmp_path / "tiny.json").write_text(json.dumps({**CONFIG, "data": {**CONFIG["data"], name: 0}}))
    with pytest.raises(ValueError, match=f"`data.{name}` must be at least 1, got 0"):
        configs.load(tmp_path / "tiny.json")


def test_outputs_of_batches_of_several_widths():
    arrays = [np.random.default_rng(width).normal(size=(2, width, 2)) for width in (3, 5, 4)]
    found = together(arrays)
    assert found.shape == (6, 5, 2)
    for place, array in enumerate(arrays):
        rows = found[2 * place : 2 * place + 2]
        np.testing.assert_array_equal(rows[:, : array.shape[1]], array)
        assert not rows[:, array.shape[1] :].any()


@pytest.mark.parametrize("file", ["minilm_lora_squad", "minilm_lora_squad2"])
def test_the_configs_that_ship(file):
    path = Path(configs.__file__).resolve().parent.parent / "configs" / "squad" / f"{file}.json"
    config = configs.load(path)
    train = config.train
    assert config.name == file and train.steps % train.eval_every == 0 and train.result == "best"
    model = Bert(BertConfig.named("all-MiniLM-L6-v2"), head="question_answering")
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    pattern = Loaded(model, None, None, path, "").head
    targets = baselines.targets(config, configs.method_value(config.method), pattern)
    # Of each layer four matrices of attention and the two of the MLP, by LoRA of rank 16; and the new head.
    expected = 6 * 16 * (4 * (384 + 384) + 2 * (384 + 1536)) + 384 * 2 + 2
    assert lora_jax.count(lora_jax.lorafy(shapes, targets).delta) == expected
