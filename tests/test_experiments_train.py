"""Loss and training step against definitions written by hand, and what of a run is exported."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import (
    alike,
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
from experiments.progress import read_metrics, Record
from experiments.running import base as bases, finish
from experiments.tasks.examples import Blocks, Examples, Splits
from experiments.training import loss as losses, optimizer, order, trainer as train
from experiments.training.step import step_of
from lora_jax.checkpoint import Checkpoints
from lora_jax.models import cross_entropy


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
        found = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing)
        total, count = losses.masked_sum(found, jnp.asarray(mask))
        np.testing.assert_allclose(losses.mean(total, count), sum(terms) / (3 + 1e-4), rtol=1e-5)
    assert cross_entropy(jnp.asarray(logits, jnp.bfloat16), jnp.asarray(labels)).dtype == jnp.float32
    assert losses.mean(*losses.masked_sum(found, jnp.zeros((2, 5)))) == 0, "nothing counted is no NaN"


@functools.cache
def one_step():
    return steps(config(), 1)


def moments(ran):
    """Adam's first ones, as trees of what trains."""
    is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)
    (state,) = filter(is_adam, jax.tree.leaves(ran.state.opt_state, is_leaf=is_adam))
    return state.mu


def test_the_first_step_changes_nothing():
    """Its rate is 0, but the moments of Adam take it in."""
    _, before = started(config())
    close(before.delta, one_step().state.delta, 0)
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(moments(one_step())))


def test_a_step_is_optax_on_the_plain_loss():
    """Three steps of the trainer against the same three written directly, with merged weights and no
    adapters' transform.
    """
    settings = config()
    trainer, first = started(settings)
    delta, data = first.delta, examples()
    tx = optax.adamw(optimizer.warmup_linear(settings.train), eps=1e-8, weight_decay=0.01)
    opt_state = tx.init(delta)

    @jax.jit
    def step(delta, opt_state, batch):
        def loss(delta):
            logits = MODEL.apply({"params": lora_jax.merge(trainer.frozen, delta)}, batch["input_ids"])
            logits = logits[np.arange(8)[:, None], batch["columns"]]
            return losses.mean(*losses.masked_sum(cross_entropy(logits, batch["labels"], 0.1), batch["mask"]))

        updates, opt_state = tx.update(jax.grad(loss)(delta), opt_state, delta)
        return optax.apply_updates(delta, updates), opt_state

    for number in range(3):
        delta, opt_state = step(delta, opt_state, data.batch(np.arange(number * 8, number * 8 + 8)))
    close(on_one_device().state.delta, delta, 1e-5)


def test_accumulation_is_the_big_batch():
    """Parts of different numbers of tokens: the whole batch's gradient is not the mean of theirs."""
    masks = examples().batch(np.arange(8))["mask"].reshape(4, -1).sum(-1)
    assert len(set(masks)) > 1
    alike(on_one_device(), steps(config(accumulate=4)), 1e-5)


def test_each_part_of_a_batch_has_its_own_key():
    """The gradient of w[i] is what part i drew."""
    loss = lambda delta, frozen, piece, key: (
        jnp.sum(delta["w"] * piece["one"] * jax.random.normal(key)),
        jnp.float32(1),
    )
    tx, delta = optax.sgd(1.0), {"w": jnp.zeros(4)}
    batch = {"one": jnp.eye(4)}
    draw = lambda seed: jax.jit(step_of(loss, tx, 4))(
        delta, tx.init(delta), None, batch, jax.random.key(seed)
    )[0]["w"].tolist()
    assert len({*draw(0), *draw(1)}) == 8
    assert draw(0) == draw(0)


def test_clipping_by_the_global_norm():
    """Seen in the moments, a tenth of the first gradient: by itself Adam's first step has always one size."""
    plain, clipped = moments(one_step()), moments(steps(config(clip=1e-4), 1))
    norm = float(optax.tree.norm(plain))
    assert norm > 1e-4
    np.testing.assert_allclose(optax.tree.norm(clipped), 0.1 * 1e-4, rtol=1e-5)
    close(jax.tree.map(lambda leaf: leaf * (0.1 * 1e-4 / norm), plain), clipped, 1e-8)


def test_the_base_outlives_full_fine_tuning():
    """Donated buffers are the run's own copies: the base is needed at the end, for what it says before
    training.
    """
    state = steps(config({"name": "Full"}, (".*",)), 1).state
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


def test_dropout_depends_on_its_key_alone():
    trainer, state = started(config({**LORA, "dropout": 0.5}))
    loss = jax.jit(trainer.loss)
    # At the start B is 0, and what is dropped before it makes no difference.
    delta = jax.tree.map(jnp.ones_like, state.delta)
    batch = jax.tree.map(lambda array: array[0], trainer.device_batch(examples(), np.arange(8)))
    of = lambda *key: float(loss(delta, trainer.frozen, batch, *key)[0])
    first, second = (jax.random.fold_in(state.key, step) for step in (0, 1))
    assert of(first) == of(first) != of(second)
    assert of() == of(), "no key, no dropout"


def test_each_step_has_its_own_examples_and_key(tmp_path, monkeypatch):
    """Over two epochs and a part of the third. All examples are the same and nothing is learned, so that
    losses differ by what is dropped.
    """
    settings = config({**LORA, "dropout": 0.5}, steps=7, lr=0.0, warmup=0, log_every=1, eval_every=100)
    settings = dataclasses.replace(settings, seed=3)
    trainer, state = started(settings)
    state = state._replace(delta=jax.tree.map(jnp.ones_like, state.delta))
    data, valid, seen = Examples([([5, 6, 9], [7, 8, 9])] * 20, 12), examples(8), []
    device_batch = train.Trainer.device_batch

    def watched(trainer, source, indices, *more):
        if source is data:
            seen.append(indices.tolist())
        return device_batch(trainer, source, indices, *more)

    monkeypatch.setattr(train.Trainer, "device_batch", watched)
    with (
        Checkpoints(tmp_path / "checkpoints", identity={}) as checkpoints,
        Record(tmp_path, "run", 7, 0) as record,
    ):
        trainer.fit(state, Splits(data, valid), checkpoints, record)
    assert seen == [order.indices(3, number, 20, 8).tolist() for number in range(7)]
    for epoch in (seen[:3], seen[3:6]):
        assert set(sum(epoch, [])) == set(range(20))
    found = [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    assert len(found) == len(set(found)) == 7


def by_hand(params, arrays):
    """The mean negative log-likelihood of the counted tokens, in float64."""
    logits = np.asarray(jax.jit(MODEL.apply)({"params": params}, arrays["input_ids"]), np.float64)
    if "columns" in arrays:
        logits = logits[np.arange(len(logits))[:, None], arrays["columns"]]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    taken = np.take_along_axis(log_p, arrays["labels"][..., None], -1)[..., 0]
    return -(taken * arrays["mask"]).sum() / (arrays["mask"].sum() + 1e-4)


@pytest.mark.parametrize("kind", [Examples, Blocks])
def test_evaluation_counts_every_example_once(kind):
    """21 of them in batches of 8, of which the last is filled up; without smoothing or dropout."""
    trainer, state = started(config({**LORA, "dropout": 0.5}))
    delta = jax.tree.map(lambda leaf: leaf + 0.1, state.delta)
    tokens = np.random.default_rng(0).integers(1, 31, 21 * 12 + 1)
    data = examples(count=21) if kind is Examples else Blocks(tokens, 12)
    assert len(data) == 21
    compiled, params = jax.jit(trainer.loss), lora_jax.merge(trainer.frozen, delta)
    expected = by_hand(params, data.batch(np.arange(21)))
    np.testing.assert_allclose(trainer.evaluate(compiled, delta, data), expected, rtol=1e-5)
    limited = dataclasses.replace(
        trainer.config, train=dataclasses.replace(trainer.config.train, eval_batches=1)
    )
    np.testing.assert_allclose(
        dataclasses.replace(trainer, config=limited).evaluate(compiled, delta, data),
        by_hand(params, data.batch(np.arange(8))),
        rtol=1e-5,
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


def test_the_comparison_sees_what_went_wrong(tmp_path, monkeypatch):
    """Of the adapted model with its own export, and with that of another adapter."""
    monkeypatch.setitem(sys.modules, "torch", None)  # whose comparison is another one
    trainer, state = started(config())
    base = bases.Loaded(MODEL, weights(), None, tmp_path, "a test")
    splits, moved = Splits(examples(), examples()), jax.tree.map(lambda leaf: leaf + 0.3, state.delta)
    finish.export(trainer, moved, base, tmp_path / "merged")
    good, bad = (
        finish.compare(trainer, delta, tmp_path / "merged", splits) for delta in (moved, state.delta)
    )
    assert good["max_difference"] < 1e-5 < 1e-2 < bad["max_difference"] < good["max_logit"]
    assert good["pytorch"] is None
