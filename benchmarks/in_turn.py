"""Times that are compared: what is timed takes turns, so that what else the machine does falls on all of
it.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax


Way, Time = TypeVar("Way", bound=Hashable), TypeVar("Time")


class Ratio(NamedTuple):
    """`median` of the ratios of all rounds, and `spread`, half the distance of their quartiles."""

    median: float
    spread: float


@dataclasses.dataclass
class Prepared:
    """A compiled step and its arguments. Each step replaces the first two: what trains, and its optimiser's
    state.
    """

    step: Callable
    arguments: list[Any]

    def take(self) -> tuple[float, float]:
        """One step: its wall-clock seconds and its CPU seconds."""
        marks = time.perf_counter(), time.process_time()
        found = jax.block_until_ready(self.step(*self.arguments))
        self.arguments[:2] = found[:2]
        return time.perf_counter() - marks[0], time.process_time() - marks[1]


def taken(ways: Mapping[Way, Callable[[], Time]], rounds: int) -> dict[Way, list[Time]]:
    """What each way returns in each round, in an order that turns from round to round."""
    found: dict[Way, list[Time]] = {way: [] for way in ways}
    order = list(ways)
    for _ in range(rounds):
        for way in order:
            found[way].append(ways[way]())
        order = [*order[1:], *order[:1]]
    return found


def ratio(own: Sequence[float], base: Sequence[float]) -> Ratio:
    """Of the two in the same round."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(own, base, strict=True)], n=4)
    return Ratio(middle, (high - low) / 2)
