"""Guards of a run: a loss or a gradient that is no number changes nothing and is kept for inspection, and
what takes no part is named.
"""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from stopping import told_after
from training import optax_promotes as optax_promotes

import lora_jax
from experiments.config import Architecture, Base, Config, Source, TextData, Train
from experiments.progress import read_metrics, Record
from experiments.running.preemption import StopRequest
from experiments.tasks.examples import Blocks, Splits
from experiments.training import guards, order, sharded, trainer as train
from experiments.training.guards import Guards, NotFinite
from experiments.training.step import step_of
from lora_jax.checkpoint import Checkpoints
from lora_jax.models.gpt2 import GPT2, GPT2Config


MODEL = GPT2(GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=2, n_head=2))


# --- the step -----------------------------------------------------------------------------------------------


def step_on(x, state=None, **options):
    """One step of w * x on the numbers `x`, one part each; NaN and infinity come from the data."""
    loss = lambda delta, frozen, piece, key: (jnp.sum(delta["w"] * piece["x"]), jnp.float32(1))
    tx = optax.adam(0.1)
    delta = {"w": jnp.ones(2), "unused": jnp.ones(3)}
    delta, opt_state = state or (delta, tx.init(delta))
    step = jax.jit(step_of(loss, tx, len(x), **options))
    return step(delta, opt_state, None, {"x": jnp.asarray(x, jnp.float32)}, jax.random.key(0))


@pytest.mark.parametrize("x", [[math.nan], [math.inf], [1.0, math.nan], [-math.inf, 1.0]])
def test_a_step_that_is_not_finite_changes_nothing(x):
    before = step_on([1.0])[:2]
    delta, opt_state, numbers = step_on(x, before)
    assert not numbers["finite"]
    jax.tree.map(np.testing.assert_array_equal, (delta, opt_state), before)


def test_a_gradient_that_is_not_finite_under_a_loss_that_is():
    """The square root of 0, whose slope is infinite: the loss alone would say nothing."""
    loss = lambda delta, frozen, piece, key: (jnp.sum(jnp.sqrt(delta["w"])), jnp.float32(1))
    delta = {"w": jnp.zeros(2)}
    found, _, numbers = step_of(loss, optax.sgd(0.1))(
        delta, optax.sgd(0.1).init(delta), None, {"x": jnp.ones((1, 1))}, jax.random.key(0)
    )
    assert math.isfinite(numbers["loss"]) and not numbers["finite"] and not np.isfinite(numbers["largest"][0])
    np.testing.assert_array_equal(found["w"], 0)


def test_a_penalty_that_is_not_finite_counts_too():
    _, _, numbers = step_on([1.0], penalty=lambda delta: jnp.sum(jnp.log(delta["w"] - 1)))
    assert not numbers["finite"] and np.isfinite(numbers["largest"]).all()


def test_numbers_of_a_sound_step():
    delta, _, numbers = step_on([2.0, 5.0])
    assert numbers["finite"] and numbers["tokens"] == 2
    # Sorted by name, the unused first; sums of parts over the tokens, whose guard is 1e-4.
    np.testing.assert_allclose(numbers["largest"], [0, 7 / 2.0001], rtol=1e-6)
    np.testing.assert_allclose(numbers["loss"], 14 / 2.0001, rtol=1e-6)
    np.testing.assert_allclose(numbers["gradient_norm"], math.sqrt(2) * 7 / 2.0001, rtol=1e-6)
    assert (np.asarray(delta["w"]) < 1).all() and (np.asarray(delta["unused"]) == 1).all()


# --- the watch ----------------------------------------------------------------------------------------------


def numbers(finite=True, largest=(1.0, 1.0), loss=2.0):
    return {"loss": np.float32(loss), "finite": np.bool_(finite), "largest": np.asarray(largest, np.float32)}


def guards_of(tmp_path, skip=False, delta=None):
    said = []
    batch = lambda step: (np.array([step, 7]), {"input_ids": np.full((2, 3), step)})
    delta = {"one": {"a": 0.0, "b": 0.0}} if delta is None else delta
    return Guards(delta, tmp_path, batch, skip=skip, say=lambda step, text: said.append((step, text))), said


def test_the_first_step_that_is_not_finite_is_named_and_kept(tmp_path):
    watch, _ = guards_of(tmp_path)
    for step in (1, 2, 3, 4):
        watch.add(step, numbers(finite=step < 3, loss=2.0 if step < 3 else math.nan))
    with pytest.raises(
        NotFinite, match=r"step 3: the loss is nan.*step_3.npz.*`train.lr`.*`optimizer.clip`.*\"skip\""
    ):
        watch.check()
    kept = np.load(tmp_path / "not_finite" / "step_3.npz")
    assert kept["examples"].tolist() == [3, 7] and (kept["input_ids"] == 3).all()
    facts = json.loads((tmp_path / "not_finite" / "step_3.json").read_text())
    assert (
        facts["loss"] == "nan"
        and facts["largest absolute gradient"] == {"one/a": "1.0", "one/b": "1.0"}
        and facts["examples"] == [3, 7]
    )


def test_the_gradient_at_fault_is_named(tmp_path):
    watch, _ = guards_of(tmp_path)
    watch.add(1, numbers(finite=False, largest=(1.0, math.inf)))
    with pytest.raises(NotFinite, match="the gradient of 'one/b' is not finite"):
        watch.check()


def test_skipping_says_so_and_ends_when_nothing_comes_right(tmp_path):
    watch, said = guards_of(tmp_path, skip=True)
    bad = numbers(finite=False, loss=math.inf)
    for step in range(1, guards.MOST_SKIPPED):
        watch.add(step, bad)
    watch.add(guards.MOST_SKIPPED, numbers())
    watch.check()
    assert (
        watch.skipped == guards.MOST_SKIPPED - 1 == len(said)
        and said[0][0] == 1
        and "step 1 was skipped: the loss is inf" in said[0][1]
    )
    for step in range(20, 20 + guards.MOST_SKIPPED):
        watch.add(step, bad)
    with pytest.raises(
        NotFinite, match=f"step 29: the loss is inf, as in the {guards.MOST_SKIPPED - 1} steps before it"
    ):
        watch.check()


def test_a_run_that_goes_on_remembers_what_was_skipped(tmp_path):
    """Nine steps in a row before it was stopped and one after it are ten."""
    watch, _ = guards_of(tmp_path, skip=True)
    bad = numbers(finite=False, loss=math.inf)
    for step in (2, *range(11, 20)):
        watch.add(step, bad)
    watch.check()
    assert (
        guards.not_finite_steps(tmp_path, 17) == [2, *range(11, 18)]
        and guards.not_finite_steps(tmp_path / "none", 17) == []
    )
    again = Guards(
        {"one": {"a": 0.0, "b": 0.0}},
        tmp_path,
        lambda step: (np.array([step]), {}),
        skip=True,
        say=lambda *_: None,
        before=guards.not_finite_steps(tmp_path, 19),
    )
    assert again.skipped == 10
    again.add(20, bad)
    with pytest.raises(NotFinite, match="step 20: the loss is inf, as in the 9 steps before it"):
        again.check()


@pytest.mark.parametrize(
    "largest, names", [([0, 1, 0, 0], "'two'"), ([1, 0, 0, 0.5], None), ([0, 0, 0, 0], "'one', 'two'")]
)
def test_an_adapter_without_a_gradient_is_reported_once(tmp_path, largest, names):
    """Of its two arrays one may have none: B's is there while A's is not."""
    watch, said = guards_of(tmp_path, delta={"one": {"a": 0.0, "b": 0.0}, "two": {"a": 0.0, "b": 0.0}})
    for step in range(1, 6):
        watch.add(step, numbers(largest=[0] * 4 if step < guards.FIRST_FULL_GRADIENT else largest))
    watch.check()
    assert [step for step, _ in said] == ([] if names is None else [3])
    assert names is None or f"zero everywhere for {names} (of 2)" in said[0][1]


# --- a run --------------------------------------------------------------------------------------------------


def run(tmp_path, apply=MODEL.apply, steps=6, **settings):
    """Trains a tiny model on 40 blocks, of which step 4 sees a poisoned one where `apply` is `poisoned`;
    returns the last state. Goes on where it was stopped.
    """
    tokens = np.arange(40 * 8 + 1) % 31
    tokens[8 * order.indices(0, 3, 40, 4)[1]] = 31
    splits = Splits(Blocks(tokens, 8), Blocks(tokens[:65], 8))
    made = Train(steps=steps, batch=4, lr=0.01, log_every=2, eval_every=6, checkpoint_every=6, **settings)
    base, data = Base(architecture=Architecture(8, 2, 2, 8), tokenizer="none"), TextData("text", "", "", 8)
    config = Config(
        "guarded", Source(None), base, data, {"name": "LoRA", "rank": 2}, ("attn/c_attn/kernel",), made
    )
    mesh = sharded.make_mesh(config.mesh)
    params, specs = sharded.on_mesh(
        mesh,
        jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"],
        MODEL.partition_rules,
    )
    frozen, delta = lora_jax.lorafy(
        params, list(config.targets), method=lora_jax.LoRA(rank=2), key=jax.random.key(1)
    )
    trainer = train.Trainer.create(config, mesh, apply, frozen, delta, specs)
    state = trainer.start(delta, specs, jax.random.key(2))
    with Checkpoints(tmp_path / "checkpoints", identity={}) as checkpoints:
        if checkpoints.latest() is not None:
            state = checkpoints.restore(state.delta, state.opt_state)
        with Record(tmp_path, "guarded", steps, state.step) as record:
            with StopRequest() as stop_requested:
                return trainer.fit(state, splits, checkpoints, record, stop_requested)


def poisoned(params, ids, **options):
    """Losses that are no numbers where token 31 is read."""
    return jnp.where((ids == 31).any(), jnp.nan, MODEL.apply(params, ids, **options))


def test_a_run_stops_with_the_batch_saved(tmp_path):
    with pytest.raises(NotFinite, match=r"step 4: the loss is nan"):
        run(tmp_path, poisoned)
    kept = np.load(tmp_path / "not_finite" / "step_4.npz")
    assert (kept["input_ids"] == 31).any() and kept["examples"].tolist() == order.indices(
        0, 3, 40, 4
    ).tolist()
    assert not (tmp_path / "checkpoints").exists(), "nothing of it is saved"


def test_a_run_skips_the_step_and_goes_on(tmp_path, capsys):
    """It ends where a run ends whose fourth step was never taken, and is told once."""
    state = run(tmp_path, poisoned, not_finite="skip")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.delta, state.opt_state)))
    counts = [int(leaf) for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 0]
    assert set(counts) == {5}, "six steps, of which the rule has seen five"
    assert capsys.readouterr().out.count("guarded: step 4 was skipped: the loss is nan") == 1
    notes = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "note" in line]
    assert [line["step"] for line in notes] == [4]
    rates = [line["lr"] for line in read_metrics(tmp_path / "metrics.jsonl") if "lr" in line]
    np.testing.assert_allclose(
        rates,
        [0.01 * (1 - taken / 6) for taken in (1, 2, 4)],
        rtol=1e-6,
        err_msg="the rate of the update that was taken",
    )


def test_a_run_that_was_stopped_remembers_what_it_skipped(tmp_path, capsys):
    """Its rates stay a step behind, and the step is told once."""
    lines = []
    for name in ("whole", "parts"):
        directory = tmp_path / name
        directory.mkdir()
        if name == "parts":
            with told_after(5):
                run(directory, poisoned, not_finite="skip")
        run(directory, poisoned, not_finite="skip")
        found = read_metrics(directory / "metrics.jsonl")
        lines.append([(line["step"], line.get("loss"), line.get("lr")) for line in found])
    assert lines[0] == lines[1] and len(lines[0]) == 6


def test_a_run_reports_layers_that_are_not_used(tmp_path, capsys):
    def cut(params, ids, **options):
        """The second layer sees its weights as constants."""
        held = {
            name: jax.lax.stop_gradient(value) if name == "h" else value
            for name, value in params["params"].items()
        }
        held["h"] = {"0": params["params"]["h"]["0"], "1": held["h"]["1"]}
        return MODEL.apply({"params": held}, ids, **options)

    run(tmp_path, cut)
    out = capsys.readouterr().out
    assert out.count("zero everywhere for 'h/1/attn/c_attn/kernel' (of 2)") == 1
    (tmp_path / "whole").mkdir()
    run(tmp_path / "whole")
    assert "zero everywhere" not in capsys.readouterr().out
