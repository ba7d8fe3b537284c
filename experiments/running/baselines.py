"""A run with a baseline: its arrays beside the base's, its special tokens in the texts, and the file of what
was trained.

Hugging Face and PEFT have no form for the result, so that the work directory holds `trained.safetensors` in
place of `merged/` and `adapter/`: every array that trained, by its path in `delta`.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import safetensors.numpy

import lora_jax
from experiments.config import baseline_value, Config
from experiments.decoding.decoder import Decoder
from experiments.running.base import Loaded
from experiments.tasks.examples import Splits
from lora_jax.baselines import attach, Extended
from lora_jax.processes import on_first, on_host


FILE = "trained.safetensors"


def attached(config: Config, loaded: Loaded, key: jax.Array) -> Loaded:
    """The base with the config's baseline; as it is where there is none."""
    if config.baseline is None:
        return loaded
    model, params = attach(loaded.model, loaded.params, baseline_value(config.baseline), key=key)
    return dataclasses.replace(loaded, model=model, params=params)


def bare(loaded: Loaded) -> Loaded:
    """The base without the baseline that `attached` gave it."""
    if not isinstance(loaded.model, Extended):
        return loaded
    frozen = lora_jax.lorafy(loaded.params, loaded.model.baseline.targets).frozen
    return dataclasses.replace(loaded, model=loaded.model.base, params=_without_none(frozen))


def _without_none(tree: Any) -> Any:
    """`tree` without its Nones, and without the dicts that held nothing else."""
    if not isinstance(tree, dict):
        return tree
    kept = {name: node for name, part in tree.items() if (node := _without_none(part)) is not None}
    return kept or None


def targets(config: Config, method: Any, head: str | None = None) -> dict[str, Any]:
    """What trains: a new `head` and the baseline's arrays, and `config.targets` by the method."""
    own = {} if head is None else {head: lora_jax.Full()}
    own |= {} if config.baseline is None else baseline_value(config.baseline).targets
    return {**own, **{pattern: method for pattern in config.targets if pattern not in own}}


def whole(loaded: Loaded) -> list[str]:
    """What full fine-tuning trains, as `lorafy` takes it: each leaf of the base, and none of the baseline."""
    return [re.escape(path) for path in named(bare(loaded).params)]


def with_special_tokens(config: Config, model: Any, splits: Splits) -> Splits:
    """The examples with a prefix's special tokens around each context. Prompts follow (`prompted`), after
    they are cut.
    """
    insert = _insert(config, model)
    if insert is None:
        return splits
    train, valid = (each.with_contexts(insert) for each in (splits.train, splits.valid))
    return dataclasses.replace(splits, train=train, valid=valid)


def prompted(config: Config, decoder: Any) -> Any:
    """The decoder with the special tokens around each prompt."""
    if not isinstance(decoder, Decoder) or (insert := _insert(config, decoder.model)) is None:
        return decoder
    prompts = (dataclasses.replace(each, ids=tuple(insert(each.ids))) for each in decoder.prompts)
    return dataclasses.replace(decoder, prompts=tuple(prompts))


def _insert(config: Config, model: Any) -> Any:
    value = None if config.baseline is None else baseline_value(config.baseline)
    return (lambda ids: value.insert(model, ids)) if hasattr(value, "insert") else None


def write(delta: Any, file: Path) -> None:
    """Writes every array of `delta`, by its path."""
    arrays = {name: on_host(array) for name, array in named(delta).items()}
    on_first(lambda: safetensors.numpy.save_file(arrays, file))


def read(delta: Any, file: Path) -> Any:
    """`delta` with the arrays of the file."""
    arrays = safetensors.numpy.load_file(file)
    leaves = [jax.device_put(arrays[name], leaf.sharding) for name, leaf in named(delta).items()]
    return jax.tree.unflatten(jax.tree.structure(delta), leaves)


def named(tree: Any) -> dict[str, jax.Array]:
    """Every array of a tree, by its path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
