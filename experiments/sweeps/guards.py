"""The guards of a sweep: those of a run for each adapter, of which one that diverges stops no other."""

from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from experiments.training.guards import Guards, MOST_SKIPPED, not_finite_steps, NotFinite


def lost_at(directory: Path, step: int, skip: bool) -> int | None:
    """The step up to `step` at which a run of its own would have ended: that was not finite, or the last of
    many that were skipped. None: there is none.
    """
    found = not_finite_steps(directory, step)
    if not skip:
        return found[0] if found else None
    ends = (last for last in found if set(found).issuperset(range(last - MOST_SKIPPED + 1, last + 1)))
    return next(ends, None)


class EachGuards:
    """Watches the steps of several adapters, whose numbers are rows of the step's.

    `guards`: of each by its name, in the order of the rows. `lost`: those that are not watched any more.
    `say(step, text)`: tells the user.
    """

    def __init__(self, guards: Mapping[str, Guards], lost: set[str], say: Callable[[int, str], None]):
        self._guards, self._lost, self._say = guards, set(lost), say
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []

    @property
    def skipped(self) -> list[int]:
        """How many steps of each were skipped."""
        return [guards.skipped for guards in self._guards.values()]

    def add(self, step: int, numbers: dict[str, jax.Array]) -> None:
        """Keeps the numbers of a step, unread."""
        self._pending.append((step, numbers))

    def check(self) -> None:
        """Reads the numbers that were added. An adapter of a step that is not finite is lost, and the others
        go on.
        """
        pending, self._pending = self._pending, []
        read = jax.device_get([numbers for _, numbers in pending])
        for (step, _), numbers in zip(pending, read, strict=True):
            for place, (name, guards) in enumerate(self._guards.items()):
                if name in self._lost:
                    continue
                guards.add(step, {key: value[place] for key, value in numbers.items()})
                try:
                    guards.check()
                except NotFinite as error:
                    self._lost.add(name)
                    self._say(step, f"{name} is lost: {error}")
