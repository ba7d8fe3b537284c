"""GLUE: its files, its metrics, its loss, and one run from the files to the scores."""

import json
import types

import glue_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from peft_files import theirs as theirs
from runs import refused
from stopping import told_after
from training import optax_promotes as optax_promotes

from experiments import tasks
from experiments.command_line import main
from experiments.metrics import classes as metrics
from experiments.strict_json import build
from experiments.tasks import glue
from experiments.tasks.losses import of_classes
from experiments.tasks.sentences import Sentence, Sentences


def section(name, **values):
    return build(tasks.Section, {"task": f"glue/{name}", **values}, "data")


@pytest.mark.parametrize("name", glue_files.FORMS)
@pytest.mark.parametrize("own", [False, True], ids=["below glue/", "its own directory"])
def test_its_official_files(tmp_path, name, own):
    place = glue_files.write(tmp_path / "glue", name)
    directory = str(place.relative_to(tmp_path)) if own else "glue"
    found = tasks.read(section(name, directory=directory, submit=True), tmp_path)
    assert set(found.labels) == ({"score"} if name == "stsb" else set(glue_files.labels(name)))
    pair = name not in ("cola", "sst2")
    expected = [glue_files.texts(number) for number in range(12)]
    assert [(row.first, row.second) for row in found.rows["train"]] == [
        (one, two if pair else None) for one, two in expected
    ]
    kinds = glue_files.labels(name)
    assert [row.label for row in found.rows["train"]] == [kinds[number % len(kinds)] for number in range(12)]
    assert [row.part for row in found.rows["valid"]] == (
        ["matched"] * 6 + ["mismatched"] * 6 if name == "mnli" else [None] * 6
    )
    assert set(found.further) == {"MNLI-m", "MNLI-mm"} if name == "mnli" else {place.name}
    ((first, *_), *_) = found.further.values()
    assert first.label is None and first.first == glue_files.texts(62)[0] and first.index == "0"


def test_lines_of_qqp_that_are_cut_off_are_left_out(tmp_path):
    file = glue_files.write(tmp_path, "qqp") / "train.tsv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], "1\t1\t2\tthe mill", *lines[2:]]) + "\n")
    assert len(tasks.read(section("qqp", directory="."), tmp_path).rows["train"]) == 12


def test_only_scores_have_a_mean_at_which_a_head_begins():
    found = {name: task.head_bias for name, task in tasks.TASKS.items() if task.head_bias is not None}
    assert set(found) == {"glue/stsb", "regression"}
    examples = types.SimpleNamespace(targets=np.array([0.5, 5.0, 2.25]))
    assert [bias(examples) for bias in found.values()] == pytest.approx([7.75 / 3] * 2)


@pytest.mark.parametrize("name", ["cola", "mnli", "stsb"])
def test_of_datasets(tmp_path, name):
    """Labels are numbers there, in an order of their own, and -1 in test sets."""
    datasets = pytest.importorskip("datasets", reason="pip install 'lora_jax[experiments]'")
    found = glue.SETS[name]
    kinds = {"cola": [0, 1, 1], "mnli": [0, 1, 2], "stsb": [0.5, 5.0, 2.25]}[name]

    def split(labels):
        texts = {column: [f"{column} {number}" for number in range(3)] for column in found.hub}
        return datasets.Dataset.from_dict({**texts, "label": labels, "idx": [0, 1, 2]})

    splits = ("validation_matched", "validation_mismatched") if name == "mnli" else ("validation",)
    tests = ("test_matched", "test_mismatched") if name == "mnli" else ("test",)
    given = {"train": kinds, **dict.fromkeys(splits, kinds), **dict.fromkeys(tests, [-1, -1, -1])}
    whole = datasets.DatasetDict({part: split(labels) for part, labels in given.items()})
    whole.save_to_disk(str(tmp_path / "saved"))
    read = tasks.read(section(name, dataset="saved", submit=True), tmp_path)
    expected = {
        "cola": ["0", "1", "1"],
        "mnli": list(glue_files.LABELS["mnli"]),
        "stsb": ["0.5", "5.0", "2.25"],
    }
    assert [row.label for row in read.rows["train"]] == expected[name]
    assert read.rows["train"][2].first == f"{found.hub[0]} 2"
    assert len(read.rows["valid"]) == 3 * len(splits) and all(
        len(rows) == 3 for rows in read.further.values()
    )
    with pytest.raises(ValueError, match="has the columns .*label, idx; QNLI has question, sentence, label"):
        tasks.read(section("qnli", dataset="saved"), tmp_path)


@pytest.mark.parametrize(
    "name, change, message",
    [
        (
            "rte",
            lambda lines: [*lines[:3], "2\tthe mill"],
            r"train.tsv` row 4 has 2 columns, and must have 4",
        ),
        (
            "rte",
            lambda lines: [*lines[:3], "2\ta\tb\tmaybe"],
            "row 4: the label is 'maybe', and must be one of",
        ),
        ("stsb", lambda lines: [*lines[:2], lines[2].replace("0.500", "n/a")], "row 3: the score is 'n/a'"),
        ("cola", lambda lines: [], "train.tsv` is empty"),
        ("mrpc", lambda lines: lines[:1], "train.tsv` is empty: it has no row"),
        ("sst2", lambda lines: lines[:2], "has no row with the label 1 among the 1 that train"),
        ("qnli", lambda lines: ["index\tsentence1\tsentence2\tlabel"], "has the columns index, sentence1"),
    ],
)
def test_faults_of_files_are_named(tmp_path, name, change, message):
    file = glue_files.write(tmp_path, name) / "train.tsv"
    file.write_text("\n".join(change(file.read_text("utf-8").splitlines())))
    with pytest.raises(ValueError, match=message):
        tasks.read(section(name, directory="."), tmp_path)


def test_a_set_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="`data.directory` names the directory of QNLI, or of all"):
        tasks.read(section("qnli"), tmp_path)


def test_metrics_are_scipys():
    """Matthews' correlation of two labels is Pearson's of 0 and 1."""
    import scipy.stats

    draw = np.random.default_rng(0)
    one, other = draw.integers(0, 2, (2, 200))
    words = lambda array: [str(value) for value in array]
    assert metrics.matthews(words(one), words(other)) == pytest.approx(np.corrcoef(one, other)[0, 1])
    assert metrics.f1(words(one), words(other)) == pytest.approx(
        2 * (one & other).sum() / (one.sum() + other.sum())
    )
    scores, guesses = draw.integers(0, 9, 200) / 2.0, draw.normal(size=200).round(1)
    assert metrics.pearson(scores, guesses) == pytest.approx(scipy.stats.pearsonr(scores, guesses).statistic)
    assert metrics.spearman(scores, guesses) == pytest.approx(
        scipy.stats.spearmanr(scores, guesses).statistic
    )
    assert metrics.matthews(["1"] * 4, ["0", "1"] * 2) == metrics.pearson([1.0, 2.0], [3.0, 3.0]) == 0


def test_matthews_of_three_labels():
    """Gorodkin's R_K in its other form, of the counts of a confusion matrix."""
    draw = np.random.default_rng(1)
    one, other = draw.integers(0, 3, (2, 90))
    table = np.zeros((3, 3))
    np.add.at(table, (one, other), 1)
    total, right, rows, columns = table.sum(), np.trace(table), table.sum(1), table.sum(0)
    expected = (right * total - rows @ columns) / np.sqrt(
        (total**2 - columns @ columns) * (total**2 - rows @ rows)
    )
    found = metrics.matthews([str(value) for value in one], [str(value) for value in other])
    assert found == pytest.approx(expected)


@pytest.mark.pytorch
@pytest.mark.parametrize("kind", ["classes", "weights", "smoothing", "score"])
def test_the_loss_is_pytorchs(torch, kind):
    draw = np.random.default_rng(2)
    logits = jnp.asarray(draw.normal(size=(5, 1 if kind == "score" else 3)), jnp.float32)
    weights = (0.5, 2.0, 1.0) if kind == "weights" else None
    targets = [0.5, 2.0, 1.0, 5.0] if kind == "score" else [0, 2, 1, 1]
    examples = Sentences([Sentence("", (1, 2), ())] * 4, targets, 8, weights=weights)
    piece = examples.batch(np.array([0, 1, 2, 3, -1]))
    smoothing = 0.1 if kind == "smoothing" else 0.0
    found, counted = of_classes(lambda ids, attention_mask: logits, piece, smoothing)
    theirs = torch.tensor(np.asarray(logits[:4]))
    if kind == "score":
        expected = torch.nn.functional.mse_loss(theirs[:, 0], torch.tensor(targets))
    else:
        chosen = None if weights is None else torch.tensor(weights)
        expected = torch.nn.functional.cross_entropy(
            theirs, torch.tensor(targets), weight=chosen, label_smoothing=smoothing
        )
    assert float((found * counted).sum() / counted.sum()) == pytest.approx(float(expected), rel=1e-5)


CONFIG = {
    "name": "tiny",
    "source": {"paper": "a paper", "expected": {"accuracy": 86.6}},
    "base": {"path": "./bert"},
    "data": {"task": "glue/rte", "submit": True, "seq_len": 40},
    "method": {"name": "LoRA", "rank": 2},
    "targets": ["attention/self/(query|value)/kernel"],
    "train": {
        "steps": 12,
        "batch": 4,
        "lr": 0.05,
        "log_every": 1,
        "eval_every": 3,
        "checkpoint_every": 100,
        "result": "best",
    },
    "decode": {"batch": 4, "shown": 2},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A finished run of glue/rte: made once, so that nothing may change it."""
    root = tmp_path_factory.mktemp("glue")
    glue_files.write(root / "glue", "rte")
    glue_files.write_bert(root / "bert")
    (root / "tiny.json").write_text(json.dumps(CONFIG))
    assert main(["run", str(root / "tiny.json"), "--data", str(root), "--workdir", str(root / "done")]) == 0
    return root


@pytest.fixture(scope="module")
def facts(root):
    return json.loads((root / "done" / "report.json").read_text())


def test_its_head_trains_whole_beside_the_adapters(facts):
    assert facts["trainable"] == 2 * 2 * (16 + 16) + 16 * 2 + 2
    assert facts["labels"] == ["entailment", "not_entailment"]
    assert facts["comparison"]["max_difference"] < 1e-5 < facts["comparison"]["max_logit"]


def test_the_best_by_the_metric_is_exported(root, facts):
    lines = [json.loads(line) for line in (root / "done" / "metrics.jsonl").read_text().splitlines()]
    seen = {line["step"]: line["accuracy"] for line in lines if "accuracy" in line and line["step"]}
    assert list(seen) == [3, 6, 9, 12] and len(set(seen.values())) > 1
    best = max(seen, key=lambda step: (seen[step], -step))
    assert facts["result"] == f"step {best}, which is the best in validation by the task's metric"
    assert facts["scores"]["after"]["accuracy"] == seen[best]


def test_its_page(root):
    page = (root / "done" / "report.md").read_text()
    assert "| published | 86.6 |" in page and "## Samples (labelled, test inputs)" in page
    card = (root / "done" / "adapter" / "README.md").read_text()
    assert "AutoPeftModelForSequenceClassification" in card and "num_labels=2" in card


@pytest.mark.pytorch
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_its_adapter_and_head_in_peft(torch, theirs, root):
    """The probabilities of `probabilities.tsv`, by PEFT on the base."""
    import transformers

    done = root / "done"
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "bert", local_files_only=True)
    rows = [line.split("\t") for line in (done / "probabilities.tsv").read_text().splitlines()]
    assert rows[0] == ["index", "reference", "prediction", "entailment", "not_entailment"]
    base = transformers.AutoModelForSequenceClassification.from_pretrained(root / "bert", num_labels=2)
    model = theirs.PeftModel.from_pretrained(base, done / "adapter").eval()
    assert len(rows) == 7
    for number, row in enumerate(rows[1:]):
        inputs = tokenizer(*glue_files.texts(12 + number), return_tensors="pt")
        with torch.no_grad():
            expected = model(**inputs).logits.softmax(-1)[0].numpy()
        np.testing.assert_allclose([float(cell) for cell in row[3:]], expected, atol=2e-6)
        assert row[2] == rows[0][3 + int(expected.argmax())]


def test_the_submission(root):
    lines = (root / "done" / "submission" / "RTE.tsv").read_text().splitlines()
    further = [line.split("\t") for line in (root / "done" / "further" / "RTE.tsv").read_text().splitlines()]
    assert lines == ["index\tprediction", *(f"{number}\t{row[1]}" for number, row in enumerate(further[1:]))]
    assert len(lines) == 7


def test_score_gives_its_numbers_again(root, facts, capsys):
    done = root / "done"
    files = ["--refs", str(done / "references.txt"), "--hyps", str(done / "predictions.txt")]
    assert main(["score", "glue/rte", *files]) == 0
    assert json.loads(capsys.readouterr().out) == facts["scores"]["after"]


def test_an_encoder_has_no_next_token(root, capsys, monkeypatch, tmp_path):
    config = {**CONFIG, "data": {"task": "text", "train": "a.txt", "valid": "a.txt", "seq_len": 8}}
    (root / "a.txt").write_text("the mill opens again\n\n" * 8)
    (root / "text.json").write_text(json.dumps(config))
    line = refused(
        capsys, monkeypatch, "run", root / "text.json", "--data", root, "--workdir", tmp_path / "run"
    )
    assert "`base` is ./bert, a Bert, which has no next token: a task of labels, such as glue/mrpc" in line


def test_padding_changes_nothing(root):
    from experiments.config import Base, Mesh, Precision
    from experiments.running.base import load, Places
    from experiments.tasks.losses import extras
    from experiments.training.sharded import make_mesh

    loaded = load(
        Base(path="./bert"),
        Places(root, root, root, None, root),
        jax.random.key(0),
        make_mesh(Mesh()),
        Precision(),
        ("no", "yes"),
    )
    contents = tasks.read(section("rte"), root)
    examples = tasks.prepare(section("rte", seq_len=40), contents, loaded.tokenizer).train
    run = lambda batch: loaded.model.apply({"params": loaded.params}, batch["input_ids"], **extras(batch))
    longest = int(examples.lengths.argmax())
    together = run(examples.batch(np.array([int(examples.lengths.argmin()), longest, -1])))
    alone = run(examples.batch(np.array([int(examples.lengths.argmin())]), int(examples.lengths.min())))
    np.testing.assert_allclose(together[:1], alone, atol=1e-6)
    assert np.isfinite(together).all()


@pytest.mark.parametrize("name", ["resumed", "on a mesh"])
def test_the_same_result_whatever_happens(root, tmp_path, name):
    """Stopped in the middle, and split over four devices: the head and the adapters end as they did."""
    mesh = {"data": 2, "fsdp": 2} if name == "on a mesh" else {}
    (tmp_path / "bert").symlink_to(root / "bert")
    (tmp_path / "tiny.json").write_text(json.dumps({**CONFIG, "mesh": mesh}))
    command = ["run", str(tmp_path / "tiny.json"), "--data", str(root), "--workdir", str(tmp_path / "done")]
    if name == "resumed":
        with told_after(5):
            assert main(command) == 0
        assert not (tmp_path / "done" / "report.md").exists()
    assert main(command) == 0
    read = lambda done: safetensors.numpy.load_file(done / "adapter" / "adapter_model.safetensors")
    found, expected = read(tmp_path / "done"), read(root / "done")
    assert found.keys() == expected.keys() and any("classifier" in key for key in found)
    for key in found:
        np.testing.assert_allclose(found[key], expected[key], rtol=0, atol=0 if name == "resumed" else 1e-5)


def test_score_of_a_part_of_mnli(tmp_path, capsys):
    """All matched inputs are right here, and no other."""
    matched, mismatched = (len(places) for places in tasks.TASKS["glue/mnli"].parts.values())
    (tmp_path / "refs").write_text("\n\n".join(["neutral"] * (matched + mismatched)) + "\n")
    (tmp_path / "hyps").write_text("neutral\n" * matched + "entailment\n" * mismatched)
    command = ["score", "glue/mnli", "--refs", str(tmp_path / "refs"), "--hyps", str(tmp_path / "hyps")]
    for part, expected in (("matched", 1.0), ("mismatched", 0.0), ("all", 9815 / 19647)):
        assert main([*command, "--filter", part]) == 0
        assert json.loads(capsys.readouterr().out) == {"accuracy": expected}
