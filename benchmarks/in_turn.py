"""Times that are compared: what is timed takes turns, so that what else the machine does falls on all of
it.
"""

import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar


Way, Time = TypeVar("Way", bound=Hashable), TypeVar("Time")


class Ratio(NamedTuple):
    """`median` of the ratios of all rounds, and `spread`, half the distance of their quartiles."""

    median: float
    spread: float


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
