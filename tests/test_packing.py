"""Steps whose rows hold several examples: the examples, the loss, the gradient and the trained adapter are
those of a row each.
"""

import functools
import json
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from counted import agree, batch_of, examples, started
from plans import directories as directories, small
from training import (
    config,
    examples as tiny_examples,
    LORA,
    on_one_device,
    optax_promotes as optax_promotes,
    started as trainer_of,
    steps,
)

from experiments.config import Mesh
from experiments.plan.step import training_step, Workload
from experiments.progress import Record
from experiments.reports import cost
from experiments.running import base as bases
from experiments.tasks import e2e
from experiments.tasks.examples import Examples, Splits
from experiments.training import order, sharded, trainer as train
from lora_jax import LoRA
from lora_jax.checkpoint import Checkpoints


lengths = st.lists(st.integers(1, 90), min_size=1, max_size=24)


@hypothesis.given(lengths, st.data())
def test_every_example_is_in_one_row(lengths, data):
    """And rows differ by no more than the longest example."""
    several = Examples([([1], [2] * (length - 1)) for length in lengths], 64)
    chosen = np.asarray(data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=20)))
    count = data.draw(st.integers(1, len(chosen)))
    rows = several.packed(chosen, count)
    assert len(rows) == count
    assert sorted(rows[rows >= 0]) == sorted(chosen)
    np.testing.assert_array_equal(rows, several.packed(chosen, count))
    shown = np.minimum(lengths, 64)
    tokens = [shown[row[row >= 0]].sum() for row in rows]
    assert max(tokens) - min(tokens) <= shown[chosen].max()
    batch = several.batch(rows)
    assert ((batch["segment_ids"] > 0).sum(-1) == tokens).all()


def test_a_row_has_its_examples_one_after_the_other():
    """Each as it is in a row of its own: its tokens, and the labels at the columns before them."""
    data = examples()
    rows = data.packed(np.arange(16), 3)
    batch, apart = data.batch(rows), data.batch(np.arange(16))
    for row, several in enumerate(rows):
        ids, segments = batch["input_ids"][row], batch["segment_ids"][row]
        counted = batch["mask"][row] == 1
        columns, labels = batch["columns"][row][counted], batch["labels"][row][counted]
        for number, index in enumerate(several[several >= 0], 1):
            (own,) = np.nonzero(segments == number)
            np.testing.assert_array_equal(ids[own], data.ids(index)[:48])
            assert own[-1] - own[0] + 1 == len(own)
            here, there = segments[columns] == number, apart["mask"][index] == 1
            np.testing.assert_array_equal(columns[here] - own[0], apart["columns"][index][there])
            np.testing.assert_array_equal(labels[here], apart["labels"][index][there])
    assert batch["mask"].sum() == apart["mask"].sum()
    assert not batch["input_ids"][batch["segment_ids"] == 0].any()


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float64", 1e-12)])
def test_loss_and_gradients(dtype, tolerance, x64):
    step, delta, _ = started("LoRA", dtype=dtype)
    loss = functools.partial(step.loss, smoothing=0.1)

    @jax.jit
    def found(delta, batch):
        piece = jax.tree.map(lambda array: array[0], batch)
        return jax.value_and_grad(loss, has_aux=True)(delta, step.frozen, piece)

    packed, apart = batch_of(step, examples().packed(np.arange(16), 4)), batch_of(step, np.arange(16))
    assert packed["input_ids"].shape == (1, 4, 128) and apart["input_ids"].shape == (1, 16, 48)
    assert packed["input_ids"].shape[-1] > 64  # the model's positions
    agree(found(delta, packed), found(delta, apart), tolerance)


@pytest.mark.parametrize(
    "settings", [{}, {"mesh": Mesh(2, 2, 2)}, {"accumulate": 2}], ids=["alone", "mesh", "accumulated"]
)
def test_the_trained_adapter_is_that_of_a_row_each(settings):
    """After three steps."""
    packed, apart = steps(config(pack=4, **settings)), on_one_device()
    batch = packed.trainer.device_batch(
        tiny_examples(), packed.trainer.in_rows(tiny_examples(), np.arange(8)), settings.get("accumulate", 1)
    )
    assert batch["segment_ids"].max() > 1
    np.testing.assert_allclose(packed.losses, apart.losses, rtol=1e-5)
    agree(packed.state.delta, apart.state.delta, 1e-5)


def test_a_run_packs_the_examples_of_its_steps(tmp_path, monkeypatch):
    """In the order's own, in two rows, with a batch for inspection where a step is not finite. Validation has
    a row each.
    """
    settings = config(LORA, steps=4, lr=float("1e30"), warmup=0, eval_every=4, pack=2, not_finite="skip")
    trainer, state = trainer_of(settings)
    data, valid, seen = tiny_examples(20), tiny_examples(8), {"train": [], "valid": []}
    device_batch = train.Trainer.device_batch

    def watched(trainer, source, indices, *more):
        seen["train" if source is data else "valid"].append(indices)
        return device_batch(trainer, source, indices, *more)

    monkeypatch.setattr(train.Trainer, "device_batch", watched)
    with (
        Checkpoints(tmp_path / "checkpoints", identity={}) as checkpoints,
        Record(tmp_path, "run", 4, 0) as record,
    ):
        trainer.fit(state, Splits(data, valid), checkpoints, record)
    assert all(len(rows) == 2 and rows.ndim == 2 for rows in seen["train"])
    expected = [sorted(order.indices(0, number, 20, 8)) for number in range(4)]
    assert [sorted(rows[rows >= 0]) for rows in seen["train"]] == expected
    assert all(indices.shape == (8,) for indices in seen["valid"])
    kept = sorted((tmp_path / "not_finite").glob("*.npz"))
    assert kept, "the rate is too low for this test"
    arrays = np.load(kept[0])
    facts = json.loads(kept[0].with_suffix(".json").read_text())
    assert facts["examples"] == arrays["examples"].tolist() and arrays["segment_ids"].max() > 1


def test_the_cost_of_a_run_is_that_of_its_rows():
    """As the report measures it."""
    trainer, state = trainer_of(config(pack=2))
    seen = []

    def watched(*args):
        seen.append(args[1].shape)
        raise StopIteration

    watching = SimpleNamespace(
        config=trainer.config,
        of_full=trainer.of_full,
        in_rows=trainer.in_rows,
        device_batch=watched,
    )
    with pytest.raises(StopIteration):
        cost.beside_full(watching, state, trainer.frozen, None, tiny_examples())
    assert seen[0][0] == 2


def test_a_plan_has_the_rows_of_a_run(directories):
    step, _, _ = started("LoRA")
    batch = batch_of(step, examples().packed(np.arange(16), 4))
    work = Workload(4, 128, LoRA(rank=2), counted=batch["columns"].shape[-1], packed=True)
    planned = training_step(small(directories / "gpt2"), sharded.make_mesh(Mesh()), work).batch
    assert {name: array.shape for name, array in batch.items()} == {
        name: array.shape for name, array in planned.items()
    }


def test_e2e_has_a_tenth_of_padding(data_dir):
    """In two rows for eight examples. It is a third where each has a row."""
    rows = e2e.read_file(data_dir / "e2e" / "lora_nlg_txt" / "train.txt.xz")[:2000]
    data = Examples(e2e.encode(rows, bases.load_tokenizer(data_dir / "gpt2_bpe")), 192)
    steps = [order.indices(110, number, len(data), 8) for number in range(250)]
    tokens = sum(len(data.ids(index)) for indices in steps for index in indices)
    packed, apart = (
        [data.size(found) for found in several]
        for several in ([data.packed(indices, 2) for indices in steps], steps)
    )
    assert tokens / sum(2 * width for width, _ in packed) >= 0.9
    assert 0.6 < tokens / sum(8 * width for width, _ in apart) < 0.7
    assert len(set(packed)) <= 16  # each is a program to compile
