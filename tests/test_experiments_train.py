"""Loss, schedule and the training step against definitions written by hand, and what of a run is exported."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import (
    close,
    config,
    examples,
    LORA,
    MODEL,
    on_one_device,
    optax_promotes as optax_promotes,
    started,
    steps,
    weights,
)

import lora_jax
from experiments import finish, loss as losses, optimizer
from experiments.config import Optimizer, Train
from experiments.progress import read_metrics, Record
from experiments.tasks.examples import Splits
from lora_jax.checkpoint import Checkpoints


def test_loss_is_the_definition():
    """(1 - s) NLL + s mean(-log p), over the masked tokens, divided by (count + 1e-4)."""
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(2, 5, 7)).astype(np.float32), random.integers(7, size=(2, 5))
    mask = np.array([[0, 0, 1, 1, 0], [0, 1, 0, 0, 0]], np.float32)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for smoothing in (0.0, 0.1):
        terms = [
            -(1 - smoothing) * log_p[b, t, labels[b, t]] - smoothing * log_p[b, t].mean()
            for b in range(2) for t in range(5) if mask[b, t]
        ]  # fmt: skip
        total, count = losses.masked_sum(
            jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(mask), smoothing
        )
        np.testing.assert_allclose(losses.mean(total, count), sum(terms) / (3 + 1e-4), rtol=1e-5)
    assert losses.token_losses(jnp.asarray(logits, jnp.bfloat16), jnp.asarray(labels)).dtype == jnp.float32
    assert (
        losses.mean(*losses.masked_sum(jnp.asarray(logits), jnp.asarray(labels), jnp.zeros((2, 5)))) == 0
    ), "nothing counted is no NaN"


def test_schedule_starts_at_zero_and_ends_at_zero():
    rate = optimizer.warmup_linear(Train(steps=26290, batch=8, lr=2e-4, warmup=500))
    for step, expected in [(0, 0.0), (250, 1e-4), (500, 2e-4), (26290, 0.0), (13395, 1e-4)]:
        np.testing.assert_allclose(rate(step), expected, rtol=1e-6)
    flat = optimizer.warmup_linear(Train(steps=4, batch=1, lr=1.0))
    np.testing.assert_allclose([flat(step) for step in range(5)], [1, 0.75, 0.5, 0.25, 0])


def test_the_first_step_changes_nothing():
    """Its rate is 0, but the moments of Adam take it in."""
    _, before = started(config())
    _, after, _ = steps(config(), 1)
    close(before.delta, after.delta, 0)
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim)


def test_a_step_is_optax_on_the_plain_loss():
    """Two steps of the trainer against the same two written directly, with merged weights and no
    adapters' transform.
    """
    settings = config()
    _, state = on_one_device()
    trainer, first = started(settings)
    delta, data = first.delta, examples()
    tx = optax.adamw(optimizer.warmup_linear(settings.train), eps=1e-8, weight_decay=0.01)
    opt_state = tx.init(delta)
    for number in range(3):
        batch = data.batch(np.arange(number * 8, number * 8 + 8))

        def loss(delta, batch=batch):
            logits = MODEL.apply({"params": lora_jax.merge(trainer.frozen, delta)}, batch["input_ids"])
            return losses.mean(*losses.masked_sum(logits, batch["labels"], batch["mask"], 0.1))

        updates, opt_state = tx.update(jax.grad(loss)(delta), opt_state, delta)
        delta = optax.apply_updates(delta, updates)
    close(state.delta, delta, 1e-5)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_is_the_big_batch(accumulate):
    whole, state = on_one_device()
    parts, other, _ = steps(config(accumulate=accumulate))
    np.testing.assert_allclose(whole, parts, rtol=1e-6)
    close(state.delta, other.delta, 1e-5)


def test_the_base_outlives_full_fine_tuning():
    """Donated buffers are the run's own copies: the base is needed at the end, for what it says before
    training.
    """
    _, state, _ = steps(config({"name": "Full"}, (".*",)), 1)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((weights(), state.delta)))


def test_one_compilation_and_donated_buffers():
    trainer, state = started(config())
    step, data = trainer.compiled_step(state), examples()
    old = jax.tree.leaves((state.delta, state.opt_state))
    for number in range(3):
        batch = trainer.device_batch(data, np.arange(8))
        delta, opt_state, _ = step(
            state.delta, state.opt_state, trainer.frozen, batch, jax.random.fold_in(state.key, number)
        )
        state = state._replace(delta=delta, opt_state=opt_state)
    assert step._cache_size() == 1
    assert all(leaf.is_deleted() for leaf in old)


def test_dropout_depends_on_seed_and_step_alone():
    settings = config({**LORA, "dropout": 0.5})
    assert steps(settings)[0] == steps(settings)[0]
    trainer, state = started(settings)
    # At the start B is 0, and what is dropped before it makes no difference.
    delta = jax.tree.map(jnp.ones_like, state.delta)
    batch = jax.tree.map(lambda array: array[0], trainer.device_batch(examples(), np.arange(8)))
    keyed = [
        float(trainer.loss(delta, trainer.frozen, batch, jax.random.fold_in(state.key, step))[0])
        for step in (0, 1)
    ]
    assert keyed[0] != keyed[1]
    assert trainer.loss(delta, trainer.frozen, batch)[0] == trainer.loss(delta, trainer.frozen, batch)[0], (
        "no key, no dropout"
    )


def test_clipping_by_the_global_norm():
    tx = optimizer.create(Optimizer(clip=1.0), Train(steps=2, batch=1, lr=1.0))
    plain = optimizer.create(Optimizer(), Train(steps=2, batch=1, lr=1.0))
    weight, gradient = {"w": jnp.ones(2)}, {"w": jnp.array([30.0, 40.0])}
    clipped, _ = tx.update(gradient, tx.init(weight), weight)
    expected, _ = plain.update({"w": jnp.array([0.6, 0.8])}, plain.init(weight), weight)
    close(clipped, expected)


def test_evaluation_counts_every_example_once():
    trainer, state = started(config())
    data = examples(count=21)
    compiled = jax.jit(trainer.loss)
    found = trainer.evaluate(compiled, state.delta, data)
    arrays = jax.tree.map(jnp.asarray, data.batch(np.arange(21)))
    total, count = trainer.loss(state.delta, trainer.frozen, arrays)
    np.testing.assert_allclose(found, losses.mean(total, count), rtol=1e-6)
    limited = dataclasses.replace(
        trainer.config, train=dataclasses.replace(trainer.config.train, eval_batches=1)
    )
    arrays = jax.tree.map(lambda array: array[:8], arrays)
    expected = losses.mean(*trainer.loss(state.delta, trainer.frozen, arrays))
    np.testing.assert_allclose(
        dataclasses.replace(trainer, config=limited).evaluate(compiled, state.delta, data),
        expected,
        rtol=1e-6,
    )


@pytest.mark.parametrize("result", ["last", "best", "mean"])
def test_what_of_a_run_is_exported(tmp_path, result):
    """With a rate that is far too high, so that the first evaluation is the best: what is exported has
    the loss of that step, or is the mean.
    """
    settings = config(
        {**LORA},
        steps=8,
        lr=30.0,
        warmup=0,
        eval_every=2,
        checkpoint_every=4,
        keep_checkpoints=2,
        result=result,
    )
    trainer, state = started(settings)
    splits = Splits(examples(), examples(count=24))
    with Checkpoints(
        tmp_path / "checkpoints", identity={}, keep=2, keep_best=result == "best"
    ) as checkpoints:
        with Record(tmp_path, "run", 8, 0) as record:
            state = trainer.fit(state, splits, checkpoints, record)
        words, delta = finish.chosen(checkpoints, state, settings.train)
        saved = checkpoints.steps()
        deltas = [checkpoints.restore(state.delta, state.opt_state, step=step).delta for step in saved]
    losses_of = {
        line["step"]: line["valid_loss"]
        for line in read_metrics(tmp_path / "metrics.jsonl")
        if "valid_loss" in line
    }
    assert list(losses_of) == [0, 2, 4, 6, 8]
    best = min((2, 4, 6, 8), key=losses_of.get)
    assert best < 6, "the rate is too low for this test"
    found = trainer.evaluate(jax.jit(trainer.loss), delta, splits.valid)
    if result == "best":
        assert saved == sorted({best, 6, 8}) and f"step {best}," in words
        np.testing.assert_allclose(found, losses_of[best], rtol=1e-6)
    elif result == "mean":
        assert saved == [4, 8] and words == "the mean of the last 2 checkpoints"
        close(delta, jax.tree.map(lambda one, two: (one + two) / 2, *deltas))
    else:
        assert saved == [4, 8] and words == "the last step, 8"
        np.testing.assert_allclose(found, losses_of[8], rtol=1e-6)
