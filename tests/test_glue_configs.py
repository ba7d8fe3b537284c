"""The configs of GLUE: rows of LoRA's Table 2, of the reproduction study's Table 1, of MiniLM, and of little
data.
"""

import collections
import functools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from experiments import config as configs
from experiments.running import baselines
from experiments.running.base import Loaded
from experiments.strict_json import build
from lora_jax.baselines import attach
from lora_jax.models import Bert, BertConfig, DebertaV2, DebertaV2Config, Roberta, RobertaConfig


DIRECTORY = Path(configs.__file__).resolve().parent.parent / "configs" / "glue"
CONFIGS = {path.stem: configs.load(path) for path in sorted(DIRECTORY.glob("*.json"))}
# Rows that train; the published sizes of the sets.
ROWS = {
    **{"mnli": 392_702, "sst2": 67_349, "mrpc": 3668, "cola": 8551, "qnli": 104_743},
    **{"qqp": 363_846, "rte": 2490, "stsb": 5749},
}
LABELS = {"mnli": 3, "stsb": 1}
KEYS = {"sst2": "SST-2", "stsb": "STS-B", "cola": "CoLA"}


def row_and_task(name):
    return name.rpartition("_")[::2]


def test_there_is_one_for_every_row_and_task():
    found = collections.Counter(row_and_task(name)[0] for name in CONFIGS)
    table = [row for row in found if row.startswith(("roberta", "deberta"))]
    assert len(table) == 14 and all(found[row] == 8 for row in table)
    assert sum(count for row, count in found.items() if row.startswith("reproduction")) == 5 * 4 + 1
    assert sum(count for row, count in found.items() if row.startswith("minilm")) == 8 * 4
    assert sum(count for row, count in found.items() if row.startswith("lowdata")) == 2 * 2 * 3


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_a_row(name):
    config, (_, task) = CONFIGS[name], row_and_task(name)
    assert config.name == name and config.data.task == f"glue/{task}"
    assert bool(config.source.expected) == bool(config.source.paper) and config.source.note
    assert build(configs.Config, configs.to_json(config)) == config
    train = config.train
    epoch = math.ceil((config.data.max_rows or ROWS[task]) / train.batch)
    if config.data.max_rows is None:
        assert train.eval_every == epoch
    assert train.steps % epoch == 0 == train.steps % train.eval_every
    assert train.result == "best" and 0.05 < train.warmup / train.steps < 0.11
    adapter = config.base.adapter
    if adapter is not None:
        other = CONFIGS[adapter.removeprefix("../../../runs/")]
        assert (other.method, other.targets, other.base.path) == (
            config.method,
            config.targets,
            config.base.path,
        )


def test_published_numbers_and_hyperparameters(published):
    theirs = collections.Counter(
        (task, score)
        for row in published["table2_GLUE"]["rows"]
        for task, score in row["scores"].items()
        if task != "Avg"
    )
    ours = collections.Counter(
        (KEYS.get(config.data.task[5:], config.data.task[5:].upper()), *config.source.expected.values())
        for name, config in CONFIGS.items()
        if name.startswith(("roberta", "deberta"))
    )
    assert ours == theirs
    order = [name.replace("-", "").lower() for name in published["hyper_RoBERTa"]["order"]]
    sizes = {
        "roberta_base_lora": published["hyper_RoBERTa"]["base"],
        "roberta_large_lora": published["hyper_RoBERTa"]["large"],
        "deberta_xxl_lora": published["hyper_DeBERTa"],
    }
    for row, values in sizes.items():
        for place, task in enumerate(order):
            config = CONFIGS[f"{row}_{task}"]
            seq = values["seq"] if isinstance(values["seq"], int) else values["seq"][place]
            epochs = config.train.steps // config.train.eval_every
            found = (config.train.batch, epochs, config.train.lr, config.data.seq_len)
            assert found == (values["batch"][place], values["epochs"][place], values["lr"][place], seq)


# Batch and epochs of the paper's rows of little data.
LITTLE = {100: (20, 40), 1000: (20, 40), 10_000: (100, 4)}


def test_rows_of_little_data(published):
    """They have the paper's design on a base that exists, and name the numbers of GPT-3."""
    theirs = published["appendix_lowdata_MNLI"]
    for name, config in CONFIGS.items():
        if not name.startswith("lowdata"):
            continue
        rows, train, lora = config.data.max_rows, config.train, "_lora_" in name
        assert rows == int(row_and_task(name)[0].rpartition("_")[2])
        assert (train.batch, train.steps * train.batch // rows) == LITTLE[rows]
        score = theirs["LoRA" if lora else "FineTune"][theirs["n"].index(rows)]
        assert f"whose accuracy is {score}." in config.source.note
        plain = CONFIGS[
            name.removeprefix("lowdata_").replace(f"_{rows}_sst2", "_cola").replace(f"_{rows}", "")
        ]
        assert (config.base, config.method, config.targets) == (plain.base, plain.method, plain.targets)
        assert config.train.lr == plain.train.lr


MODELS = {
    "roberta_base": Roberta(RobertaConfig.named("roberta-base"), head="sequence_classification", scan=True),
    "roberta_large": Roberta(RobertaConfig.named("roberta-large"), head="sequence_classification", scan=True),
    "deberta_xxl": DebertaV2(
        DebertaV2Config.named("deberta-v2-xxlarge"), head="sequence_classification", scan=True
    ),
    "minilm": Bert(BertConfig.named("all-MiniLM-L6-v2"), head="sequence_classification", scan=True),
}


@functools.cache
def shapes(kind):
    model = MODELS[kind]
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])


def head(kind, labels=2):
    """The classifier alone of a BERT; a dense layer and the classifier of the others."""
    width = MODELS[kind].config.hidden_size
    return (0 if kind == "minilm" else width * width + width) + width * labels + labels


# At full size, as (row, of what kind of model): what trains beside the head.
EXACT = {
    ("roberta_base_lora", "roberta_base"): 12 * 2 * 8 * (768 + 768),
    ("roberta_large_lora", "roberta_large"): 24 * 2 * 8 * (1024 + 1024),
    ("roberta_large_lora_dagger", "roberta_large"): 786_432,
    ("deberta_xxl_lora", "deberta_xxl"): 48 * 2 * 16 * (1536 + 1536),
    ("roberta_base_adapter_d_16", "roberta_base"): 12 * (2 * 768 * 16 + 16 + 768),
    ("roberta_base_adapter_d_48", "roberta_base"): 12 * (2 * 768 * 48 + 48 + 768),
    ("roberta_large_adapter_p_16", "roberta_large"): 24 * (2 * 1024 * 16 + 16 + 1024),
    ("roberta_large_adapter_p_64", "roberta_large"): 24 * (2 * 1024 * 64 + 64 + 1024),
    ("roberta_large_adapter_h_8", "roberta_large"): 24 * 2 * (2 * 1024 * 8 + 8 + 1024),
    ("roberta_large_adapter_h_64", "roberta_large"): 24 * 2 * (2 * 1024 * 64 + 64 + 1024),
    # Each layer's norms, attention's four and the two of the MLP; those of the embedding's norm.
    ("roberta_base_bitfit", "roberta_base"): 12 * (2 * 768 + 4 * 768 + 3072 + 768) + 768,
    ("reproduction_dora", "roberta_base"): 294_912 + 12 * 2 * 768,
    ("reproduction_lorafa", "roberta_base"): 12 * 2 * 8 * 768,
    ("reproduction_vera", "roberta_base"): 12 * 2 * (256 + 768),
    ("reproduction_qlora", "roberta_base"): 294_912,
    ("minilm_lora", "minilm"): 6 * 2 * 8 * (384 + 384),
    ("minilm_adapter_h", "minilm"): 6 * 2 * (2 * 384 * 8 + 8 + 384),
    ("minilm_bitfit", "minilm"): 6 * (2 * 384 + 4 * 384 + 1536 + 384) + 384 + 384,
}


@pytest.mark.parametrize("row, kind", EXACT, ids=[row for row, _ in EXACT])
def test_exact_counts_at_full_size(row, kind):
    """Of shapes: no weight is drawn. The figures are products of the published sizes."""
    config, model, params = CONFIGS[f"{row}_cola"], MODELS[kind], shapes(kind)
    pattern = Loaded(model, None, None, Path(), "").head
    if config.baseline is not None:
        model, params = attach(model, params, configs.baseline_value(config.baseline))
    targets = baselines.targets(config, configs.method_value(config.method), pattern)
    how = {"fn": lambda params, ids: model.apply({"params": params}, ids), "args": (jnp.zeros((1, 2), int),)}
    found = lora_jax.count(lora_jax.lorafy(params, targets, **how).delta)
    assert found == EXACT[row, kind] + head(kind)


def test_full_fine_tuning_trains_everything():
    """RoBERTa's published size, 125M, has no pooler."""
    config = CONFIGS["roberta_base_full_cola"]
    assert config.targets == (".*",) and config.method == {"name": "Full"}
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes("roberta_base"))) == 124_647_170


def test_notes_name_the_conflicts():
    """Where the paper and its scripts differ, the config says so."""
    notes = {name: config.source.note for name, config in CONFIGS.items()}
    assert all(
        "`alpha` is the scripts'; the paper's table has 8" in notes[f"roberta_base_lora_{task}"]
        for task in ROWS
    )
    assert all("the paper's table has rank 8" in notes[f"deberta_xxl_lora_{task}"] for task in ROWS)
    assert "The scripts have rate 1.3e-4" in notes["deberta_xxl_lora_cola"]
    assert re.search("batch 4, 10 epochs, rate 3e-4", notes["roberta_large_lora_stsb"])
