"""One config from nothing to a finished work directory; started again, it goes on where it stopped.

What can be wrong with the input is found before the run begins: before a base is trained, where its config
says enough. `config.json` marks a directory as a run's own, `report.md`, written last, marks it as finished.
"""

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import lora_jax
from experiments import config as configs, tasks
from experiments.config import Config
from experiments.decoding.decoder import Decoder
from experiments.reports import cost, report
from experiments.running import base as bases, finish, processes
from experiments.running.progress import Record
from experiments.tasks import generate, tokenizer
from experiments.tasks.examples import Splits
from experiments.training import precision
from experiments.training.sharded import make_mesh, on_mesh
from experiments.training.trainer import Trainer
from lora_jax.checkpoint import Checkpoints, fingerprint, NoneIntact, State
from lora_jax.processes import on_first


# What may lie in a work directory before its run begins: the base's own run, generated data, a tokenizer
# trained for it, and what a crash left of the last two.
BEFOREHAND = {"base", "data", "tokenizer", "tokenizer.tmp", "config.json.tmp"}


def run(
    config: Config, config_path: Path, data: Path, workdir: Path, *, stop_after: int | None = None
) -> Path:
    """Trains, exports and reports as `config` says, or goes on with it, in `workdir`. SIGTERM while it
    trains: saves, and returns.

    Several processes that found each other call it alike, and run as one. `stop_after` ends training after
    that many steps, for tests of resuming. Raises `ValueError` for a directory that holds another config's
    run, or for a run whose base, config or data has changed; it is left as it was. The mesh may change:
    numbers then agree as far as float32 rounds, and not bit for bit.
    """
    resolved = configs.to_json(config)
    if on_first(lambda: is_finished(workdir, resolved)):
        processes.say(f"{config.name}: already finished, see {workdir / 'report.md'}")
        return workdir
    ready = _prepare(config, config_path, data, workdir)
    if ready is None:
        return workdir
    state = _train(ready, config, workdir, resolved, stop_after)
    if state.step == config.train.steps:
        _finish(ready, state, config, workdir)
        processes.say(f"{config.name}: finished, see {workdir / 'report.md'}")
    elif stop_after is None:
        processes.say(
            f"{config.name}: stopped after step {state.step}, as asked, and saved: the same command goes on "
            "from there"
        )
    return workdir


class _Ready(NamedTuple):
    """What a run needs before its first step. `first`: the state there; `base`: as it is on the mesh,
    `specs` its layout.
    """

    base: bases.Loaded
    specs: Any
    splits: Splits
    decoder: Decoder
    trainer: Trainer
    first: State
    identity: dict[str, str]


def _prepare(config: Config, config_path: Path, data: Path, workdir: Path) -> _Ready | None:
    """Finds what is wrong with the input, the cheap things first; None if the base is not finished,
    having been asked to stop.
    """
    mesh = make_mesh(config.mesh)
    _check_against_shapes(config, config_path)
    processes.check_shared(workdir)
    if config.generate is not None:
        data = workdir / "data"
        on_first(lambda: str(generate.write(config.generate, data)))
    contents = tasks.read(config.data, data)
    base_run = _run_base(config, config_path, data, workdir)
    if base_run is not None and not on_first((base_run / "report.md").is_file):
        return None
    keys = dict(
        zip(("base", "adapter", "dropout"), jax.random.split(jax.random.key(config.seed), 3), strict=True)
    )
    own_tokenizer = None
    if config.base.vocabulary is not None:
        own_tokenizer = workdir / "tokenizer"
        on_first(lambda: str(tokenizer.train(contents["train"], config.base.vocabulary, own_tokenizer)))
    base = bases.load(
        config.base, data, config_path.parent, base_run, own_tokenizer, keys["base"], mesh, config.precision
    )
    _check_room(config, base.model.config.n_positions)
    splits = tasks.prepare(config.data, contents, base.tokenizer)
    decoder = Decoder.create(config, base.model, base.tokenizer, splits.prompts)

    identity = {
        "base": fingerprint(base.params),
        "config": _digest(config),
        "data": _data_fingerprint(splits),
    }
    params, specs = on_mesh(mesh, base.params, base.model.partition_rules)
    base = dataclasses.replace(base, params=params)
    frozen, delta = lora_jax.lorafy(
        params, list(config.targets), method=precision.method(config), key=keys["adapter"]
    )
    trainer = Trainer.create(config, mesh, base.model.apply, frozen, delta, specs)
    return _Ready(
        base, specs, splits, decoder, trainer, trainer.start(delta, specs, keys["dropout"]), identity
    )


def _train(
    ready: _Ready, config: Config, workdir: Path, resolved: dict[str, Any], stop_after: int | None
) -> State:
    """The state after the last step, or after that at which the run was stopped."""
    state = ready.first
    with _checkpoints(ready, config, workdir) as checkpoints:
        if checkpoints.latest() is not None:
            state = _restored(checkpoints, state, config)
        on_first(lambda: _mark(workdir, resolved))
        with Record(
            workdir, config.name, config.train.steps, state.step, silent=not processes.first()
        ) as record:
            return ready.trainer.fit(state, ready.splits, checkpoints, record, stop_after)


def _restored(checkpoints: Checkpoints, first: State, config: Config) -> State:
    try:
        state = checkpoints.restore(first.delta, first.opt_state)
    except NoneIntact as error:
        processes.say(
            f"{config.name}: {error}. They are put aside, and it begins again, which comes to the same"
        )
        checkpoints.put_aside()
        return first
    processes.say(f"{config.name}: resuming after step {state.step}")
    return state


def _checkpoints(ready: _Ready, config: Config, workdir: Path) -> Checkpoints:
    return Checkpoints(
        workdir / "checkpoints",
        identity=ready.identity,
        keep=config.train.keep_checkpoints,
        keep_best=config.train.result == "best",
    )


def _mark(workdir: Path, resolved: dict[str, Any]) -> None:
    """Makes `workdir` the run's own. With another mesh than before, the newer one stands there."""
    workdir.mkdir(parents=True, exist_ok=True)
    text, file = json.dumps(resolved, indent=2) + "\n", workdir / "config.json"
    if not file.is_file() or file.read_text("utf-8") != text:
        fresh = workdir / "config.json.tmp"
        fresh.write_text(text, "utf-8")
        fresh.replace(file)


def _finish(ready: _Ready, state: State, config: Config, workdir: Path) -> None:
    """From the trained state to the report."""
    started, trainer, splits = time.perf_counter(), ready.trainer, ready.splits
    with _checkpoints(ready, config, workdir) as checkpoints:
        chosen, delta = finish.chosen(checkpoints, state, config.train)
    merged = finish.export(trainer, delta, ready.base, workdir / "merged")
    facts: dict[str, Any] = {
        "base": {
            "origin": ready.base.origin,
            "fingerprint": ready.identity["base"],
            "parameters": _size(ready.base.params),
        },
        "data": ready.identity["data"],
        "trainable": lora_jax.count(delta),
        "summary": str(lora_jax.summary(ready.base.params, delta)),
        "result": chosen,
        "adapter": finish.write_adapter(trainer, delta, ready.base, workdir),
        "comparison": finish.compare(trainer, delta, workdir / "merged", splits),
        "bytes": {"base": _bytes(ready.base.params), "delta": _bytes(delta)},
        **finish.predict(ready.decoder, ready.base.params, merged, workdir),
        "examples": {"train": len(splits.train), "valid": len(splits.valid), "test": len(splits.prompts)},
        "cost": cost.beside_full(trainer, state, ready.base.params, ready.specs, splits.train)
        if config.compare_full
        else {},
        "finishing_seconds": time.perf_counter() - started,
    }
    on_first(lambda: report.write(workdir, config, facts))


def is_finished(workdir: Path, resolved: dict[str, Any]) -> bool:
    """Whether `workdir` holds the finished run of this config. Raises `ValueError` if it holds anything
    of another.
    """
    kept = workdir / "config.json"
    if kept.is_file():
        try:
            old = json.loads(kept.read_text("utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"`{kept}` is not valid JSON: {error}") from error
        # Where the arrays lie changes no result beyond rounding.
        found = configs.difference(_but_mesh(configs.with_defaults(old)), _but_mesh(resolved))
        if found:
            raise ValueError(
                f"`{workdir}` holds a run of another config: {found}; use another --workdir, or the config "
                "it was started with"
            )
        return (workdir / "report.md").is_file()
    if workdir.exists() and (
        not workdir.is_dir()
        or {entry.name for entry in workdir.iterdir() if not entry.name.startswith(processes.MARK)}
        - BEFOREHAND
    ):
        raise ValueError(f"`{workdir}` is not empty and holds no run: use another --workdir")
    return False


def _check_against_shapes(config: Config, config_path: Path) -> None:
    """What a base that is still to be trained already says: whether sequences have room, and whether
    `targets` name leaves of it.
    """
    described = config
    while described.base.run is not None:
        config_path = config_path.parent / described.base.run
        described = configs.load(config_path)
    if described.base.architecture is None:
        return
    _check_room(config, described.base.architecture.n_positions)
    model = bases.model(described.base.architecture, vocabulary=257, end=0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 1), np.int32))["params"])
    lora_jax.lorafy(shapes, list(config.targets), method=configs.method_value(config.method))


def _check_room(config: Config, positions: int) -> None:
    if config.data.seq_len > positions:
        raise ValueError(
            f"`data.seq_len` ({config.data.seq_len}) is longer than the model, which has {positions} "
            "positions"
        )


def _run_base(config: Config, config_path: Path, data: Path, workdir: Path) -> Path | None:
    """The finished work directory of the config that `base.run` names, after running it if need be."""
    if config.base.run is None:
        return None
    path = config_path.parent / config.base.run
    described = configs.load(path)
    if jax.process_count() > 1:
        described = dataclasses.replace(
            described, mesh=config.mesh
        )  # its own need not have all devices of all processes
    return run(described, path, data, (workdir / config.base.workdir).resolve())


def _but_mesh(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tree.items() if name != "mesh"}


def _digest(config: Config) -> str:
    return hashlib.sha256(
        json.dumps(_but_mesh(configs.but_defaults(config)), sort_keys=True).encode()
    ).hexdigest()[:32]


def _data_fingerprint(splits: Splits) -> str:
    return hashlib.sha256((splits.train.fingerprint() + splits.valid.fingerprint()).encode()).hexdigest()[:32]


def _size(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
