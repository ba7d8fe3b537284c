"""The weights a run starts from, and the tokenizer that belongs to them."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments.config import Architecture, Base, Precision
from experiments.training import precision
from lora_jax.interop import hf
from lora_jax.models.gpt2 import GPT2, GPT2Config
from lora_jax.sharding import partition_specs, shardings


@dataclass(frozen=True)
class Loaded:
    """`directory` holds the tokenizer's files, which an export carries along; `origin` says in words
    where the weights are from.
    """

    model: Any
    params: Any
    tokenizer: Any
    directory: Path
    origin: str


def load(
    section: Base,
    data: Path,
    beside: Path,
    run: Path | None,
    tokenizer: Path | None,
    key: jax.Array,
    mesh: Mesh,
    policy: Precision,
) -> Loaded:
    """The base that `section` describes, in the dtypes of `policy`.

    `beside`: the config's directory, where a `section.path` that begins with a dot starts; `run`: the
    finished work directory, where `section.run` names another config; `tokenizer`: the one that was trained,
    where `section.vocabulary` asks for one. The weights are cast and split over `mesh` as they are read or
    drawn: no device holds more than its part.
    """
    if section.architecture is not None:
        words = data / section.tokenizer if section.tokenizer is not None else tokenizer
        assert words is not None  # one of them goes with an architecture, as the config has checked
        return _random(section.architecture, words, key, mesh, policy)
    if run is not None:
        directory = run / "merged"
    else:
        assert section.path is not None  # a base that is neither drawn nor another run's is at a path
        directory = find(section.path, data, beside)
    model, params = hf.load(directory, mesh=mesh, param_dtype=policy.parameters)
    loaded = load_tokenizer(directory)
    if len(loaded) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer in `{directory}` has {len(loaded)} tokens, more than the model's vocabulary "
            f"({model.config.vocab_size})."
        )
    return Loaded(
        precision.computing(model, policy),
        params,
        loaded,
        directory,
        section.path or f"merged result of {section.run}",
    )


def find(path: str, data: Path, beside: Path) -> Path:
    """A directory below `data`, or below `beside` if the path begins with a dot, or else a snapshot of
    the hub's repository of that name.
    """
    dotted = path.startswith(".")
    local = (beside / path).resolve() if dotted else data / path
    if local.is_dir():
        return local
    if Path(path).is_absolute() or dotted or path.count("/") > 1:
        raise FileNotFoundError(f"`base.path`: no directory `{local}`.")
    import huggingface_hub

    try:
        patterns = ["*.json", "*.safetensors", "*.txt"]
        return Path(huggingface_hub.snapshot_download(path, allow_patterns=patterns))
    except (
        Exception
    ) as error:  # whatever the hub's client raises: offline, unknown name, refused, broken connection
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"`base.path`: `{path}` is no directory below `{data}`, and the hub does not give it: {reason}"
        ) from error


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer in a directory, without asking the hub. It has to know its end-of-text token, which
    separates everything.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"no tokenizer directory `{directory}`.")
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in `{directory}` names no end-of-text token (`eos_token`).")
    return tokenizer


def model(architecture: Architecture, *, vocabulary: int, end: int) -> GPT2:
    """A GPT-2 of that shape; `end` is the token that begins and ends a text."""
    config = GPT2Config(
        vocab_size=vocabulary, **dataclasses.asdict(architecture), bos_token_id=end, eos_token_id=end
    )
    return GPT2(config)


def _random(
    architecture: Architecture, directory: Path, key: jax.Array, mesh: Mesh, policy: Precision
) -> Loaded:
    tokenizer = load_tokenizer(directory)
    fresh = model(architecture, vocabulary=len(tokenizer), end=tokenizer.eos_token_id)
    dtype = jnp.dtype(policy.parameters or fresh.param_dtype)

    def draw(key: jax.Array) -> Any:
        # In the model's dtype and then rounded: the same numbers, whatever they are stored in.
        params = fresh.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    shapes = jax.eval_shape(draw, key)
    placed = shardings(mesh, partition_specs(shapes, fresh.partition_rules), shapes)
    computing = precision.computing(fresh.clone(param_dtype=dtype), policy)
    return Loaded(computing, jax.jit(draw, out_shardings=placed)(key), tokenizer, directory, "random weights")
