"""Training with a head of classes: batches of like length, an early stop, and the base's own dropout."""

import dataclasses
import json

import glue_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_glue import CONFIG
from training import config as of_texts, optax_promotes as optax_promotes

import lora_jax
from experiments import config as configs
from experiments.command_line import main
from experiments.config import Train
from experiments.strict_json import build
from experiments.sweeps import over
from experiments.tasks.examples import padded_width
from experiments.tasks.sentences import Sentence, Sentences
from experiments.training import order, sharded
from experiments.training.trainer import evaluation_batches, Trainer
from lora_jax import Full, LoRA
from lora_jax.models import Bert, BertConfig


LENGTHS = np.random.default_rng(0).geometric(0.08, 500) + 2


def epoch(batch_of, number, batch=8):
    count = order.batches_per_epoch(len(LENGTHS), batch)
    return np.stack([batch_of(number * count + step) for step in range(count)])


def tokens(batches):
    return sum(padded_width(int(LENGTHS[rows].max()), 512) * len(rows) for rows in batches)


@pytest.mark.parametrize("buckets", [1, 4, 1000])
def test_each_epoch_has_every_example(buckets):
    """And those that fill the last batch, which are the same with buckets as without."""
    batch_of = order.by_length(3, LENGTHS, 8, buckets)
    for number in (0, 1):
        plain = epoch(order.drawn(3, len(LENGTHS), 8), number)
        assert sorted(epoch(batch_of, number).ravel()) == sorted(plain.ravel())
    assert set(epoch(batch_of, 0).ravel()) == set(range(500))
    assert not np.array_equal(epoch(batch_of, 0), epoch(batch_of, 1))
    # A resumed run asks for a later step first.
    again = order.by_length(3, LENGTHS, 8, buckets)
    assert np.array_equal(again(70), batch_of(70)) and np.array_equal(again(2), batch_of(2))


def test_short_examples_do_not_pay_for_long_ones():
    plain = tokens(epoch(order.drawn(3, len(LENGTHS), 8), 0))
    bucketed = tokens(epoch(order.by_length(3, LENGTHS, 8, 16), 0))
    assert bucketed < 0.75 * plain and bucketed > LENGTHS.sum()


def test_lengths_come_in_no_order():
    widths = LENGTHS[epoch(order.by_length(3, LENGTHS, 8, 1000), 0)].max(1)
    assert (np.diff(widths) < 0).sum() > 15 < (np.diff(widths) > 0).sum()


@pytest.mark.parametrize("limit, expected", [(None, [[3, 1], [2, 0], [4, -1]]), (1, [[1, 0]])])
def test_evaluation_has_the_shortest_first(limit, expected):
    """Of the examples that the limit leaves, which are those of an evaluation in order."""
    found = [rows.tolist() for rows in evaluation_batches(5, 2, limit, np.array([7, 2, 5, 1, 9]))]
    assert found == expected


@pytest.mark.parametrize(
    "values, message",
    [
        ({"pack": 2, "buckets": 4}, "`train.pack` is 2 and `train.buckets` is 4: rows that examples share"),
        ({"dropout": 1.0}, "`train.dropout` must be at least 0 and less than 1, got 1.0"),
        ({"patience": 0}, "`train.patience` must be at least 1, got 0"),
    ],
)
def test_what_train_cannot_say(values, message):
    with pytest.raises(ValueError, match=message):
        build(Train, {"steps": 2, "batch": 8, "lr": 0.1, **values}, "train")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"dropout": 0.1}, '`train.dropout` is 0.1, of tasks of labels, and `data.task` is "text"'),
        ({"buckets": 4}, '`train.buckets` is 4, and `data.task` is "text", whose blocks are equally long'),
    ],
)
def test_what_a_task_cannot_have(values, message):
    with pytest.raises(ValueError, match=message):
        of_texts(**values)


def test_an_early_stop_is_an_end(tmp_path, capsys):
    """At rate 0 nothing gets better after the first evaluation. A run that ended before its report does not
    train further.
    """
    glue_files.write(tmp_path / "glue", "rte")
    glue_files.write_bert(tmp_path / "bert")
    train = {**CONFIG["train"], "lr": 0.0, "steps": 40, "eval_every": 2, "patience": 2, "result": "last"}
    (tmp_path / "tiny.json").write_text(json.dumps({**CONFIG, "train": train}))
    command = [
        "run",
        str(tmp_path / "tiny.json"),
        "--data",
        str(tmp_path),
        "--workdir",
        str(tmp_path / "done"),
    ]
    assert main(command) == 0
    facts = json.loads((tmp_path / "done" / "report.json").read_text())
    assert facts["numbers"]["steps"] == 6 and facts["result"] == "the last step, 6"
    assert facts["notes"][-1] == "stopped at step 6: no better for 2 evaluations"
    before = (tmp_path / "done" / "metrics.jsonl").read_text()
    (tmp_path / "done" / "report.md").unlink()
    capsys.readouterr()
    assert main(command) == 0
    assert "tiny: resuming after step 6\n" in capsys.readouterr().out
    assert (tmp_path / "done" / "metrics.jsonl").read_text() == before
    assert (tmp_path / "done" / "report.md").is_file()


@pytest.fixture(scope="module")
def dropped():
    """A trainer of a BERT with dropout of its layers and before its head, and what it starts from."""
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        hidden_dropout_prob=0.3,
    )
    model = Bert(config, head="sequence_classification")
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    settings = build(
        configs.Config,
        {**CONFIG, "train": {"steps": 2, "batch": 4, "lr": 0.1, "dropout": 0.2, "head_dropout": 0.5}},
    )
    mesh = sharded.make_mesh(settings.mesh)
    params, specs = sharded.on_mesh(mesh, params, model.partition_rules)
    frozen, delta = lora_jax.lorafy(
        params, {"classifier/.*": Full(), "query/kernel": LoRA(rank=2)}, key=jax.random.key(1)
    )
    training = sharded.dropping(model, settings.train)
    trainer = Trainer.create(settings, mesh, training.apply, frozen, delta, specs)
    examples = Sentences([Sentence("", (3, 4, 5, number), ()) for number in range(4)], [0, 1, 0, 1], 16)
    return model, training, trainer, delta, examples.batch(np.arange(4))


def test_the_rates_are_those_of_the_config(dropped):
    model, training, *_ = dropped
    found = training.config
    assert (found.hidden_dropout_prob, found.attention_probs_dropout_prob, found.head_dropout) == (
        0.2,
        0.2,
        0.5,
    )
    assert dataclasses.replace(model.config, hidden_dropout_prob=0.2) != found
    assert model.config.hidden_dropout_prob == 0.3


def test_it_is_random_in_training_only(dropped):
    """With a key the loss is that of the model's own dropout, drawn from a fold of it."""
    model, training, trainer, delta, batch = dropped
    params = lora_jax.merge(trainer.frozen, delta)

    def expected(apply, **more):
        logits = apply({"params": params}, batch["input_ids"], batch["attention_mask"], **more)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(batch["labels"]), 1)
        return -float(chosen.sum())

    key = jax.random.key(7)
    rngs = {"dropout": jax.random.fold_in(key, sharded.DROPOUT)}
    losses = [float(trainer.loss(delta, trainer.frozen, batch, each)[0]) for each in (key, None, key)]
    assert losses[1] == pytest.approx(expected(model.apply), rel=1e-5)
    assert (
        losses[0]
        == losses[2]
        == pytest.approx(expected(training.apply, deterministic=False, rngs=rngs), rel=1e-5)
    )
    assert abs(losses[0] - losses[1]) > 1e-4


def test_a_sweep_has_no_start_at_another_adapter(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps({**CONFIG, "base": {"path": "b", "adapter": "c"}}))
    with pytest.raises(ValueError, match="`base.adapter` is 'c'"):
        over.configs_of(tmp_path / "tiny.json", ["train.result=last"], {"train.lr": [0.1, 0.2]})
