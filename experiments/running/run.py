"""One config from nothing to a finished work directory; started again, it goes on where it stopped."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from experiments import catalogue, config as configs
from experiments.config import Config
from experiments.progress import Record
from experiments.reports import provenance
from experiments.running import finish, inputs, processes, workdir as workdirs
from experiments.running.inputs import Inputs, Ready
from experiments.running.preemption import StopRequest
from experiments.training.patience import stopped_early
from lora_jax.checkpoint import Checkpoints, NoneIntact, State
from lora_jax.processes import on_first


def run(
    config: Config, config_path: Path, data: Path, workdir: Path, *, bases: Path = Path(catalogue.DEFAULT)
) -> Path:
    """Trains, exports and reports as `config` says, or goes on with it, in `workdir`. On SIGTERM while it
    trains it saves, and returns. `bases`: where a `base.name` is looked for.

    Several processes that found each other call it alike, and run as one. The mesh may change between two
    starts: numbers then agree as far as float32 rounds, and not bit for bit.

    Raises:
      ValueError: the directory holds another config's run; the base, the config or the data of the run has
        changed. The directory is left as it was.
    """
    resolved = configs.to_json(config)
    if on_first(lambda: workdirs.is_finished(workdir, resolved)):
        processes.say(f"{config.name}: already finished, see {workdir / 'report.md'}")
        return workdir
    on_first(lambda: workdirs.check_writable(workdir))
    ready = prepared(config, config_path, data, bases, workdir)
    if ready is None:  # the base's own run was stopped, and has said so
        return workdir
    state = _trained(ready, config, workdir, resolved)
    early = on_first(lambda: stopped_early(workdir, state.step, config.train))
    if state.step < config.train.steps and not early:
        processes.say(
            f"{config.name}: stopped after step {state.step}, as asked, and saved: the same command goes on "
            "from there"
        )
        return workdir
    with _checkpoints(ready, config, workdir) as checkpoints:
        finish.finish(ready, state, checkpoints, config, workdir)
    processes.say(f"{config.name}: finished, see {workdir / 'report.md'}")
    return workdir


def prepared(config: Config, config_path: Path, data: Path, bases: Path, workdir: Path) -> Ready | None:
    """What the run needs before its first step; None where the base's own run is not finished."""
    found = inputs.read(config, config_path, data, bases, workdir)
    base_run = _run_base(config, config_path, found, workdir)
    if base_run is not None and not on_first((base_run / "report.md").is_file):
        return None
    return inputs.load(config, config_path, found, base_run, workdir)


def _run_base(config: Config, config_path: Path, found: Inputs, workdir: Path) -> Path | None:
    """The finished work directory of the config that `base.run` names, after running it if need be."""
    if config.base.run is None:
        return None
    path = config_path.parent / config.base.run
    described = configs.load(path)
    if described.baseline is not None:
        raise ValueError(
            f"`base.run` is {config.base.run}, whose result has a baseline and is no base for another: leave "
            "`baseline` out there."
        )
    if jax.process_count() > 1:
        # Its own need not have all devices of all processes.
        described = dataclasses.replace(described, mesh=config.mesh)
    base_workdir = (workdir / config.base.workdir).resolve()
    return run(described, path, found.data, base_workdir, bases=found.bases)


def _trained(ready: Ready, config: Config, workdir: Path, resolved: dict[str, Any]) -> State:
    """The state after the last step, or after that at which the run was stopped."""
    state = ready.first
    with _checkpoints(ready, config, workdir) as checkpoints:
        if checkpoints.latest() is not None:
            state = restored(checkpoints, state, config)
        on_first(lambda: workdirs.mark(workdir, resolved))
        on_first(lambda: provenance.begin(workdir, state.step))
        with (
            Record(
                workdir, config.name, config.train.steps, state.step, silent=not processes.first()
            ) as record,
            StopRequest() as stop_requested,
        ):
            return ready.trainer.fit(state, ready.splits, checkpoints, record, stop_requested)


def restored(checkpoints: Checkpoints, first: State, config: Config) -> State:
    """The newest state that is intact, or `first` where none is."""
    try:
        state = checkpoints.restore(first.delta, first.opt_state)
    except NoneIntact as error:
        processes.say(
            f"{config.name}: {error} They are put aside, and the run begins again, with the same result"
        )
        checkpoints.put_aside()
        return first
    processes.say(f"{config.name}: resuming after step {state.step}")
    return state


def _checkpoints(ready: Ready, config: Config, workdir: Path) -> Checkpoints:
    return Checkpoints(
        workdir / "checkpoints",
        identity=ready.identity,
        keep=config.train.keep_checkpoints,
        keep_best=config.train.result == "best",
    )
