"""Which adapters have lost: at given steps the worse half of the combinations is dropped (successive halving,
Jamieson and Talwalkar, AISTATS 2016, arXiv 1502.07943).

Seeds of one combination stay or go together, by their mean. Combinations of other data are not compared, as
their losses are of other texts. A task that is judged is compared by its metric (`compared`).
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def points(fractions: Sequence[float], steps: int) -> tuple[int, ...]:
    """The steps after which adapters are dropped.

    >>> points([0.25, 0.5], 200)
    (50, 100)

    Raises `ValueError` for a fraction that is no step between the first and the last.
    """
    found = sorted(round(fraction * steps) for fraction in fractions)
    for fraction in fractions:
        if not 0 < round(fraction * steps) < steps:
            raise ValueError(
                f"`--halving` has {fraction:g}, which of {steps} steps is none between the first and the "
                "last: pass fractions such as 0.25,0.5."
            )
    return tuple(dict.fromkeys(found))


def combination(values: Mapping[str, Any]) -> str:
    """All but the seed: what adapters are compared by."""
    return json.dumps({key: value for key, value in values.items() if key != "seed"})


def of_data(values: Mapping[str, Any]) -> str:
    """What an adapter learns from."""
    return json.dumps({key: value for key, value in values.items() if key.split(".")[0] == "data"})


def worse_half(costs: Mapping[str, float | None], values: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The names to drop, of those that have a cost, such as a loss; None is one that is not finite.

    >>> values = {f"lr={lr}": {"train.lr": lr} for lr in (1, 2, 3)}
    >>> worse_half({"lr=1": 2.0, "lr=2": 1.0, "lr=3": None}, values)
    ['lr=3']
    """
    means: dict[str, dict[str, float]] = {}
    for name in costs:
        data, mine = of_data(values[name]), combination(values[name])
        own = [
            math.inf if (cost := costs[other]) is None else cost
            for other in costs
            if combination(values[other]) == mine
        ]
        means.setdefault(data, {})[mine] = statistics.fmean(own)
    lost: set[str] = set()
    for of_one in means.values():
        ranked = sorted(of_one, key=lambda key: of_one[key])
        lost |= set(ranked[-(-len(ranked) // 2) :])
    return [name for name in costs if combination(values[name]) in lost]
