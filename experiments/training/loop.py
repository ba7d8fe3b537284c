"""The loop over steps: what is done and in which order, for one adapter and for many at once.

While the devices compute a step, the host reads the examples of the next one and sends it. It waits for the
step before, so that a run which is asked to stop has two at most to finish, and for this one only where
something is due. Left out: what a step is, which the caller says.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from experiments.config import Train
from experiments.progress import Record
from experiments.training.ahead import Ahead
from experiments.training.due import due
from experiments.training.guards import FIRST_FULL_GRADIENT
from lora_jax.checkpoint import State
from lora_jax.processes import on_first


class Watch(Protocol):
    """What is told of every step, and reads what it was told where the loop waits anyway: `Guards`."""

    def add(self, step: int, numbers: dict[str, jax.Array]) -> None: ...

    def check(self) -> None: ...


class Saves(Protocol):
    """What takes the states to keep: `Checkpoints`."""

    def save(self, state: State, loss: float | None = None, *, temporary: bool = False) -> None: ...


class Work(NamedTuple):
    """What is trained. Steps are counted from 1.

    `step(delta, opt_state, *inputs(done))` is delta, opt_state and numbers; `position(done)` the epoch of the
    batch after it, and its number. `evaluate(delta)` is what the log has of an evaluation, `valid_loss` and
    metrics; `loss(found)` is what checkpoints are compared by, of that. `described(done, numbers)` is what
    the log has of a step. `enough(done, found)` is told of every evaluation, and of the state at the start
    with None, and says whether to stop early.
    """

    train: Train
    inputs: Callable[[int], tuple]
    step: Callable[..., tuple]
    evaluate: Callable[[Any], dict[str, Any]]
    described: Callable[[int, dict[str, jax.Array]], dict[str, Any]]
    position: Callable[[int], tuple[int, int]]
    guards: Watch
    loss: Callable[[dict[str, Any]], Any] = lambda found: found["valid_loss"]
    enough: Callable[[int, dict[str, Any] | None], bool] = lambda done, found: False


def fit(
    work: Work,
    state: State,
    checkpoints: Saves,
    record: Record,
    stop_requested: Callable[[], bool],
    until: int | None = None,
) -> State:
    """Trains from `state` to the last step, or to `until`, or until `stop_requested()`, which is called after
    each step: then it saves the state and returns it.
    """
    train, guards = work.train, work.guards
    last = train.steps if until is None else until
    if state.step % train.eval_every == 0 and not on_first(lambda: record.evaluated(state.step)):
        found = work.evaluate(state.delta)
        record.log(state.step, **found)
        work.enough(state.step, found)
    if work.enough(state.step, None):
        return state
    started, since = time.perf_counter(), state.step
    ahead, previous = Ahead(work.inputs), None
    for done in range(state.step + 1, last + 1):
        delta, opt_state, numbers = work.step(state.delta, state.opt_state, *ahead.take(done))
        state = State(delta, opt_state, done, work.position(done), state.key)
        guards.add(done, numbers)
        if done < last:
            ahead.prepare(done + 1)
        jax.block_until_ready(previous)
        previous = numbers["finite"]
        record.advance(done)
        stop = stop_requested()
        now_due = due(done, train, stop)
        if now_due.any() or done in (FIRST_FULL_GRADIENT, last):
            guards.check()
        if now_due.log:
            now = time.perf_counter()
            record.log(
                done, **work.described(done, numbers), seconds_per_step=(now - started) / (done - since)
            )
            started, since = now, done
        loss, enough = None, False
        if now_due.evaluate:
            found = work.evaluate(state.delta)
            record.log(done, **found)
            loss, enough = work.loss(found), work.enough(done, found)
        if enough:
            record.note(done, f"stopped at step {done}: no better for {train.patience} evaluations")
        if now_due.save or enough:
            checkpoints.save(state, loss, temporary=now_due.temporary and not enough)
        if now_due.evaluate or now_due.save:
            started, since = time.perf_counter(), done
        if stop or enough:
            break
    return state
