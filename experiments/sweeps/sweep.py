"""One sweep from nothing to a finished work directory; started again, it goes on where it stopped.

`sweep.md`, written last, marks it as finished. A checkpoint holds all adapters, those that were dropped as
well, with the step at which each was.
"""

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import catalogue, config as configs, tasks
from experiments.config import Config
from experiments.progress import read_metrics, Record
from experiments.reports import provenance
from experiments.running import baselines, workdir as workdirs
from experiments.running.inputs import Ready
from experiments.running.preemption import StopRequest
from experiments.running.run import prepared, restored
from experiments.sweeps import compared, halving, results
from experiments.sweeps.guards import lost_at
from experiments.sweeps.members import members
from experiments.sweeps.over import combinations, configs_of, Over, PADDED
from experiments.sweeps.together import Together
from experiments.tasks.examples import Splits
from experiments.training import loop
from lora_jax.checkpoint import Checkpoints, State


PAGE = "sweep.md"
# Of an adapter that still trains.
NEVER = -1


@dataclasses.dataclass(frozen=True)
class Asked:
    """The arguments of the command line. `fractions`: of the steps, after which the worse half is dropped.
    `places`: the options that say where inputs are, as they were given.
    """

    path: Path
    overrides: tuple[str, ...]
    over: Over
    fractions: tuple[float, ...] = ()
    places: tuple[str, ...] = ()


def sweep(asked: Asked, data: Path, workdir: Path, *, bases: Path = Path(catalogue.DEFAULT)) -> Path:
    """Trains an adapter for each combination of values, or goes on with it, in `workdir`. On SIGTERM while it
    trains it saves, and returns.

    Raises:
      ValueError: the values cannot be swept; the directory holds another run or sweep; the base, the config
        or the data has changed. The directory is left as it was.
    """
    found = configs_of(asked.path, asked.overrides, asked.over)
    config = next(iter(found.values()))
    points = halving.points(asked.fractions, config.train.steps)
    swept = {"over": asked.over, "halving": list(asked.fractions)}
    plain = configs.load(asked.path, asked.overrides)
    resolved = {**configs.to_json(plain), "sweep": json.loads(json.dumps(swept))}
    if workdirs.is_finished(workdir, resolved, PAGE):
        print(f"{config.name}: already finished, see {workdir / PAGE}", flush=True)
        return workdir
    workdirs.check_writable(workdir)
    ready = prepared(config, asked.path, data, bases, workdir)
    if ready is None:  # the base's own run was stopped, and has said so
        return workdir
    together = _together(ready, found, asked, data if config.generate is None else workdir / "data")
    print(f"{config.name}: {len(found)} adapters in one program: {'; '.join(together.names)}", flush=True)
    state = _Training(together, points, workdir, resolved).trained()
    if state.step < config.train.steps:
        print(
            f"{config.name}: stopped after step {state.step}, as asked, and saved: the same command goes on "
            "from there",
            flush=True,
        )
        return workdir
    results.write(together, ready, state, asked, points, workdir)
    print(f"{config.name}: finished, see {workdir / PAGE}", flush=True)
    return workdir


def _together(ready: Ready, found: dict[str, Config], asked: Asked, data: Path) -> Together:
    """The members on the base that is loaded. Each distinct `data` is read once."""
    first, task = next(iter(found.values())), tasks.of(ready.trainer.config.data)
    known: list[tuple[Any, Splits]] = [(first.data, ready.splits)]

    def splits_of(config: Config) -> Splits:
        there = [splits for section, splits in known if section == config.data]
        if not there:
            contents = tasks.read(config.data, data)
            if task.labels is not None:
                _check_labels(task.labels(config.data, contents), ready.base.model.config.labels)
            splits = tasks.prepare(config.data, contents, ready.base.tokenizer)
            there = [baselines.with_special_tokens(config, ready.base.model, splits)]
            known.append((config.data, there[0]))
        return there[0]

    made = members(found, combinations(asked.over), ready.base, splits_of, ready.identity["base"])
    return Together(ready.trainer, made, any(key in asked.over for key in PADDED))


def _check_labels(own: tuple[str, ...], first: tuple[str, ...]) -> None:
    if own != first:
        raise ValueError(
            f"`--over data` has the labels {', '.join(own)} beside {', '.join(first)}, and the head that all "
            "adapters of a sweep share has one output for each: name both in `data.labels`, or start a sweep "
            "for each."
        )


@dataclasses.dataclass(frozen=True)
class _Training:
    """The steps of a sweep, in parts between the points at which adapters are dropped."""

    together: Together
    points: tuple[int, ...]
    workdir: Path
    resolved: dict[str, Any]

    def trained(self) -> State:
        """The state of all after the last step, or after that at which the sweep was stopped. Its `opt_state`
        is the rule's, and the steps at which adapters were dropped.
        """
        config, everyone = self.together.trainer.config, len(self.together.members)
        state = self.together.start()
        where = self.together.trainer.step.everywhere
        dropped = jax.device_put(jnp.full(everyone, NEVER, jnp.int32), where)
        state = state._replace(opt_state=(state.opt_state, dropped))
        with self._checkpoints() as checkpoints:
            if checkpoints.latest() is not None:
                state = restored(checkpoints, state, config)
            workdirs.mark(self.workdir, self.resolved)
            provenance.begin(self.workdir, state.step)
            with (
                Record(self.workdir, config.name, config.train.steps, state.step) as record,
                StopRequest() as stop_requested,
            ):
                for begin, end in itertools.pairwise((0, *self.points, config.train.steps)):
                    if state.step < end and not stop_requested():
                        state = self._part(state, begin, end, checkpoints, record, stop_requested)
        return state

    def _part(
        self, state: State, begin: int, end: int, checkpoints: Checkpoints, record: Record, stop: Any
    ) -> State:
        """The steps up to `end`, with those that still train."""
        alive = _alive(state)
        if begin and state.step == begin:
            state = self._drop(state, alive, record)
            alive = _alive(state)
        some = _Some(state, alive, checkpoints)
        own = self.together.of(alive).work(some.part, self.workdir / "adapters", record, self._memory)
        return some.whole(loop.fit(own, some.part, some, record, stop, end))

    def _drop(self, state: State, alive: list[int], record: Record) -> State:
        """The state without the worse half of those that train."""
        group = self.together.of(alive)
        adapters = self.workdir / "adapters"
        if not record.evaluated(state.step):
            work = group.work(_Some(state, alive, None).part, adapters, record, self._memory)
            record.log(state.step, **work.evaluate(_Some(state, alive, None).part.delta))
        skip = self.together.trainer.config.train.not_finite == "skip"
        said = next(
            line
            for line in reversed(compared.evaluations(read_metrics(self.workdir / "metrics.jsonl")))
            if line["step"] == state.step
        )
        costs = {
            name: None
            if lost_at(adapters / name, state.step, skip) is not None
            else compared.cost(compared.of_adapter(said, name))
            for name in group.names
        }
        gone = halving.worse_half(costs, {member.name: member.values for member in group.members})
        if gone:
            record.note(state.step, f"dropped {len(gone)} of {len(alive)} adapters: {'; '.join(gone)}")
        places = np.asarray([self.together.names.index(name) for name in gone], np.int32)
        rule, dropped = state.opt_state
        return state._replace(opt_state=(rule, dropped.at[places].set(state.step)))

    def _memory(self, found: Any) -> None:
        """Keeps what the largest program needs: that of all adapters."""
        file = self.workdir / "memory.json"
        before = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        names = (
            "argument_size_in_bytes",
            "temp_size_in_bytes",
            "output_size_in_bytes",
            "alias_size_in_bytes",
        )
        now = {name.removesuffix("_size_in_bytes"): getattr(found, name) for name in names}
        if sum(now.values()) > sum(before.values()):
            file.write_text(json.dumps(now) + "\n", "utf-8")

    def _checkpoints(self) -> Checkpoints:
        every = self.together.members
        parts = {part: [member.identity[part] for member in every] for part in every[0].identity}
        parts["config"].append(json.dumps(self.resolved["sweep"]["halving"]))
        identity = {
            part: hashlib.sha256("\n".join(said).encode()).hexdigest()[:32] for part, said in parts.items()
        }
        keep = self.together.trainer.config.train.keep_checkpoints
        return Checkpoints(self.workdir / "checkpoints", identity=identity, keep=keep)


def _alive(state: State) -> list[int]:
    return np.flatnonzero(np.asarray(state.opt_state[1]) == NEVER).tolist()


class _Some:
    """The part of a state that still trains, and checkpoints that hold the whole.

    `part` gives its buffers away with the first step.
    """

    def __init__(self, state: State, alive: list[int], checkpoints: Checkpoints | None):
        rule, self._dropped = state.opt_state
        self._keys, self._checkpoints, self._alive = state.key, checkpoints, np.asarray(alive)
        self._all = len(alive) == len(self._dropped)
        # What was dropped stays as it is, beside those that train.
        self._before = None if self._all else (state.delta, rule)
        arrays = (state.delta, rule)
        delta, rule = arrays if self._all else jax.tree.map(lambda leaf: leaf[self._alive], arrays)
        self.part = State(delta, rule, state.step, state.position, state.key[self._alive])

    def whole(self, part: State) -> State:
        arrays = (part.delta, part.opt_state)
        if not self._all:
            arrays = jax.tree.map(lambda old, new: old.at[self._alive].set(new), self._before, arrays)
        delta, rule = arrays
        return State(delta, (rule, self._dropped), part.step, part.position, self._keys)

    def save(self, state: State, loss: Any = None, *, temporary: bool = False) -> None:
        """`loss`, which is each adapter's, is in the log."""
        assert self._checkpoints is not None
        self._checkpoints.save(self.whole(state), temporary=temporary)
