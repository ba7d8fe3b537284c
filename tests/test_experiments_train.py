"""Loss, schedule and the training step: against definitions written out by hand, and against themselves
on other meshes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from experiments.config import (
    Architecture,
    Base,
    Budget,
    Config,
    Mesh,
    method_value,
    methods,
    Optimizer,
    Source,
    TextData,
    Train,
)
from experiments.progress import read_metrics, Record
from experiments.running import finish
from experiments.tasks.examples import Examples, Splits
from experiments.training import loss as losses, optimizer, sharded, trainer as train
from lora_jax._paths import named_leaves
from lora_jax.checkpoint import Checkpoints
from lora_jax.models.gpt2 import GPT2, GPT2Config


LORA = {"name": "LoRA", "rank": 2, "alpha": 4, "init": "kaiming", "blocks": [True, False, True]}


@pytest.fixture(autouse=True, scope="module")
def _optax_promotes():
    """Optax raises floats to integer powers of its counters, which strict promotion refuses. Ranks stay
    strict.
    """
    with jax.numpy_dtype_promotion("standard"):
        yield


def config(
    method=LORA,
    targets=("attn/c_attn/kernel",),
    mesh=Mesh(),
    clip=None,
    name="adamw",
    rules=(),
    quantize=None,
    **settings,
):
    section = Train(**{"steps": 6, "batch": 8, "lr": 1e-2, "warmup": 2, "label_smoothing": 0.1, **settings})
    architecture = Base(architecture=Architecture(8, 1, 2, 16), tokenizer="none")
    data = TextData("text", "none", "none", 12)
    rule = Optimizer(name, weight_decay=0.01, clip=clip, **dict(rules))
    return Config(
        "tiny", Source(None), architecture, data, method, targets, section, rule, mesh, quantize=quantize
    )


def examples(count=24, seq_len=12):
    random = np.random.default_rng(0)
    draw = lambda low, high: random.integers(1, 31, size=random.integers(low, high)).tolist()
    return Examples([(draw(2, 5), draw(2, 7)) for _ in range(count)], seq_len)


MODEL = GPT2(GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2))


@functools.cache
def weights():
    return jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def started(settings):
    """A trainer and its first state, on the mesh that `settings` asks for."""
    params = weights()
    mesh = sharded.make_mesh(settings.mesh)
    params, specs = sharded.on_mesh(mesh, params, MODEL.partition_rules)
    frozen, delta = lora_jax.lorafy(
        params, list(settings.targets), method=method_value(settings.method), key=jax.random.key(1)
    )
    trainer = train.Trainer.create(settings, mesh, MODEL.apply, frozen, delta, specs)
    return trainer, trainer.start(delta, specs, jax.random.key(2))


def steps(settings, count=3, quickly=False):
    """Losses of `count` steps, and the state after them. `quickly`: compiled with little care, which
    takes a third less time.
    """
    trainer, state = started(settings)
    step, data, found = trainer.compiled_step(state), examples(), []
    for number in range(count):
        indices = np.arange(number * settings.train.batch, (number + 1) * settings.train.batch) % len(data)
        batch = trainer.device_batch(data, indices, settings.train.accumulate)
        arguments = (
            state.delta,
            state.opt_state,
            trainer.frozen,
            batch,
            jax.random.fold_in(state.key, number),
        )
        if quickly and number == 0:
            step = step.lower(*arguments).compile(compiler_options={"xla_backend_optimization_level": 0})
        delta, opt_state, numbers = step(*arguments)
        state = state._replace(delta=delta, opt_state=opt_state, step=number + 1)
        found.append(float(numbers["loss"]))
    return found, state, step


def close(left, right, tolerance=1e-6):
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, atol=tolerance, rtol=tolerance), left, right
    )


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


@functools.cache
def on_one_device(full=False):
    """What the sharded and the accumulated runs are compared with."""
    return steps(config({"name": "Full"}, (".*",)) if full else config())[:2]


@pytest.mark.parametrize(
    "full, shape",
    [(False, (2, 1, 1)), (False, (1, 2, 1)), (False, (1, 1, 2)), (False, (2, 2, 2)), (True, (2, 2, 2))],
    ids=str,
)
def test_every_mesh_gives_the_same_adapter(full, shape):
    whole, state = on_one_device(full)
    method, targets = ({"name": "Full"}, (".*",)) if full else (LORA, ("attn/c_attn/kernel",))
    spread, other, _ = steps(config(method, targets, Mesh(*shape)))
    np.testing.assert_allclose(whole, spread, rtol=1e-5)
    close(state.delta, jax.device_get(other.delta), 2e-5)
    halved = [
        leaf.addressable_shards[0].data.shape != leaf.shape for leaf in jax.tree.leaves(other.opt_state)
    ]
    # With `blocks`, B stays whole, so only fsdp splits anything of LoRA's.
    assert any(halved) == (full or shape[1] > 1), "the moments are split as their arrays are"


def test_the_authors_optimizer_on_a_mesh():
    """Its moments are split and its counters are everywhere, as those of optax's own."""
    whole, state, _ = steps(config(name="adamw_authors"))
    spread, other, _ = steps(config(name="adamw_authors", mesh=Mesh(2, 2, 2)))
    np.testing.assert_allclose(whole, spread, rtol=1e-5)
    close(state.delta, jax.device_get(other.delta), 2e-5)
    assert any(
        leaf.addressable_shards[0].data.shape != leaf.shape for leaf in jax.tree.leaves(other.opt_state)
    )


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


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 2, 2)])
def test_dropout_is_the_same_on_every_mesh(shape):
    """A run that goes on with other devices sees what it would have seen."""
    settings = {**LORA, "dropout": 0.5}
    found = []
    for mesh in (Mesh(), Mesh(*shape)):
        trainer, state = started(config(settings, mesh=mesh))
        batch = jax.tree.map(lambda array: array[0], trainer.device_batch(examples(), np.arange(8)))
        found.append(
            jax.jit(trainer.loss)(
                jax.tree.map(jnp.ones_like, state.delta),
                trainer.frozen,
                batch,
                jax.random.fold_in(state.key, 0),
            )[0]
        )
    np.testing.assert_allclose(*map(float, found), rtol=1e-6)


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


def test_a_mesh_larger_than_the_machine():
    with pytest.raises(ValueError, match="`mesh` 4 x 4 x 1 needs 16 devices, but there are 8"):
        sharded.make_mesh(Mesh(4, 4, 1))


# --- other methods ------------------------------------------------------------------------------------------

RULES = {
    "AdaLoRA": {"adalora": Budget(target_rank=1, final_steps=1, orthogonality=0.1)},
    "LoRAFA": {"lorafa": True, "loraplus": 4.0},
    "DyLoRA": {"loraplus": 4.0},
}
ROWS = {name: {"name": name} if name == "Full" else {"name": name, "rank": 2} for name in methods()}


def row(name, **more):
    return config(ROWS[name], ("attn/.*/kernel", "mlp/c_fc/kernel"), rules=RULES.get(name, {}), **more)


@pytest.mark.parametrize("name", methods())
def test_every_method_trains_and_every_mesh_gives_the_same(name):
    alone, state, step = steps(row(name), 3)
    assert state.step == 3 and step._cache_size() == 1
    spread, other, _ = steps(row(name, mesh=Mesh(2, 2, 2)), 3)
    close(alone, spread)
    close(state.delta, jax.device_get(other.delta))
    assert all(
        len(leaf.sharding.device_set) == 8
        for leaf in jax.tree.leaves(started(row(name, mesh=Mesh(2, 2, 2)))[0].frozen)
    )


@functools.cache
def of_one_device(name, quantize=None):
    return steps(row(name, quantize=quantize), 3)[:2]


# All ways of giving eight devices to the axes, but for the one above.
MESHES = [
    (data, fsdp, 8 // data // fsdp)
    for data in (1, 2, 4, 8)
    for fsdp in (1, 2, 4, 8)
    if data * fsdp <= 8 and (data, fsdp) != (2, 2)
]


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize(
    "name, quantize",
    [*((name, None) for name in methods()), ("LoRA", "nf4"), ("LoRA", "int8"), ("DoRA", "nf4")],
)
def test_every_mesh_gives_every_method_the_same(name, quantize, shape):
    alone, state = of_one_device(name, quantize)
    spread, other, _ = steps(row(name, quantize=quantize, mesh=Mesh(*shape)), 3, quickly=True)
    close(alone, spread)
    close(state.delta, jax.device_get(other.delta))


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "Full"])
def test_a_quantised_base_trains(name):
    settings = (
        row(name, quantize="nf4") if name != "Full" else config({"name": "Full"}, ("bias",), quantize="nf4")
    )
    trainer, _ = started(settings)
    packed = [leaf for leaf in jax.tree.leaves(trainer.frozen) if leaf.dtype == jnp.uint8]
    assert len(packed) >= 4, "the matrices of the layer"
    losses, state, _ = steps(settings, 4)
    assert np.all(np.isfinite(losses))
    spread, other, _ = steps(dataclasses.replace(settings, mesh=Mesh(2, 2, 2)), 4)
    close(losses, spread)
    # But for the bias of the keys, whose gradient is nothing but rounding, which Adam makes large.
    compared = lambda delta: {
        path: np.delete(leaf, np.s_[8:16]) if path.endswith("c_attn/bias") else leaf
        for path, leaf in named_leaves(jax.device_get(delta))
    }
    close(compared(state.delta), compared(other.delta))


def test_the_budget_is_spent():
    """Of rank 2 in three matrices three ranks are left at the end, and the penalty reaches the gradient."""
    settings = row("AdaLoRA", steps=5)
    _, state, _ = steps(settings, 5)
    assert sum(int(np.sum(left)) for left in lora_jax.optim.ranks(state.delta).values()) == 3
    free = dataclasses.replace(
        settings,
        optimizer=dataclasses.replace(
            settings.optimizer, adalora=Budget(target_rank=1, final_steps=1, orthogonality=0.0)
        ),
    )
    _, other, _ = steps(free, 2)
    _, state, _ = steps(settings, 2)
    assert any(
        not np.allclose(one, two)
        for one, two in zip(jax.tree.leaves(state.delta), jax.tree.leaves(other.delta), strict=True)
    )


@pytest.mark.parametrize(
    "method, rules, message",
    [
        (
            LORA,
            {"adalora": Budget(1)},
            "`optimizer.adalora` is for the method AdaLoRA, and `method.name` is LoRA",
        ),
        (LORA, {"lorafa": True}, "`optimizer.lorafa` is for the method LoRAFA, and `method.name` is LoRA"),
        (ROWS["AdaLoRA"], {}, "`method.name` is AdaLoRA, which needs a budget: set `optimizer.adalora`"),
        ({"name": "DeltaLoRA", "delayed": True}, {}, "`method.delayed` waits for `start_delta`"),
        (
            {"name": "Dora"},
            {},
            "`method.name` must be one of AdaLoRA, DeltaLoRA, .*got 'Dora'; did you mean `DoRA`",
        ),
    ],
)
def test_rules_belong_to_methods(method, rules, message):
    with pytest.raises(ValueError, match=message):
        config(method, rules=rules)
