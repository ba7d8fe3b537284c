"""What the host does while the devices compute: it reads the next input and sends the next computation, and
waits for no result that nobody asked for yet.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stopping import at_the_end_of, told_after
from training import config, examples, optax_promotes as optax_promotes, started

from experiments.progress import read_metrics, Record
from experiments.running.preemption import StopRequest
from experiments.tasks.examples import Splits
from experiments.training import trainer as train
from experiments.training.ahead import Ahead, one_behind
from lora_jax.checkpoint import Checkpoints


# Times that a product is taken: a step of this takes long beside what the host does for one.
LONG = 150


def test_an_input_is_made_once_and_before_it_is_asked_for():
    made = []
    inputs = Ahead(lambda step: made.append(step) or step)
    assert inputs.take(1) == 1
    inputs.prepare(2)
    assert made == [1, 2]
    assert inputs.take(2) == 2 and made == [1, 2]
    inputs.prepare(3)
    assert inputs.take(7) == 7, "never that of another step"
    assert made == [1, 2, 3, 7]


def test_an_error_waits_for_the_step_that_needs_the_input():
    def make(step):
        raise OSError(f"the input of step {step}")

    inputs = Ahead(make)
    inputs.prepare(2)
    with pytest.raises(OSError, match="the input of step 2"):
        inputs.take(2)
    with pytest.raises(OSError, match="the input of step 3"):
        inputs.take(3)


@pytest.mark.parametrize("count", range(4))
def test_one_result_is_on_its_way_while_another_is_read(count):
    events = []

    def results():
        for number in range(count):
            events.append(("begin", number))
            yield number

    for number in one_behind(results()):
        events.append(("read", number))
    assert [number for what, number in events if what == "read"] == list(range(count))
    for number in range(count - 1):
        assert events.index(("begin", number + 1)) < events.index(("read", number))


def fit(tmp_path, trainer, state, splits, stop_requested=lambda: False):
    settings = trainer.config.train
    tmp_path.mkdir(exist_ok=True)
    with (
        Checkpoints(tmp_path / "checkpoints", identity={}) as checkpoints,
        Record(tmp_path, "run", settings.steps, state.step) as record,
    ):
        return trainer.fit(state, splits, checkpoints, record, stop_requested)


def slowly(function):
    """`function` of a computation, after a computation that takes long; the results are the same."""

    @jax.jit
    def long(of):
        x = jnp.full((256, 256), jnp.tanh(of))
        x = jax.lax.fori_loop(0, LONG, lambda _, x: jnp.tanh(x @ x), x)
        return jnp.minimum(jnp.abs(jnp.sum(x)), 0.0)

    def delayed(trained, *rest):
        leaves, tree = jax.tree.flatten(trained)
        first = leaves[0] + long(leaves[0].ravel()[0]).astype(leaves[0].dtype)
        return function(jax.tree.unflatten(tree, [first, *leaves[1:]]), *rest)

    return delayed


@pytest.fixture
def sent(monkeypatch):
    """Of each step that is sent: whether the one before it, and the one before that, were computed by
    then.
    """
    found, results = [], []
    compiled_step = train.Trainer.compiled_step

    def watched(trainer, state):
        step = slowly(compiled_step(trainer, state))

        def send(*arguments):
            found.append([result.is_ready() for result in results[:-3:-1]])
            delta, opt_state, numbers = step(*arguments)
            results.append(numbers["finite"])
            return delta, opt_state, numbers

        return send

    monkeypatch.setattr(train.Trainer, "compiled_step", watched)
    return found


@pytest.mark.parametrize("log_every", [100, 4, 1])
def test_a_step_is_sent_while_the_one_before_is_computed(tmp_path, sent, log_every):
    """But after a step that something follows, whose numbers are read first. No step is sent that two others
    would have to wait for: who asks the run to stop waits for two at most.
    """
    settings = config(steps=12, log_every=log_every, eval_every=100, checkpoint_every=100)
    trainer, state = started(settings)
    fit(tmp_path, trainer, state, Splits(examples(), examples(8)))
    assert len(sent) == 12
    # The first step compiles, and after the third the gradients are looked at.
    waited_for = {done for done in range(1, 12) if done % log_every == 0 or done == 3}
    for done in waited_for:
        assert sent[done][0], done
    free = [done for done in range(2, 12) if done not in waited_for]
    # Now and then the machine has other things to do, and a step is computed before the host comes to it.
    assert sum(not sent[done][0] for done in free) >= len(free) / 2, sent
    assert all(step[1] for step in sent[2:]), sent


@pytest.mark.parametrize("log_every", [100, 4])
def test_the_next_batch_is_read_before_the_host_waits(tmp_path, monkeypatch, log_every):
    """Also at a step whose numbers are logged: the devices do not wait for the input after it."""
    settings = config(steps=8, log_every=log_every, eval_every=100, checkpoint_every=100)
    trainer, state = started(settings)
    data, events = examples(), []
    device_batch, log = train.Trainer.device_batch, Record.log

    def reading(trainer, source, *more):
        events.append("read" if source is data else "evaluate")
        return device_batch(trainer, source, *more)

    def logging(record, step, **numbers):
        events.append(("log", step))
        log(record, step, **numbers)

    monkeypatch.setattr(train.Trainer, "device_batch", reading)
    monkeypatch.setattr(Record, "log", logging)
    fit(tmp_path, trainer, state, Splits(data, examples(8)))
    for step in range(log_every, 8, log_every):
        assert events[: events.index(("log", step))].count("read") == step + 1
    assert events.count("read") == 8, "none is read for a step that does not come"


def test_an_evaluation_sends_a_batch_before_it_reads_the_one_before(monkeypatch):
    settings = config(batch=8)
    trainer, state = started(settings)
    compiled, results, ready = slowly(jax.jit(trainer.loss)), [], []

    def send(*arguments):
        ready.extend(result.is_ready() for result in results[-1:])
        numbers = compiled(*arguments)
        results.append(numbers[1])
        return numbers

    found = trainer.evaluate(send, state.delta, examples(64))
    assert len(ready) == 7 and sum(ready) <= 3, ready
    np.testing.assert_allclose(
        found, trainer.evaluate(jax.jit(trainer.loss), state.delta, examples(64)), rtol=1e-6
    )


class Broken:
    """Examples whose reading fails at one step."""

    def __init__(self, whole, number):
        self._whole, self._left = whole, number

    def __getattr__(self, name):
        return getattr(self._whole, name)

    def __len__(self):
        return len(self._whole)

    def size(self, indices):
        self._left -= 1
        if self._left == 0:
            raise OSError("the file is gone")
        return self._whole.size(indices)


def test_an_error_of_the_input_comes_at_its_step(tmp_path):
    """What was due after the step before is done, so that the run goes on from there."""
    settings = config(steps=6, log_every=1, eval_every=100, checkpoint_every=3)
    trainer, state = started(settings)
    with pytest.raises(OSError, match="the file is gone"):
        fit(tmp_path, trainer, state, Splits(Broken(examples(), 4), examples(8)))
    logged = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    assert logged == [1, 2, 3]
    with Checkpoints(tmp_path / "checkpoints", identity={}) as checkpoints:
        assert checkpoints.latest() == 3
        restored = checkpoints.restore(*started(settings)[1][:2])
    whole = fit(tmp_path, trainer, restored, Splits(examples(), examples(8)))
    at_once = fit(tmp_path / "once", *started(settings), Splits(examples(), examples(8)))
    jax.tree.map(np.testing.assert_array_equal, whole.delta, at_once.delta)


def test_an_input_that_no_step_asks_for_raises_nothing(tmp_path):
    """The run is stopped at the step before."""
    settings = config(steps=6, log_every=100, eval_every=100, checkpoint_every=100)
    trainer, state = started(settings)
    with told_after(3), StopRequest() as asked:
        stopped = fit(tmp_path, trainer, state, Splits(Broken(examples(), 4), examples(8)), asked)
    assert stopped.step == 3


def test_nothing_stays_on_the_devices(tmp_path):
    """Of a run that is stopped between two steps: its input in advance goes with it."""
    settings = config(steps=6, log_every=100, eval_every=100, checkpoint_every=100)
    trainer, state = started(settings)
    inputs = lambda: [array for array in jax.live_arrays() if array.shape == (1, 8, 12)]
    seen = []
    with (
        at_the_end_of(2, lambda: seen.append(len(inputs()))),
        told_after(3),
        StopRequest() as asked,
    ):
        fit(tmp_path, trainer, state, Splits(examples(), examples(8)), asked)
    assert seen == [4], "the arrays of the next step"
    assert not inputs()
