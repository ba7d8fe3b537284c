"""The directory of a run's checkpoints: which there are, which to keep, and which to go on from."""

import functools
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..processes import on_first
from . import _average, _contents, _storage
from ._storage import Damaged


# Seconds for which a block that ends with an error waits for what several processes are writing.
PATIENCE = 10


class State(NamedTuple):
    """What a run needs to go on. `step`: the updates done. `position`: the epoch of the next batch, and its
    number within the epoch.

    >>> import jax, jax.numpy as jnp
    >>> from lora_jax.checkpoint import State
    >>> state = State({"w": jnp.zeros(2)}, (), step=0, position=(0, 0), key=jax.random.key(0))
    >>> state._replace(step=1, position=(0, 1)).position
    (0, 1)
    """

    delta: Any
    opt_state: Any
    step: int
    position: tuple[int, int]
    key: jax.Array


class NoneIntact(ValueError):
    """There are checkpoints, and all of them are damaged.

    ```python
    try:
        state = checkpoints.restore(delta, opt_state)
    except NoneIntact:
        checkpoints.put_aside()  # and begin again
    ```
    """


class Checkpoints:
    """The checkpoints in one directory, which is created by the first `save`.

    ```python
    with Checkpoints("run/checkpoints", identity={"base": fingerprint(params)}) as checkpoints:
        if checkpoints.latest() is not None:
            state = checkpoints.restore(delta, opt_state)     # shapes and shardings of these two are kept
        checkpoints.save(State(delta, opt_state, step, position, key))
    ```

    `identity`: what must be the same on resume, a short text each. `keep`: how many of the newest to keep.
    `keep_best`: whether to keep the one with the lowest `loss` too.

    With several processes (`jax.distributed`), all have the directory on one file system and call the same
    methods in the same order. Every method first waits for the checkpoint that is being written, so that its
    result does not depend on the time.
    """

    def __init__(
        self, directory: str | Path, *, identity: Mapping[str, str], keep: int = 2, keep_best: bool = False
    ):
        if keep < 1:
            raise ValueError(f"`keep` is {keep}: at least the newest checkpoint is kept, so pass 1 or more.")
        self._directory = Path(directory).absolute()
        self._identity = dict(identity)
        self._keep, self._keep_best = keep, keep_best
        self._writer = _storage.Writer()
        self._writing: int | None = None
        self._cleared = False
        self._known: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.wait()
            return
        try:
            # The block may have ended because another process has, and then a write would wait for that one.
            self._writer.wait(None if jax.process_count() == 1 else PATIENCE)
        except Exception as error:
            warnings.warn(
                str(self._not_written(self._writing, error)), stacklevel=2
            )  # the caller sees the error that ended the block

    def latest(self) -> int | None:
        """The newest complete step, or None. This creates nothing."""
        return max(self.steps(), default=None)

    def steps(self, *, temporary: bool = True) -> list[int]:
        """The complete steps, oldest first, with those whose checkpoint is `temporary` or without them."""
        self.wait()
        return on_first(
            lambda: [step for step in self._on_disk() if temporary or not self._said(step, "passing")]
        )

    def best(self) -> int | None:
        """The complete step with the lowest finite loss, the first of equal ones. None: no step has a
        loss.
        """
        self.wait()
        return on_first(lambda: self._best(self._on_disk()))

    def save(self, state: State, loss: float | None = None, *, temporary: bool = False) -> None:
        """Writes `state` under its step, atomically and with a checksum, then removes the oldest beyond
        `keep`.

        This waits for the checkpoint that was begun earlier, and returns when the arrays have been copied. A
        thread writes them, so that they may be donated at once. `loss`: the validation loss of `state`, for
        `best` and `keep_best`.
        `temporary`: it serves only to go on from, as where a run is interrupted. It is removed when the next
        one is complete, takes the place of no other, and is in no average.

        Raises:
          OSError: the checkpoint that was begun earlier could not be written.
          ValueError: the directory holds the step already.
        """
        self.wait()
        if jax.process_count() > 1:
            # The copy needs the arrays anyway, and no exchange of the processes then meets a running step.
            jax.block_until_ready((state.delta, state.opt_state))
        path = self._directory / str(state.step)
        if on_first(path.exists):
            raise ValueError(
                f"`{self._directory}` holds a checkpoint of step {state.step} already: go on from it, or "
                "take another directory."
            )
        facts = {
            "format": _contents.FORMAT,
            "step": state.step,
            "position": list(state.position),
            "key": np.asarray(jax.random.key_data(state.key)).tolist(),
            "key_impl": str(jax.random.key_impl(state.key)),
            "identity": self._identity,
            "loss": float(loss) if loss is not None and math.isfinite(loss) else None,
            "passing": temporary,  # the name that earlier checkpoints have
        }
        arrays = {"delta": _contents.named(state.delta), "opt_state": _contents.named(state.opt_state)}
        copied = _storage.copied(arrays)
        # The checksums are of what is saved, not of its copy, and the thread fetches them. A CPU computes in
        # the thread that asks, so that there the writing thread asks. With several processes it may not,
        # because that would be a collective beside those of the training step.
        sums = (
            None
            if jax.process_count() == 1 and jax.default_backend() == "cpu"
            else _contents.checksums(arrays)
        )
        complete = functools.partial(_contents.complete, facts, copied, sums)
        if not self._cleared:
            try:
                on_first(self._clear)
            except OSError as error:
                raise self._not_written(state.step, error) from error
            self._cleared = True
        self._writing = state.step
        self._writer.start(path, copied, complete, then=self._forget)

    def wait(self) -> None:
        """Returns when all that was saved is on the disk.

        Raises:
          OSError: writing failed. It says which step, why, and what to do.
        """
        try:
            self._writer.wait()
        except Exception as error:
            raise self._not_written(self._writing, error) from error

    def restore(self, delta: Any, opt_state: Any, *, step: int | None = None, best: bool = False) -> State:
        """The newest intact state, or that of `step`, or the `best` that is intact, with the structure,
        shapes, dtypes and shardings of `delta` and `opt_state`.

        A checkpoint that is cut short, or of which a bit has changed, is put aside with a warning, as
        `7.damaged`, and the run goes on from the one before it. Several processes all pass over what one of
        them cannot read.

        Raises:
          ValueError: the identity is another; an array differs in name, shape or dtype; there is no
            checkpoint, or none of `step`.
          NoneIntact: all checkpoints are damaged. It is a `ValueError`.
        """
        steps = sorted(self.steps(), reverse=True)
        if step is not None:
            if step not in steps:
                there = ", ".join(map(str, reversed(steps))) or "none"
                raise ValueError(
                    f"`step` is {step}, of which `{self._directory}` holds no checkpoint; of these steps it "
                    f"does: {there}."
                )
            steps = [step]
        if best:
            steps = on_first(lambda: self._by_loss(steps))
        if not steps:
            which = " that was saved with a finite loss" if best else ""
            raise ValueError(f"`{self._directory}` holds no checkpoint{which}. Save one first.")
        damaged: list[tuple[int, str]] = []
        for found, facts, arrays in self._intact(steps, {"delta": delta, "opt_state": opt_state}, damaged):
            self._put_aside(damaged, found)
            key = jax.random.wrap_key_data(jnp.asarray(facts["key"], jnp.uint32), impl=facts["key_impl"])
            return State(arrays["delta"], arrays["opt_state"], found, tuple(facts["position"]), key)
        listed = "; ".join(f"step {number}: {reason}" for number, reason in damaged)
        raise NoneIntact(
            f"`{self._directory}` holds no intact checkpoint ({listed}): take one from a copy, or start "
            "again in another directory."
        )

    def average(self, delta: Any, *, last: int) -> Any:
        """The mean of the trained arrays of the newest `last` intact checkpoints, with the structure and
        shardings of `delta`.

        ```python
        smooth = checkpoints.average(state.delta, last=4)     # of Checkpoints(..., keep=4), or more
        ```

        Averaging of weights, Izmailov et al., UAI 2018, arXiv 1803.05407, "SWA". Computed in float32, of
        float64 arrays in float64; arrays that are not floating are those of the newest. For LoRA this
        averages the A's and the B's apart, and the mean of the
        products is not the product of the means: it is the exact mean of the models only where one of the two
        stays the same. That is `lora_jax.arithmetic.weighted(deltas, [1 / len(deltas)] * len(deltas))`, by
        concatenation: its rank is the sum of the ranks.

        A damaged checkpoint is put aside with a warning, and the mean is that of the others.

        Raises:
          ValueError: there are fewer than `last`; as `restore`.
        """
        if last < 1:
            raise ValueError(f"`last` is {last}: average one checkpoint or more.")
        damaged: list[tuple[int, str]] = []
        newest, total, used = None, None, []
        steps = sorted(self.steps(temporary=False), reverse=True)
        for found, _, arrays in self._intact(steps, {"delta": delta}, damaged):
            part = arrays["delta"]
            newest, total = (
                (part, _average.begin(part)) if newest is None else (newest, _average.add(total, part))
            )
            used.append(found)
            if len(used) == last:
                break
        if used:
            self._put_aside(damaged, used[0])
        if not used or len(used) < last and not damaged:
            raise ValueError(
                f"`last` is {last}, and `{self._directory}` holds {len(used)} intact checkpoints: average "
                f"as many, or train with `Checkpoints(..., keep={last})` or more, which is {self._keep} here."
            )
        return _average.mean(total, len(used), newest)

    def put_aside(self) -> None:
        """Renames every complete checkpoint to `7.damaged` and the like, so that a run can begin again in
        the directory.
        """
        for step in self.steps():
            on_first(functools.partial(self._rename, step))

    # --- which there are ------------------------------------------------------------------------------------

    def _on_disk(self) -> list[int]:
        # A checkpoint has its number as its name only when it is complete: renaming is done last.
        return (
            sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdecimal())
            if self._directory.is_dir()
            else []
        )

    def _said(self, step: int, name: str) -> Any:
        """A fact that a checkpoint holds of itself; None where it cannot be read."""
        if step not in self._known:
            try:
                self._known[step] = _contents.facts_of(self._directory / str(step))
            except (Damaged, ValueError):
                self._known[step] = {}
        return self._known[step].get(name)

    def _by_loss(self, steps: list[int]) -> list[int]:
        known = [step for step in sorted(steps) if self._said(step, "loss") is not None]
        return sorted(known, key=lambda step: self._said(step, "loss"))

    def _best(self, steps: list[int]) -> int | None:
        return next(iter(self._by_loss(steps)), None)

    def _forget(self) -> None:
        steps = self._on_disk()
        lasting = [step for step in steps if not self._said(step, "passing")]
        kept = {*lasting[-self._keep :], *steps[-1:], *([self._best(steps)] if self._keep_best else [])}
        for step in steps:
            if step not in kept:
                _storage.remove(self._directory / str(step))

    def _clear(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        _storage.clear_unfinished(self._directory)

    def _not_written(self, step: int | None, error: Exception) -> OSError:
        intact = self._on_disk()
        rest = (
            f"the earlier ones are intact, and the same command goes on from step {intact[-1]}"
            if intact
            else "there is no earlier one, and the same command begins again"
        )
        return OSError(
            f"the checkpoint of step {step} could not be written to `{self._directory}`: "
            f"{_storage.cause(error)}. Free space, or mend that; {rest}."
        )

    # --- what one of them holds -----------------------------------------------------------------------------

    def _intact(
        self, steps: list[int], wanted: dict[str, Any], damaged: list[tuple[int, str]]
    ) -> Iterator[tuple[int, dict, dict]]:
        """`(step, facts, arrays)` of the intact ones, with the structures of `wanted`. The others are added
        to `damaged`.
        """
        for step in steps:
            try:
                yield step, *_contents.read(self._directory / str(step), wanted, self._identity)
            except Damaged as error:
                damaged.append((step, str(error)))

    def _put_aside(self, damaged: list[tuple[int, str]], intact: int) -> None:
        for number, reason in damaged:
            warnings.warn(
                f"the checkpoint of step {number} in `{self._directory}` is damaged: {reason}; going on "
                f"from step {intact}",
                stacklevel=3,
            )
            on_first(functools.partial(self._rename, number))

    def _rename(self, number: int) -> None:
        names = (
            self._directory / f"{number}.damaged{mark}"
            for mark in ("", *(f".{count}" for count in range(1, 1000)))
        )
        (self._directory / str(number)).rename(next(name for name in names if not name.exists()))
        self._known.pop(number, None)
