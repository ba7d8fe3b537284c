"""One config from nothing to a finished work directory; started again, it goes on where it stopped.

What can be wrong with the input is found before the run begins: before a base is trained, where its config says enough.
`config.json` marks a directory as a run's own, `report.md`, written last, marks it as finished.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lora_jax
from experiments import base as bases
from experiments import config as configs
from experiments import cost, finish, report, tasks, train
from experiments.config import Config
from experiments.decode import Decoder
from experiments.progress import Record
from experiments.tasks import generate, tokenizer
from experiments.tasks.examples import Splits
from lora_jax.checkpoint import Checkpoints, fingerprint

# What may lie in a work directory before its run begins: the base's own run, generated data, a tokenizer trained for it, and what a
# crash left of the last two.
BEFOREHAND = {"base", "data", "tokenizer", "tokenizer.tmp", "config.json.tmp"}


def run(config: Config, config_path: Path, data: Path, workdir: Path, *, stop_after: int | None = None) -> Path:
    """Trains, exports and reports as `config` says, or goes on with it, in `workdir`. SIGTERM while it trains: saves, and returns.

    `stop_after` ends training after that many steps, for tests of resuming. Raises `ValueError` for a directory that holds another
    config's run, or for a run whose base, config or data has changed; it is left as it was.
    """
    resolved = configs.to_json(config)
    if is_finished(workdir, resolved):
        print(f"{config.name}: already finished, see {workdir / 'report.md'}")
        return workdir
    if jax.process_count() > 1:
        raise ValueError(f"this run has {jax.process_count()} processes, which would all write the same files: several hosts are not supported yet")
    mesh = train.make_mesh(config.mesh)
    _check_against_shapes(config, config_path)
    if config.generate is not None:
        data = generate.write(config.generate, workdir / "data")
    contents = tasks.read(config.data, data)
    base_run = _run_base(config, config_path, data, workdir)
    if base_run is not None and not (base_run / "report.md").is_file():  # it was asked to stop
        return workdir
    keys = dict(zip(("base", "adapter", "dropout"), jax.random.split(jax.random.key(config.seed), 3), strict=True))
    trained = None if config.base.vocabulary is None else tokenizer.train(contents["train"], config.base.vocabulary, workdir / "tokenizer")
    base = bases.load(config.base, data, config_path.parent, base_run, trained, keys["base"], mesh)
    _check_room(config, base.model.config.n_positions)
    splits = tasks.prepare(config.data, contents, base.tokenizer)
    decoder = Decoder.create(config, base.model, base.tokenizer, splits.prompts)

    identity = {"base": fingerprint(base.params), "config": _digest(resolved), "data": _data_fingerprint(splits)}
    params, specs = train.place(mesh, base.params, base.model.partition_rules)
    base = dataclasses.replace(base, params=params)
    method = configs.method_value(config.method)
    frozen, delta = lora_jax.lorafy(params, list(config.targets), method=method, key=keys["adapter"])
    trainer = train.Trainer.create(config, mesh, base.model.apply, frozen, delta, specs)
    state = trainer.start(delta, specs, keys["dropout"])

    with Checkpoints(workdir / "checkpoints", identity=identity, keep=config.train.keep_checkpoints) as checkpoints:
        if checkpoints.latest() is not None:
            state = checkpoints.restore(state.delta, state.opt_state)
            print(f"{config.name}: resuming after step {state.step}")
        workdir.mkdir(parents=True, exist_ok=True)
        if not (workdir / "config.json").is_file():
            fresh = workdir / "config.json.tmp"
            fresh.write_text(json.dumps(resolved, indent=2) + "\n", "utf-8")
            fresh.replace(workdir / "config.json")
        with Record(workdir, config.name, config.train.steps, state.step) as record:
            state = trainer.fit(state, splits, checkpoints, record, stop_after)
    if state.step < config.train.steps:
        if stop_after is None:
            print(f"{config.name}: stopped after step {state.step}, as asked, and saved: the same command goes on from there", flush=True)
        return workdir

    started = time.perf_counter()
    merged = finish.export(trainer, state.delta, base, workdir / "merged")
    facts: dict[str, Any] = {
        "base": {"origin": base.origin, "fingerprint": identity["base"], "parameters": _size(base.params)},
        "data": identity["data"],
        "trainable": lora_jax.count(state.delta),
        "summary": _summary(params, state.delta),
        "adapter": finish.write_adapter(trainer, state.delta, base, workdir),
        "comparison": finish.compare(trainer, state.delta, workdir / "merged", splits),
        "bytes": {"base": _bytes(params), "delta": _bytes(state.delta)},
        **finish.predict(decoder, params, merged, workdir),
        "examples": {"train": len(splits.train), "valid": len(splits.valid), "test": len(splits.prompts)},
        "cost": cost.beside_full(trainer, state, params, specs, splits.train.batch(np.arange(config.train.batch))) if config.compare_full else {},
        "finishing_seconds": time.perf_counter() - started,
    }
    report.write(workdir, config, facts)
    print(f"{config.name}: finished, see {workdir / 'report.md'}")
    return workdir


def is_finished(workdir: Path, resolved: dict[str, Any]) -> bool:
    """Whether `workdir` holds the finished run of this config. Raises `ValueError` if it holds anything of another."""
    kept = workdir / "config.json"
    if kept.is_file():
        try:
            old = json.loads(kept.read_text("utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"`{kept}` is not valid JSON: {error}") from error
        found = configs.difference(configs.with_defaults(old), resolved)
        if found:
            raise ValueError(f"`{workdir}` holds a run of another config: {found}; use another --workdir, or the config it was started with")
        return (workdir / "report.md").is_file()
    if workdir.exists() and (not workdir.is_dir() or {entry.name for entry in workdir.iterdir()} - BEFOREHAND):
        raise ValueError(f"`{workdir}` is not empty and holds no run: use another --workdir")
    return False


def _check_against_shapes(config: Config, config_path: Path) -> None:
    """What a base that is still to be trained already says: whether sequences have room, and whether `targets` name leaves of it."""
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
        raise ValueError(f"`data.seq_len` ({config.data.seq_len}) is longer than the model, which has {positions} positions")


def _run_base(config: Config, config_path: Path, data: Path, workdir: Path) -> Path | None:
    """The finished work directory of the config that `base.run` names, after running it if need be."""
    if config.base.run is None:
        return None
    path = config_path.parent / config.base.run
    return run(configs.load(path), path, data, (workdir / config.base.workdir).resolve())


def _summary(params: Any, delta: Any) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        lora_jax.summary(params, delta)
    return printed.getvalue()


def _digest(resolved: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()[:32]


def _data_fingerprint(splits: Splits) -> str:
    return hashlib.sha256((splits.train.fingerprint() + splits.valid.fingerprint()).encode()).hexdigest()[:32]


def _size(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
