"""The inputs of a run. Faults of the input are found here, the cheap ones first.

`read` needs no weights: where the base is another config's result, it runs before that base is trained.
`load` needs the weights.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

import lora_jax
from experiments import catalogue, config as configs, tasks
from experiments.config import Config
from experiments.decoding.decoder import Decoder
from experiments.running import base, baselines, processes, starts
from experiments.running.base import Loaded, Places
from experiments.tasks import generate, tokenizer
from experiments.tasks.splits import Splits
from experiments.tasks.task import Predictor
from experiments.training import precision
from experiments.training.sharded import dropping, make_mesh, on_mesh
from experiments.training.trainer import Trainer
from lora_jax.baselines import attach
from lora_jax.checkpoint import fingerprint, State
from lora_jax.processes import on_first


class Inputs(NamedTuple):
    """The mesh, where the data and the bases lie, and the contents of the data's files."""

    mesh: Mesh
    data: Path
    bases: Path
    contents: Any


class Ready(NamedTuple):
    """What a run needs before its first step. `base`: on the mesh. `specs`: its layout. `first`: the state
    before the first step.
    """

    base: Loaded
    specs: Any
    splits: Splits
    decoder: Predictor
    trainer: Trainer
    first: State
    identity: dict[str, str]


def read(config: Config, config_path: Path, data: Path, bases: Path, workdir: Path) -> Inputs:
    """The inputs that need no weights of the base.

    Raises:
      ValueError: the mesh, the sequences' length, a target, the base's files, the work directory or the data
        is wrong.
    """
    mesh = make_mesh(config.mesh)
    starts.check(config)
    if config.base.adapter is not None:
        starts.find(config.base.adapter, data, config_path.parent)
    _check_against_shapes(config, config_path)
    if config.base.name is not None:
        catalogue.verified(config.base.name, bases)
    processes.check_shared(workdir)
    if config.generate is not None:
        section, data = config.generate, workdir / "data"
        on_first(lambda: str(generate.write(section, data)))
    try:
        return Inputs(mesh, data, bases, tasks.read(config.data, data))
    except FileNotFoundError as error:
        fix = (
            "`generate` makes train.txt, valid.txt and test.txt: name these in `data`, or leave it out."
            if config.generate is not None
            else base.where_paths_start(data)
        )
        raise FileNotFoundError(f"{error} {fix}") from error


def load(config: Config, config_path: Path, inputs: Inputs, base_run: Path | None, workdir: Path) -> Ready:
    """The base on the mesh, the examples as tokens, and the state before the first step.

    `base_run`: the finished work directory of the config that `base.run` names.
    """
    mesh, data, contents = inputs.mesh, inputs.data, inputs.contents
    drawn = keys(config.seed)
    own_tokenizer, size = workdir / "tokenizer", config.base.vocabulary
    if size is not None:
        on_first(lambda: str(tokenizer.train(contents["train"], size, own_tokenizer)))
    places = Places(data, config_path.parent, inputs.bases, base_run, own_tokenizer)
    task = tasks.of(config.data)
    labels = None if task.labels is None else task.labels(config.data, contents)
    loaded = base.load(config.base, places, drawn["base"], mesh, config.precision, labels, task.head)
    _check_room(config, loaded.model.config.positions)
    splits = tasks.prepare(config.data, contents, loaded.tokenizer)
    predictor = task.predictor or Decoder.create
    identity = identity_of(config, fingerprint(loaded.params), splits)
    loaded = baselines.attached(config, loaded, drawn["adapter"])
    splits = baselines.with_special_tokens(config, loaded.model, splits)
    decoder = predictor(config, loaded.model, loaded.tokenizer, splits.prompts)
    decoder = baselines.prompted(config, decoder)
    params, specs = on_mesh(mesh, loaded.params, loaded.model.partition_rules)
    loaded = dataclasses.replace(loaded, params=params)
    frozen, delta = adapted(config, loaded, splits)
    if config.base.adapter is not None:
        delta = starts.started(starts.find(config.base.adapter, data, config_path.parent), loaded, delta)
    apply = dropping(loaded.model, config.train).apply
    trainer = Trainer.create(config, mesh, apply, frozen, delta, specs)
    return Ready(
        loaded, specs, splits, decoder, trainer, trainer.start(delta, specs, drawn["dropout"]), identity
    )


def keys(seed: int) -> dict[str, jax.Array]:
    """The random keys of a run: of a base that is drawn, of the start of its adapters, and of its steps."""
    parts = jax.random.split(jax.random.key(seed), 3)
    return dict(zip(("base", "adapter", "dropout"), parts, strict=True))


def adapted(config: Config, loaded: Loaded, splits: Splits) -> tuple[Any, Any]:
    """What stays of the base and what trains, before the first step."""
    frozen, delta = lora_jax.lorafy(
        loaded.params,
        baselines.targets(config, precision.method(config), loaded.head),
        key=keys(config.seed)["adapter"],
        **_axes(config, loaded.model),
    )
    head_bias = tasks.of(config.data).head_bias
    if head_bias is not None:
        delta = starts.with_bias(head_bias(splits.train), loaded, delta)
    return frozen, delta


def identity_of(config: Config, base: str, splits: Splits) -> dict[str, str]:
    """What must be the same where a run goes on. `base`: the fingerprint of its weights."""
    return {"base": base, "config": _digest(config), "data": _data_fingerprint(splits)}


def _check_against_shapes(config: Config, config_path: Path) -> None:
    """Checks against the shapes of a base that is still to be trained: whether sequences have room, and
    whether `targets` name leaves.
    """
    described = config
    while described.base.run is not None:
        config_path = config_path.parent / described.base.run
        described = configs.load(config_path)
    if described.base.architecture is None:
        return
    _check_room(config, described.base.architecture.n_positions)
    model = base.model(described.base.architecture, vocabulary=257, end=0, scan=config.base.scan)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 1), np.int32))["params"])
    how = _axes(config, model)
    if config.baseline is not None:
        model, shapes = attach(model, shapes, configs.baseline_value(config.baseline))
        how = _axes(config, model)
    lora_jax.lorafy(shapes, baselines.targets(config, configs.method_value(config.method)), **how)


def _axes(config: Config, model: Any) -> dict[str, Any]:
    """What `lorafy` reads the axes of stacked layers off; those of single layers go without saying."""
    if not config.base.scan:
        return {}
    return {"fn": lambda params, ids: model.apply({"params": params}, ids), "args": (np.zeros((1, 1), int),)}


def _check_room(config: Config, positions: int | None) -> None:
    if positions is not None and config.data.seq_len > positions:
        raise ValueError(
            f"`data.seq_len` ({config.data.seq_len}) is longer than the model, which has {positions} "
            "positions."
        )


def _digest(config: Config) -> str:
    said = configs.without_mesh(configs.without_defaults(config))
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32]


def _data_fingerprint(splits: Splits) -> str:
    return hashlib.sha256((splits.train.fingerprint() + splits.valid.fingerprint()).encode()).hexdigest()[:32]
