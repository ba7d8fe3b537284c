"""What is committed under `experiments/`: the base keeps to its card, and the results are those of the
files beside them.
"""

import json
import re
from pathlib import Path

import jax
import pytest

from experiments import config as configs
from experiments.command_line import main
from experiments.metrics import score_e2e
from experiments.running.base import load_tokenizer
from lora_jax.interop import hf


_EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
_SMALL = _EXPERIMENTS / "bases" / "small"
_E2E = _EXPERIMENTS / "results" / "e2e"
_RUNS = ["lora", "lora_r1", "full"]


def _facts(run):
    return json.loads((_E2E / run / "report.json").read_text("utf-8"))


def test_the_small_base_is_what_its_card_says():
    assert sum(file.stat().st_size for file in _SMALL.iterdir()) <= 16_000_000
    model, params = hf.load(_SMALL)
    card = (_SMALL / "README.md").read_text("utf-8")
    leaves = jax.tree.leaves(params)
    assert f"{sum(leaf.size for leaf in leaves):,} parameters in float32" in card
    assert {str(leaf.dtype) for leaf in leaves} == {"float32"}
    tokenizer = load_tokenizer(_SMALL)
    assert len(tokenizer) == model.config.vocab_size == 4096
    text = "Café « Zizzi » costs £20-25\n\nnear 東京 ."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text, "no text is outside of a byte-level BPE"
    report = json.loads((_EXPERIMENTS / "results" / "small_base" / "report.json").read_text("utf-8"))
    assert re.search(r"\| ([\d.]+) nats a token", card)[1] == f"{report['numbers']['valid_loss']:.2f}"
    assert report["commit"].startswith("23bd73160c") and "23bd73160c" in card


def test_every_result_can_be_tabled(capsys):
    found = sorted(path.parent for path in (_EXPERIMENTS / "results").rglob("report.json"))
    assert found
    assert main(["report", *map(str, found)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(found)


@pytest.mark.parametrize("run", _RUNS)
def test_a_result_belongs_to_a_config_that_ships(run):
    kept = json.loads((_E2E / run / "config.json").read_text("utf-8"))
    assert configs.with_defaults(kept) == configs.to_json(
        configs.load(_EXPERIMENTS / "configs" / f"{kept['name']}.json")
    )
    facts, page = _facts(run), (_E2E / run / "report.md").read_text("utf-8")
    assert (
        len((_E2E / run / "predictions.txt").read_text("utf-8").splitlines())
        == facts["examples"]["test"]
        == 630
    )
    assert f"| this run | {100 * facts['scores']['after']['BLEU']:.2f} |" in page


def test_the_runs_are_comparable_and_lora_learns():
    """One base, one order of the same data, as many steps; LoRA is at least ten points of BLEU above the
    base.
    """
    facts = {run: _facts(run) for run in _RUNS}
    shared = [
        (f["base"]["fingerprint"], f["data"], f["numbers"]["steps"], f["commit"]) for f in facts.values()
    ]
    assert len(set(shared)) == 1
    assert facts["lora"]["numbers"]["steps"] >= 5000
    scores = facts["lora"]["scores"]
    assert scores["after"]["BLEU"] >= scores["before"]["BLEU"] + 0.10


def _references(path):
    """The wordings of each meaning, meanings in the order of their first line: written apart from the
    pipeline's own.
    """
    groups = {}
    for line in path.read_text("utf-8").splitlines():
        meaning, wording = line.split("||")
        groups.setdefault(meaning, []).append(wording.strip())
    return list(groups.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "run, when, file",
    [(run, "after", "predictions.txt") for run in _RUNS] + [("lora", "before", "predictions_before.txt")],
)
def test_committed_predictions_score_as_committed(run, when, file, data_dir, monkeypatch):
    """METEOR takes longer than all others: it is compared for one file, where its package and java are."""
    if (run, when) != ("lora", "after"):
        monkeypatch.setenv("PATH", "")
    references = _references(data_dir / "e2e" / "lora_nlg_txt" / "test.txt")
    found = score_e2e(references, (_E2E / run / file).read_text("utf-8").splitlines())
    committed = _facts(run)["scores"][when]
    assert committed["METEOR"] is not None
    if found["METEOR"] is None:
        del found["METEOR"]
    assert len(found) >= 4
    assert found == pytest.approx({name: committed[name] for name in found}, rel=1e-9, abs=1e-12)
