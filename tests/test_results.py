"""What is committed under `experiments/results/` is what its configs ask for, and follows from the files
beside it.
"""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from experiments import config as configs
from experiments.command_line import main
from experiments.metrics import multi_bleu, score_e2e, values, webnlg


_REPOSITORY = Path(__file__).resolve().parent.parent
_EXPERIMENTS = _REPOSITORY / "experiments"
_RESULTS = _EXPERIMENTS / "results"
_E2E, _WEBNLG = _RESULTS / "e2e_smollm2", _RESULTS / "webnlg_smollm2"


def _runs(directory):
    """By the names of their directories."""
    return {path.parent.name: path.parent for path in sorted(directory.glob("*/report.json"))}


_RATES = _runs(_E2E / "rates")
_TEXTS = {"e2e": _runs(_E2E), "webnlg": _runs(_WEBNLG)}
_INPUTS = {"e2e": 630, "webnlg": 1862}


def _facts(directory):
    return json.loads((directory / "report.json").read_text("utf-8"))


def _config(directory):
    return json.loads((directory / "config.json").read_text("utf-8"))


def _lines(file):
    return file.read_text("utf-8").splitlines()


def test_every_result_can_be_tabled(capsys):
    found = sorted(path.parent for path in _RESULTS.rglob("report.json"))
    assert found
    assert main(["report", *map(str, found)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(found)


@pytest.mark.parametrize("method", ["lora_r8", "full"])
def test_the_rate_is_the_best_of_three_tried(method):
    """By the validation loss after 100 steps. It is neither the lowest nor the highest of them."""
    config = configs.load(_EXPERIMENTS / "configs" / f"e2e_smollm2_{method}.json")
    tried = {
        _config(directory)["train"]["lr"]: _facts(directory)["numbers"]
        for directory in _RATES.values()
        if _config(directory)["name"] == config.name
    }
    assert len(tried) >= 3 and all(found["steps"] == 100 for found in tried.values())
    best = min(tried, key=lambda rate: tried[rate]["valid_loss"])
    assert config.train.lr == best and min(tried) < best < max(tried)


def test_all_rates_were_tried_on_the_same():
    found = [_facts(directory) for directory in _RATES.values()]
    assert len({(facts["base"]["fingerprint"], facts["data"], facts["commit"]) for facts in found}) == 1


@pytest.mark.parametrize("data, row", [(data, row) for data, rows in _TEXTS.items() for row in rows])
def test_a_row_belongs_to_a_config_that_ships(data, row):
    directory = _TEXTS[data][row]
    kept, page = _config(directory), (directory / "report.md").read_text("utf-8")
    shipped = configs.load(_EXPERIMENTS / "configs" / f"{kept['name']}.json")
    assert configs.with_defaults(kept) == configs.to_json(shipped)
    facts = _facts(directory)
    assert len(_lines(directory / "predictions.txt")) == facts["examples"]["test"] == _INPUTS[data]
    assert f"| this run | {100 * facts['scores']['after']['BLEU']:.2f} |" in page


@pytest.mark.parametrize("data", _TEXTS)
def test_the_rows_are_comparable(data):
    """One base, the same data in the same order, as many steps; LoRA's rows have one rate. The fingerprint of
    the data holds `seq_len`, which is longer where a prefix has room of its own: that such a row saw the same
    examples is told by the tokens of its steps.
    """
    rows = _TEXTS[data].values()
    facts, kept = [_facts(directory) for directory in rows], [_config(directory) for directory in rows]
    assert len({(found["base"]["fingerprint"], found["numbers"]["steps"]) for found in facts}) <= 1
    assert len({json.dumps({**config["data"], "seq_len": None}, sort_keys=True) for config in kept}) <= 1
    read = {(config["data"]["seq_len"], found["data"]) for config, found in zip(kept, facts, strict=True)}
    assert len(read) == len({length for length, _ in read})
    steps = [[json.loads(line) for line in _lines(directory / "metrics.jsonl")] for directory in rows]
    assert len({tuple((at["step"], at["tokens"]) for at in run if "tokens" in at) for run in steps}) <= 1
    assert len({(config["seed"], config["train"]["batch"]) for config in kept}) <= 1
    assert len({config["train"]["lr"] for config in kept if config["method"]["name"] != "Full"}) <= 1


def test_lora_is_level_with_full_fine_tuning():
    """Within one BLEU, above 60, and no fewer values named; from a base that does none of it."""
    lora, full = (_facts(_TEXTS["e2e"][row]) for row in ("lora_r8", "full"))
    assert lora["scores"]["after"]["BLEU"] > max(0.60, full["scores"]["after"]["BLEU"] - 0.01)
    assert lora["values"]["after"]["values"] >= full["values"]["after"]["values"]
    assert lora["scores"]["before"]["BLEU"] < 0.01
    assert lora["trainable"] < 0.02 * full["trainable"]


def test_what_is_said_of_the_sweep():
    """Its config ships; one rate is best for each rank, and the highest ends worse than the untouched
    base.
    """
    directory = _RESULTS / "e2e_smollm2_sweep"
    facts, kept = (
        json.loads((directory / name).read_text("utf-8")) for name in ("sweep.json", "config.json")
    )
    swept = kept.pop("sweep")
    shipped = configs.load(_EXPERIMENTS / "configs" / "e2e_smollm2_sweep.json")
    assert configs.with_defaults(kept) == configs.to_json(shipped) and swept["over"] == facts["over"]
    losses = {(row["values"]["method.rank"], row["values"]["train.lr"]): row for row in facts["rows"]}
    assert len(losses) == facts["adapters"] == 12
    for rank in facts["over"]["method.rank"]:
        found = {rate: losses[rank, rate]["valid_loss"] for rate in facts["over"]["train.lr"]}
        assert min(found, key=found.__getitem__) == 2e-3
        assert found[3.2e-2] > losses[rank, 3.2e-2]["first_valid_loss"]
    higher = {
        rank: losses[rank, 8e-3]["valid_loss"] - losses[rank, 2e-3]["valid_loss"] for rank in (1, 4, 16)
    }
    assert max(higher, key=higher.__getitem__) == 1


def _references(path):
    """The wordings of each meaning, meanings in the order of their first line: written apart from the
    pipeline's own.
    """
    groups = {}
    for line in path.read_text("utf-8").splitlines():
        meaning, wording = line.split("||")
        groups.setdefault(meaning.strip(), []).append(wording.strip())
    return groups


_PREDICTIONS = [
    (row, when, directory / file)
    for row, directory in _TEXTS["e2e"].items()
    for when, file in (("after", "predictions.txt"), ("before", "predictions_before.txt"))
    if (directory / file).is_file()
]


@pytest.mark.slow
@pytest.mark.parametrize("row, when, file", _PREDICTIONS, ids=lambda value: getattr(value, "name", value))
def test_committed_predictions_score_as_committed(row, when, file, data_dir, monkeypatch):
    """METEOR takes longer than all others: it is compared for one file, where its package and java are."""
    if (row, when) != ("lora_r8", "after"):
        monkeypatch.setenv("PATH", "")
    groups, texts = _references(data_dir / "e2e" / "lora_nlg_txt" / "test.txt"), _lines(file)
    committed = _facts(file.parent)
    scores = committed["scores"][when]
    assert scores["METEOR"] is not None
    found = score_e2e(list(groups.values()), texts)
    if found["METEOR"] is None:
        del found["METEOR"]
    assert len(found) >= 4
    assert found == pytest.approx({name: scores[name] for name in found}, rel=1e-9, abs=1e-12)
    contexts = _lines(file.parent / "contexts.txt")
    assert contexts == [" ".join(context.split()) for context in groups]
    assert values.score(contexts, texts) == committed["values"][when]


@pytest.mark.parametrize("row", _TEXTS["webnlg"])
def test_a_row_of_webnlg_is_on_its_page(row):
    facts = _facts(_TEXTS["webnlg"][row])
    cells = [f"{facts['trainable']:,}", f"{facts['numbers']['valid_loss']:.3f}"]
    for name, value in facts["scores"]["after"].items():
        cells.append(f"{100 * value:.1f}" if name.startswith("BLEU") else f"{value:.3f}")
    assert len(cells) == 11
    page = (_WEBNLG / "README.md").read_text("utf-8")
    assert f"]({row}/report.md) | {' | '.join(cells)} |" in page


@pytest.fixture(scope="session")
def challenge(data_dir):
    """The contexts of WebNLG's test set with their first six wordings, from a file that no run reads."""
    file = data_dir / "webnlg2017" / "testdata_with_lex.xml"
    if not file.is_file():
        pytest.skip(f"no {file}: set LORA_JAX_DATA to the directory that holds webnlg2017/")
    found = {}
    for entry in ElementTree.parse(file).iter("entry"):
        triples = [triple.text.split(" | ") for triple in entry.iter("mtriple")]
        context = " | ".join(" : ".join(triple) for triple in triples)
        found[" ".join(context.split())] = [wording.text for wording in entry.iter("lex")][:6]
    return found


_PARTS = {"": slice(None), " seen": slice(971), " unseen": slice(971, None)}


@pytest.mark.slow
@pytest.mark.parametrize("row", _TEXTS["webnlg"])
def test_committed_texts_of_webnlg_have_the_bleu_that_is_committed(row, challenge):
    directory = _TEXTS["webnlg"][row]
    assert _lines(_WEBNLG / "contexts.txt") == list(challenge)
    words = [[webnlg.tokenize(wording) for wording in group] for group in challenge.values()]
    padded = [[*group, *([[]] * (6 - len(group)))] for group in words]
    texts = [webnlg.tokenize(text) for text in _lines(directory / "predictions.txt")]
    scores = _facts(directory)["scores"]["after"]
    for part, where in _PARTS.items():
        assert scores[f"BLEU{part}"] == pytest.approx(multi_bleu.score(padded[where], texts[where])), part


def test_lora_generalises_better_on_webnlg():
    """As in the paper: behind full fine-tuning on categories of the training set, and ahead on others."""
    lora, full = (_facts(_TEXTS["webnlg"][row]) for row in ("lora_r8", "full"))
    ahead = {
        name: 100 * (score - full["scores"]["after"][name])
        for name, score in lora["scores"]["after"].items()
        if name.startswith("BLEU")
    }
    assert ahead["BLEU seen"] < 0 < ahead["BLEU"] < ahead["BLEU unseen"]
    page = (_WEBNLG / "README.md").read_text("utf-8").replace("\n", " ")
    assert (
        f"LoRA is {ahead['BLEU unseen']:.1f} BLEU ahead on unseen ones, and {ahead['BLEU']:.1f} on all."
        in page
    )
    assert full["numbers"]["valid_loss"] < lora["numbers"]["valid_loss"]


# --- GLUE from MiniLM ---------------------------------------------------------------------------------------

_MINILM = _RESULTS / "glue_minilm"
_GLUE = {task: _runs(_MINILM / task) for task in ("cola", "mrpc", "rte", "stsb")}


def _accuracy(labels, answers):
    right = sum(label == answer for label, answer in zip(labels, answers, strict=True))
    return {"accuracy": right / len(labels)}


def _f1(labels, answers):
    """Of label 1."""
    both = list(zip(labels, answers, strict=True)).count(("1", "1"))
    return {"F1": 2 * both / (labels.count("1") + answers.count("1"))}


def _correlations(numbers, answers):
    """Pearson's, and that of the ranks; what is equal shares its mean rank."""
    pair = [np.asarray(each, float) for each in (numbers, answers)]
    ranks = [(each[:, None] > each).sum(1) + (each[:, None] == each).sum(1) / 2 for each in pair]
    return {"Pearson": np.corrcoef(*pair)[0, 1], "Spearman": np.corrcoef(*ranks)[0, 1]}


def _matthews(labels, answers):
    """It is Pearson's correlation of two labels (Matthews 1975)."""
    return {"Matthews": _correlations(labels, answers)["Pearson"]}


_SCORES = {
    "cola": (_matthews, _accuracy),
    "mrpc": (_accuracy, _f1),
    "rte": (_accuracy,),
    "stsb": (_correlations,),
}


@pytest.mark.parametrize("task, row", [(task, row) for task, rows in _GLUE.items() for row in rows])
def test_a_row_of_glue_is_its_config_and_its_answers(task, row):
    """The scores are computed by hand here, and the results' table has them."""
    directory = _GLUE[task][row]
    facts, kept = _facts(directory), _config(directory)
    shipped = configs.load(_EXPERIMENTS / "configs" / "glue" / f"{kept['name']}.json", ["base.scan=true"])
    assert configs.with_defaults(kept) == configs.to_json(shipped)
    files = (_MINILM / task / "references.txt", directory / "predictions.txt")
    labels, answers = (file.read_text("utf-8").split() for file in files)
    assert len(labels) == len(answers) == facts["examples"]["valid"]
    found = {name: value for of in _SCORES[task] for name, value in of(labels, answers).items()}
    assert facts["scores"]["after"] == pytest.approx(found, rel=1e-6)
    cells = [f"{facts['trainable']:,}", f"{kept['train']['lr']:g}"]
    cells += [f"{100 * value:.1f}" for value in found.values()]
    line = f"]({task}/{row}/report.md) | {' | '.join(cells)} |"
    assert line in (_MINILM / "README.md").read_text("utf-8")


def test_lora_has_the_best_rate_of_minilms_sweep():
    """On MRPC after the last step. It is the lowest that was tried."""
    lora = configs.load(_EXPERIMENTS / "configs" / "glue" / "minilm_lora_mrpc.json")
    table = json.loads((_MINILM / "mrpc_lora" / "sweep.json").read_text("utf-8"))["table"]
    assert max(table, key=lambda line: line["mean"])["values"] == {"train.lr": lora.train.lr}
    assert min(line["values"]["train.lr"] for line in table) == lora.train.lr


def test_what_is_said_of_a_bias_that_begins_at_zero():
    """The run from zero is LoRA's row but for that, and as far behind after each epoch as the page says."""
    zero, row = _MINILM / "stsb_lora_from_zero", _GLUE["stsb"]["lora"]
    assert _config(zero) == _config(row)
    pearson, better = (
        [line["Pearson"] for line in map(json.loads, _lines(each / "metrics.jsonl")) if "Pearson" in line]
        for each in (zero, row)
    )
    assert len(pearson) == 4 and pearson[0] == pytest.approx(better[0], abs=1e-6)
    assert all(ours > others for ours, others in zip(better[1:], pearson[1:], strict=True))
    page = (_MINILM / "README.md").read_text("utf-8").replace("\n", " ")
    assert f"({pearson[1]:.2f}), and {100 * pearson[3]:.1f} after three." in page
    assert round(100 * (better[3] - pearson[3])) == 6
    assert "gains 6 points" in (_REPOSITORY / "CHANGELOG.md").read_text("utf-8")


_NAMES = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "dora": "DoRA",
    "lorafa": "LoRA-FA",
    "vera": "VeRA",
    "qlora": "QLoRA",
}
_STUDIED = {"cola": "Matthews", "mrpc": "F1", "rte": "accuracy", "stsb": "Pearson"}


@pytest.mark.parametrize("method, name", _NAMES.items())
def test_the_study_stands_beside_ours(method, name):
    """Each number is of our report, and of the study's config, where there is one."""
    cells = []
    for task, metric in _STUDIED.items():
        file = _EXPERIMENTS / "configs" / "glue" / f"reproduction_{method}_{task}.json"
        theirs = f" {configs.load(file).source.expected[metric]:.1f} " if file.is_file() else " "
        ours = _facts(_GLUE[task][method])["scores"]["after"] if method in _GLUE[task] else None
        cells += [" " if ours is None else f" {100 * ours[metric]:.1f} ", theirs]
    assert f"\n| {name} |{'|'.join(cells)}|\n" in (_MINILM / "README.md").read_text("utf-8")


def test_what_is_said_of_lorafas_rate():
    """At LoRA's rate it is hardly above one answer for all; its row has four times this rate."""
    slow, row = _MINILM / "mrpc_lorafa_5e-4", _GLUE["mrpc"]["lorafa"]
    rate, lora = (_config(each)["train"]["lr"] for each in (slow, _GLUE["mrpc"]["lora"]))
    assert rate == lora and _config(row)["train"]["lr"] == pytest.approx(4 * rate)
    labels = _lines(_MINILM / "mrpc" / "references.txt")
    found, better = (_facts(each)["scores"]["after"]["accuracy"] for each in (slow, row))
    one_answer = labels.count("1") / 408
    assert one_answer < found < one_answer + 0.03 < better
    page = (_MINILM / "README.md").read_text("utf-8").replace("\n", " ")
    assert f"has an accuracy of {100 * found:.1f} after" in page
    assert f"always the same answer has {100 * one_answer:.1f}." in page
    assert f"at 5e-4 the accuracy is {100 * found:.1f} after" in _config(row)["source"]["note"]


@pytest.mark.parametrize(
    "method, tried, times, said",
    [
        ("lorafa", "cola_lorafa_2e-3", 0.5, "[half its rate](cola_lorafa_2e-3/report.md) it has"),
        ("bitfit", "cola_bitfit_4e-3", 4, "[four times its rate](cola_bitfit_4e-3/report.md) it has"),
    ],
)
def test_what_is_said_of_other_rates_on_cola(method, tried, times, said):
    row, other = _config(_GLUE["cola"][method]), _config(_MINILM / tried)
    assert other["train"].pop("lr") == pytest.approx(times * row["train"].pop("lr"))
    assert other == row
    facts = _facts(_MINILM / tried)["scores"]["after"]
    files = (_MINILM / "cola" / "references.txt", _MINILM / tried / "predictions.txt")
    found = _matthews(*(file.read_text("utf-8").split() for file in files))
    assert facts["Matthews"] == pytest.approx(found["Matthews"])
    page = (_MINILM / "README.md").read_text("utf-8").replace("\n", " ")
    assert f"{said} {100 * facts['Matthews']:.1f}" in page


@pytest.mark.parametrize("name, label", [("CoLA", "1"), ("RTE", "entailment")])
def test_what_always_the_same_answer_has(name, label):
    labels = (_MINILM / name.lower() / "references.txt").read_text("utf-8").split()
    assert labels.count(label) > len(labels) / 2
    section = (_MINILM / "README.md").read_text("utf-8").partition(f"## {name}\n")[2].partition("\n## ")[0]
    assert f"an accuracy of {100 * labels.count(label) / len(labels):.1f}." in section.replace("\n", " ")


@pytest.mark.parametrize("task", _GLUE)
def test_the_rows_of_a_task_are_comparable(task):
    facts, kept = zip(*((_facts(each), _config(each)) for each in _GLUE[task].values()), strict=True)
    assert len({(found["data"], found["numbers"]["steps"]) for found in facts}) == 1
    assert len({(config["seed"], config["train"]["batch"]) for config in kept}) == 1
