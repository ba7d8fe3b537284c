"""Runs in this very process that end early: told so by the signal that users send, or lost without a word."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

import pytest

from experiments.progress import Record


class Lost(BaseException):
    """The machine is gone. No handler of errors in a run may take this for one of its own."""


@contextlib.contextmanager
def at_the_end_of(step: int, act: Callable[[], None]) -> Iterator[None]:
    """Calls `act` once a run has computed `step`, before its log, its evaluation and its checkpoint."""
    advance = Record.advance

    def advance_and_act(record: Record, done: int) -> None:
        advance(record, done)
        if done == step:
            act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Record, "advance", advance_and_act)
        yield


@contextlib.contextmanager
def told_after(step: int) -> Iterator[None]:
    """SIGTERM, as a cluster sends it. The run saves this step, whatever its schedule, and returns."""
    with at_the_end_of(step, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        yield


@contextlib.contextmanager
def lost_in(step: int) -> Iterator[None]:
    """Nothing is left of `step`: the run goes on from its last checkpoint before. Fails if it gets by."""

    def go() -> None:
        raise Lost

    with at_the_end_of(step, go), pytest.raises(Lost):
        yield
