"""What must not pass unseen while a run trains: a loss or a gradient that is no number, and what trains
without a gradient.

Numbers of a step are read where the run waits for the device anyway: when it logs, evaluates or saves.
Meanwhile a step that is not finite has changed nothing (`step`), so that whatever is saved is sound. Left
out: losses that are finite and grow, which the curve shows.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np


# Steps in a row that are passed over with `train.not_finite` "skip": after so many nothing comes right by
# itself.
MOST_SKIPPED = 10
# Adapters begin with B = 0 and so without a gradient for A, and a warm-up's first step has rate 0: from the
# third step on each has one.
BY = 3


def not_finite_steps(directory: Path, step: int) -> list[int]:
    """Those up to `step` whose batches an earlier start of the run has kept."""
    found = (int(file.stem.removeprefix("step_")) for file in (directory / "not_finite").glob("step_*.json"))
    return sorted(number for number in found if number <= step)


class NotFinite(ValueError):
    """A step whose loss or gradient is not finite."""


class Guards:
    """Watches the steps of one run. `delta`: what trains. `directory`: of the run; batches for inspection go
    to its `not_finite/`.

    `batch(step)` gives the indices and the arrays of a step, counted from 1, `skip` is the config's choice,
    and `say(step, text)` tells whoever watches. `before`: what `not_finite_steps` found, where a run goes on.
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
        """How many steps were skipped, of which the update rule has seen nothing: its schedule is so many
        steps behind.
        """
        return len(self._skipped)

    def add(self, step: int, numbers: dict[str, jax.Array]) -> None:
        """The numbers of a step, which are not read yet."""
        self._pending.append((step, numbers))

    def check(self) -> None:
        """Reads what was added. Raises `NotFinite`, after the batch is written, unless such steps are to
        be skipped.
        """
        pending, self._pending = self._pending, []
        for step, numbers in pending:
            if step == BY:
                self._report_without_gradient(np.asarray(numbers["largest"]))
            if not bool(numbers["finite"]):
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
        """An adapter's arrays lie beside each other, so that what counts is whether any of them has one."""
        places = [name.rpartition("/")[0] or name for name in self._names]
        alive = {place for place, value in zip(places, largest, strict=True) if value != 0}
        dead = sorted(set(places) - alive)
        if dead:
            more = f" and {len(dead) - 5} more" if len(dead) > 5 else ""
            self._say(
                BY,
                f"after {BY - 1} steps the gradient is still zero everywhere for "
                f"{', '.join(map(repr, dead[:5]))}{more} (of {len(set(places))}): "
                "the loss does not depend on them, so that they will not learn; leave them out of "
                "`targets`, or look for a layer that is not used",
            )
