"""What must not go unseen while a run trains: a loss or a gradient that is not finite, and arrays that have
no gradient.

The numbers of a step are read where the run waits for the device anyway: when it logs, evaluates or saves.
A step that is not finite changes nothing (see `step`), so that whatever is saved is sound. Left out: losses
that are finite and grow, which the curve shows.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np


# With `train.not_finite` "skip", a run ends after so many skipped steps in a row: it will not recover by
# itself.
MOST_SKIPPED = 10
# The first step at which every array has a gradient. Adapters begin with B = 0, so that A has none at the
# first step, and a warm-up's first step has rate 0.
FIRST_FULL_GRADIENT = 3


def not_finite_steps(directory: Path, step: int) -> list[int]:
    """The steps up to `step` that were not finite, as an earlier start of the run has kept them."""
    found = (int(file.stem.removeprefix("step_")) for file in (directory / "not_finite").glob("step_*.json"))
    return sorted(number for number in found if number <= step)


class NotFinite(ValueError):
    """A step whose loss or gradient is not finite."""


class Guards:
    """Watches the steps of one run.

    `delta`: what trains. `directory`: the run's; batches for inspection go to its `not_finite/`.
    `batch(step)`: the indices and the arrays of a step, counted from 1. `skip`: the config's choice.
    `say(step, text)`: tells the user. `before`: what `not_finite_steps` found, where a run goes on.
    """

    def __init__(
        self,
        delta: Any,
        directory: Path,
        batch: Callable[[int], tuple[np.ndarray, dict]],
        *,
        skip: bool,
        say: Callable[[int, str], None],
        before: Sequence[int] = (),
    ):
        flat, _ = jax.tree_util.tree_flatten_with_path(delta)
        self._names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
        self._directory = directory / "not_finite"
        self._batch, self._skip, self._say = batch, skip, say
        self._pending: list[tuple[int, dict]] = []
        self._skipped = set(before)

    @property
    def skipped(self) -> int:
        """How many steps were skipped. The update rule has not seen them, so that its schedule is as many
        steps behind.
        """
        return len(self._skipped)

    def add(self, step: int, numbers: dict[str, jax.Array]) -> None:
        """Keeps the numbers of a step, unread."""
        self._pending.append((step, numbers))

    def check(self) -> None:
        """Reads the numbers that were added.

        Raises:
          NotFinite: a step was not finite, and such steps are not skipped; too many were skipped in a row.
            The batch is written first.
        """
        pending, self._pending = self._pending, []
        # All at once: one after the other they would each wait for a copy.
        finite = jax.device_get([numbers["finite"] for _, numbers in pending])
        for (step, numbers), was_finite in zip(pending, finite, strict=True):
            if step == FIRST_FULL_GRADIENT:
                self._report_without_gradient(np.asarray(numbers["largest"]))
            if not was_finite:
                self._not_finite(step, numbers)

    def _not_finite(self, step: int, numbers: dict[str, jax.Array]) -> None:
        loss, largest = float(numbers["loss"]), np.asarray(numbers["largest"])
        worst = next(
            (name for name, value in zip(self._names, largest, strict=True) if not np.isfinite(value)), None
        )
        what = (
            f"the loss is {loss}"
            if not np.isfinite(loss) or worst is None
            else f"the gradient of {worst!r} is not finite"
        )
        file = self._write(step, loss, largest)
        if not self._skip:
            raise NotFinite(
                f"step {step}: {what}, and nothing was changed; its batch is in `{file}`. Lower `train.lr`, "
                "set `optimizer.clip`, "
                'or pass over such steps with `train.not_finite` "skip".'
            )
        self._skipped.add(step)
        if self._skipped.issuperset(range(step - MOST_SKIPPED + 1, step + 1)):
            raise NotFinite(
                f"step {step}: {what}, as in the {MOST_SKIPPED - 1} steps before it, which were skipped; "
                f"their batches are in `{file.parent}`."
            )
        self._say(step, f"step {step} was skipped: {what}; its batch is in `{file}`")

    def _write(self, step: int, loss: float, largest: np.ndarray) -> Path:
        indices, arrays = self._batch(step)
        file = self._directory / f"step_{step}.npz"
        if jax.process_index() == 0:
            self._directory.mkdir(exist_ok=True)
            np.savez_compressed(file, examples=indices, **arrays)
            gradients = dict(zip(self._names, (str(value) for value in largest), strict=True))
            facts = {
                "step": step,
                "loss": str(loss),
                "largest absolute gradient": gradients,
                "examples": indices.tolist(),
            }
            file.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
        return file

    def _report_without_gradient(self, largest: np.ndarray) -> None:
        """Tells the user which leaves have no gradient. An adapter has one if any of its arrays has."""
        leaves = [name.rpartition("/")[0] or name for name in self._names]
        alive = {leaf for leaf, value in zip(leaves, largest, strict=True) if value != 0}
        dead = sorted(set(leaves) - alive)
        if dead:
            more = f" and {len(dead) - 5} more" if len(dead) > 5 else ""
            self._say(
                FIRST_FULL_GRADIENT,
                f"after {FIRST_FULL_GRADIENT - 1} steps the gradient is still zero everywhere for "
                f"{', '.join(map(repr, dead[:5]))}{more} (of {len(set(leaves))}): "
                "the loss does not depend on them, so that they will not learn; leave them out of "
                "`targets`, or look for a layer that is not used",
            )
