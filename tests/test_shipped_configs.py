"""The configs that ship beside GLUE's (`test_glue_configs.py`): each is a row, with the published numbers and
the number of parameters that its note gives.
"""

import functools
import json
import re
from pathlib import Path

import jax
import pytest
from test_baselines_counts import IDS, shapes as gpt2_shapes, single

import lora_jax
from experiments import config as configs
from experiments.running import baselines
from experiments.strict_json import build
from lora_jax.baselines import attach
from lora_jax.models import Llama, LlamaConfig


DIRECTORY = Path(configs.__file__).resolve().parent.parent / "configs"
SHIPPED = {path.stem: path for path in sorted(DIRECTORY.glob("*.json"))}
GLUE = sorted((DIRECTORY / "glue").glob("*.json"))
GPT2 = [name for name in SHIPPED if "_gpt2_" in name]
METRICS = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")
# WebNLG's columns, in the paper's order.
COLUMNS = {"BLEU": "BLEU_USA", "METEOR": "MET_USA", "TER": "TER_USA"}
PARTS = (" unseen", " seen", "")


@functools.cache
def load(name):
    return configs.load(SHIPPED[name])


@pytest.mark.parametrize("name", SHIPPED)
def test_a_config_is_a_row(name):
    config = load(name)
    assert config.name == name
    assert config.source.paper or config.source.note, "a config names its paper or says what it is instead"
    assert bool(config.source.expected) == bool(config.source.paper)
    assert build(configs.Config, configs.to_json(config)) == config, "the resolved form says everything"
    if config.base.run:
        assert (SHIPPED[name].parent / config.base.run).is_file()


@pytest.mark.parametrize("path", [*SHIPPED.values(), *GLUE], ids=lambda path: path.stem)
def test_a_row_says_what_differs(path):
    """And nothing that its first row says already, but for the number that is to be expected."""
    own = json.loads(path.read_text())
    if "like" not in own:
        return
    assert own["like"].endswith(".json") and own["like"] != path.name
    whole = json.loads((path.parent / own["like"]).read_text())
    for key, value in own.items():
        assert key == "like" or value != whole.get(key, "absent"), key
        if isinstance(value, dict) and isinstance(whole.get(key), dict) and not {"name", "task"} & set(value):
            repeated = {name for name in value if value[name] == whole[key].get(name, "absent")}
            assert repeated <= {"expected"}, (key, repeated)


def rows(published):
    """The published rows as configs name them: their metrics, by data set and row."""
    found = {}
    for row in published["table3_E2E"]["rows"]:
        size, method = row["method"].rsplit(" ", 1)
        metrics = {metric: row[metric] for metric in METRICS}
        found["e2e", f"{size}, {method}, {row['params_M']:.2f}M"] = metrics
    for rank, loss, *scores in published["appendix_rank_GPT2_E2E"]["rows"]:
        percent = {"METEOR", "ROUGE_L"}
        metrics = {
            metric: score * 100 if metric in percent else score
            for metric, score in zip(METRICS, scores, strict=True)
        }
        found["e2e", f"GPT-2 M, LoRA, rank {rank}"] = metrics | {"validation loss": loss}
    for row in published["appendix_WebNLG"]["rows"]:
        metrics = {
            f"{metric}{part}": row[column][place]
            for metric, column in COLUMNS.items()
            for place, part in enumerate(PARTS)
        }
        found["webnlg", f"GPT-2 {row['model']}, {row['method']}, {row['params']}"] = metrics
    for row in published["appendix_DART"]["rows"]:
        metrics = {metric: row[metric] for metric in COLUMNS}
        found["dart", f"GPT-2 {row['model']}, {row['method']}, {row['params']}"] = metrics
    return found


def test_every_published_row_has_a_config_that_expects_it(published):
    theirs = rows(published)
    ours = {(load(name).data.task, load(name).source.row): load(name).source.expected for name in GPT2}
    assert len(ours) == len(GPT2) and set(ours) == set(theirs)
    for row, expected in ours.items():
        assert expected == pytest.approx(theirs[row], abs=1e-9), row


@functools.cache
def base(path):
    """The model with single layers, and the shapes of its parameters. `path` is None for SmolLM2."""
    if path is not None:
        return single(*gpt2_shapes(path))
    model = Llama(LlamaConfig.named("smollm2-135m"))
    return model, jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]


@pytest.mark.parametrize("name", [name for name in SHIPPED if "exactly" in load(name).source.note])
def test_a_row_trains_what_its_note_says(name):
    config = load(name)
    model, params = base(config.base.path)
    if config.baseline is not None:
        value = configs.baseline_value(config.baseline)
        params = jax.eval_shape(lambda params: attach(model, params, value)[1], params)
    targets = baselines.targets(config, configs.method_value(config.method))
    count = lora_jax.count(lora_jax.lorafy(params, targets).delta)
    (noted,) = re.findall(r"exactly ([\d,]*\d)", config.source.note)
    assert f"{count:,}" == noted


def test_what_a_prefix_needs_of_the_sequence(data_dir):
    """Its tokens count in `data.seq_len`, which the rows without one have for themselves."""
    found = {name: load(name) for name in SHIPPED if "_smollm2_" in name and "prefix" in name}
    assert len(found) == 6
    for name, config in found.items():
        plain = load(f"{config.data.task}_smollm2_lora_r8")
        tokens = configs.baseline_value(config.baseline).tokens
        assert config.data.seq_len == plain.data.seq_len + tokens, name
        assert len(config.baseline["words"]) == tokens
