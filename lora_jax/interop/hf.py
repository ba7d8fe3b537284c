"""Hugging Face directories: `config.json`, safetensors in one file or in shards, and the files of the tokenizer.

Strict both ways: a tensor that is missing, unexpected or of another shape is an error that names it, nothing is cast,
and nothing is written over. PyTorch is not needed. Left out: `.bin` files and quantised checkpoints.
"""

import dataclasses
import functools
import itertools
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from .._paths import nearest
from ..models._encoder import EncoderConfig, numbered_labels
from ._families import Family, Tensor, family_of, family_of_model, head_of, shapes_of, tensors_of
from ._files import Pending, Stored, new_directory, read_json, stored_tensors, write_json, write_tensors

_DTYPES = {"F16": jnp.float16, "BF16": jnp.bfloat16, "F32": jnp.float32, "F64": jnp.float64}

# What `save` carries from `source`: the tokenizers of the supported models and the defaults of generation.
_CARRIED = (
    "added_tokens.json chat_template.jinja generation_config.json merges.txt special_tokens_map.json spm.model "
    "tokenizer.json tokenizer_config.json vocab.json vocab.txt"
).split()


def load(
    dir: str | Path,
    *,
    tie: str = "share",
    head: str | None = None,
    num_labels: int | None = None,
    key: jax.Array | None = None,
    scan: bool = False,
    checkpoint: bool = False,
    dtype: Any = None,
    place: Callable[[str, np.ndarray], jax.Array] | None = None,
) -> tuple[nn.Module, dict]:
    """The model that a directory's `config.json` names, with the head that it names, and its parameters.

    ```python
    model, params = hf.load("path/to/gpt2")
    logits = model.apply({"params": params}, input_ids)

    model, params = hf.load("path/to/gpt2", tie="untie")   # the head as a leaf of its own, lm_head/kernel
    model, params = hf.load("path/to/gpt2", scan=True, checkpoint=True, dtype=jnp.bfloat16)

    # The pretrained encoder with a new head, drawn from `key`: where fine-tuning begins.
    model, params = hf.load("path/to/roberta-base", head="sequence_classification", num_labels=3, key=jax.random.key(0))
    ```

    Parameters keep the dtype they have in the file. `tie="share"` follows the config: a tied head is the embedding, used
    twice. `tie="untie"` always gives the head its own leaf: the file's, if it has one, and otherwise the embedding's
    values. `head`, one of `lora_jax.models.HEADS`, or another `num_labels` for it, takes the place of what the config names: the
    encoder is read as strictly as ever, tensors of other heads are passed over, and unless the file has the whole new head,
    for as many labels, all of it is drawn from `key` (None: `jax.random.key(0)`) as the model draws it. `scan`, `checkpoint` and `dtype` (of the
    computation) are the model's. `place(path, array)` puts each leaf where it shall live, on one device or across several;
    the default is `jnp.asarray`.

    Raises `ValueError` naming the file, key or tensor that is missing, unexpected, damaged or of another shape or dtype.
    """
    if tie not in ("share", "untie"):
        raise ValueError(f"`tie`={tie!r} must be 'share' or 'untie'")
    dir = Path(dir)
    settings = read_json(dir / "config.json")
    family = family_of(settings)
    named = family.config.from_hf(settings)
    config = named if num_labels is None else _with_labels(named, head, num_labels)
    chosen = head_of(settings, family, head)
    # The config's own head, asked for by name, is as strict as any other part.
    own = {family.heads.get(name) for name in settings.get("architectures") or ()}
    replaced = head is not None and (own != {head} or config != named)
    stored = _named_as_in_table(dir, family)
    build = functools.partial(family.build, head=chosen, dtype=dtype, scan=scan, checkpoint=checkpoint)
    config = _tied_or_untied(dir, family, build, config, stored, tie)
    model = build(config)
    tensors = tensors_of(model, family)
    expected = {tensor.name for tensor in tensors}
    stored = {name: tensor for name, tensor in stored.items() if name in expected or not family.leftovers.fullmatch(name)}
    stored, fresh = _head_of_file_or_new(family, tensors, stored) if replaced else (stored, set())
    kept = [tensor for tensor in tensors if tensor.path not in fresh]
    _check_stored(dir, kept, stored)
    # What a new cache or a new head would be made of, were it float32, would not fit the other parameters.
    model = model.clone(param_dtype=_DTYPES[stored[family.embedding].dtype])

    place = place or _place
    flat = {path: place(path, array) for path, array in _drawn(model, fresh, key).items()}
    for path, parts in itertools.groupby(kept, lambda tensor: tensor.path):
        parts = list(parts)
        arrays = [tensor.to_ours(stored[tensor.name].read()) for tensor in parts]
        flat[path] = place(path, arrays[0] if parts[0].layer is None else np.stack(arrays))
    return model, traverse_util.unflatten_dict(flat, sep="/")


def save(
    dir: str | Path,
    model: nn.Module,
    params: Mapping,
    *,
    source: str | Path | None = None,
    overwrite: bool = False,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a directory that `transformers` loads, PyTorch's models included.

    ```python
    hf.save("merged", model, lora_jax.merge(frozen, delta), source="path/to/gpt2")
    ```

    `params`: NumPy or JAX arrays in the layout of `model`, scanned or not; each tensor keeps its dtype. A tied model has
    no tensor for its head, as `transformers` writes it, and an untied one says so in its config. From `source` come the
    tokenizer's files and `generation_config.json`. Above `shard_bytes` the tensors go into several files and an index;
    one shard at a time is in memory. The directory appears under its name when it is complete; one that exists and is
    not empty is an error, or is replaced with `overwrite=True` if it is an earlier export.

    Raises `ValueError` naming a leaf that is missing, unexpected or of another shape, and `TypeError` for one that is no
    array, as in the two halves that `lorafy` returns.
    """
    kind, architecture, family = family_of_model(model)
    flat = _checked_leaves(model, params)
    carried = _carried_files(source)
    pending = []
    for tensor in tensors_of(model, family):
        leaf = flat[tensor.path]
        fetch = functools.partial(tensor.to_theirs, leaf)
        names = [tensor.name]
        if not model.config.tie_word_embeddings:
            names += [alias for alias, name in family.aliases.items() if name == tensor.name]
        pending += [Pending(name, math.prod(tensor.shape) * leaf.dtype.itemsize, fetch) for name in names]

    with new_directory(Path(dir), overwrite=overwrite) as new:
        write_tensors(new, pending, shard_bytes)
        about = {"model_type": kind, "architectures": [architecture], "dtype": _widest(flat.values())}
        write_json(new / "config.json", {**model.config.to_hf(), **about})
        for file in carried:
            shutil.copyfile(file, new / file.name)


def _named_as_in_table(dir: Path, family: Family) -> dict[str, Stored]:
    named: dict[str, Stored] = {}
    for name, tensor in stored_tensors(dir).items():
        full = family.full_name(name)
        if full in named:
            raise ValueError(f"{dir} holds one tensor under two names, {named[full].name!r} and {name!r}")
        named[full] = tensor
    return named


def _with_labels(config: Any, head: str | None, count: int) -> Any:
    if not isinstance(config, EncoderConfig):
        raise ValueError(f"`num_labels`={count} was passed for {config.family}, which has no head with labels; leave it out")
    if head is None:
        raise ValueError(f"`num_labels`={count} goes with `head`: the config's own head has the {config.num_labels} labels it was trained for")
    return config if count == config.num_labels else dataclasses.replace(config, labels=numbered_labels(count))


def _tied_or_untied(dir: Path, family: Family, build: functools.partial, config: Any, stored: dict[str, Stored], tie: str) -> Any:
    """The config after `tie`, with `stored` brought to it: each array under one name, the head's own where it is apart."""
    decoder, embedding = family.decoder, family.embedding
    tied = config.tie_word_embeddings
    if tied and tie == "untie":
        apart = dataclasses.replace(config, tie_word_embeddings=False)
        if any(tensor.name == decoder for tensor in tensors_of(build(apart), family)):
            config, tied = apart, False
            if decoder not in stored and embedding in stored:
                stored[decoder] = stored[embedding]
        elif build.keywords["head"] == "masked_lm":
            raise ValueError(f"`tie`='untie' was passed for {dir}, whose head is the embedding by definition (`legacy`=false); leave it out")
    elif tied and decoder in stored and embedding in stored:
        _check_equal(dir, stored, decoder, embedding, "; keep both with `tie='untie'`, or remove the tensor")
        del stored[decoder]
    for alias, name in family.aliases.items():
        if alias in stored:
            if tied and name in stored:
                _check_equal(dir, stored, alias, name, "; remove the first")
            # Apart, it is the one that PyTorch adds.
            stored[name] = stored.pop(alias)
    return config


def _check_equal(dir: Path, stored: dict[str, Stored], one: str, other: str, fix: str) -> None:
    if not np.array_equal(stored[one].read(), stored[other].read()):
        raise ValueError(f"{dir} has a {one!r} that differs from its {other!r}, though its config.json ties them{fix}")


def _head_of_file_or_new(family: Family, tensors: list[Tensor], stored: dict[str, Stored]) -> tuple[dict[str, Stored], set[str]]:
    """`stored` without the tensors of other heads, and the paths to be drawn: none, or the whole head if any of it is not there or does not fit."""
    body = {name: tensor for name, tensor in stored.items() if name.startswith(family.prefix)}
    own = [tensor for tensor in tensors if not tensor.name.startswith(family.prefix)]
    if any(tensor.name not in stored or stored[tensor.name].shape != tensor.shape for tensor in own):
        return body, {tensor.path for tensor in own}
    return body | {tensor.name: stored[tensor.name] for tensor in own}, set()


def _drawn(model: nn.Module, paths: set[str], key: jax.Array | None) -> dict[str, np.ndarray]:
    """These leaves of freshly drawn parameters; the others are never computed."""
    if not paths:
        return {}

    def draw(key):
        flat = traverse_util.flatten_dict(model.init(key, jnp.zeros((1, 1), jnp.int32))["params"], sep="/")
        return {path: flat[path] for path in sorted(paths)}

    return jax.device_get(jax.jit(draw)(jax.random.key(0) if key is None else key))


def _check_stored(dir: Path, tensors: list[Tensor], stored: dict[str, Stored]) -> None:
    expected = {tensor.name: tensor for tensor in tensors}
    unexpected = [name for name in stored if name not in expected]
    problems = []
    for name in expected.keys() - stored.keys():
        close = nearest(name, [stored[other].name for other in unexpected], 1)
        problems.append(f"{name!r} is missing" + (f" (is it {close[0]!r}?)" if close else ""))
    problems += [f"{stored[name].name!r} is unexpected" for name in unexpected]
    for name in expected.keys() & stored.keys():
        wanted, found = expected[name].shape, stored[name]
        if found.shape != wanted:
            problems.append(f"{found.name!r} has shape {found.shape} and must have {wanted}")
        if found.dtype not in _DTYPES:
            problems.append(f"{found.name!r} has dtype {found.dtype} and must have one of {list(_DTYPES)}")
    _report(f"{dir} does not hold the model that its config.json describes", problems)


def _checked_leaves(model: nn.Module, params: Mapping) -> dict[str, np.ndarray | jax.Array]:
    if not isinstance(params, Mapping):
        raise TypeError(f"`params` is a {type(params).__name__}; pass the nested dict that `model.apply` takes")
    flat = traverse_util.flatten_dict(params, sep="/")
    for path, leaf in flat.items():
        if not isinstance(leaf, np.ndarray | jax.Array):
            raise TypeError(
                f"`params` holds a {type(leaf).__name__} at {path!r}, not an array; if it is adapted, or one half of what "
                "`lorafy` returned, pass `lora_jax.merge(frozen, delta)`"
            )
    shapes = shapes_of(model)
    problems = [f"{path!r} is missing" for path in shapes.keys() - flat.keys()]
    problems += [f"{path!r} is unexpected" for path in flat.keys() - shapes.keys()]
    for path in shapes.keys() & flat.keys():
        if flat[path].shape != shapes[path].shape:
            problems.append(f"{path!r} has shape {flat[path].shape} and must have {shapes[path].shape}")
        if jnp.dtype(flat[path].dtype) not in map(jnp.dtype, _DTYPES.values()):
            problems.append(f"{path!r} has dtype {flat[path].dtype} and must be floating point")
    layout = "stacked, `stack_layers(params)`" if model.scan else "not stacked, `unstack_layers(params)`"
    _report(f"`params` are not those of `model`, whose layers are {layout}", problems)
    return flat


def _report(summary: str, problems: list[str], shown: int = 8) -> None:
    if problems:
        problems.sort()
        more = f"; and {len(problems) - shown} more" if len(problems) > shown else ""
        raise ValueError(f"{summary}: {'; '.join(problems[:shown])}{more}")


def _carried_files(source: str | Path | None) -> list[Path]:
    if source is None:
        return []
    if not Path(source).is_dir():
        raise ValueError(f"`source`={str(source)!r} is not a directory")
    return [file for name in _CARRIED if (file := Path(source) / name).is_file()]


def _place(path: str, array: np.ndarray) -> jax.Array:
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise ValueError(
            f"{path!r} is {array.dtype} in the file and would be narrowed; call `jax.config.update('jax_enable_x64', True)` "
            "first, or give `place` a function that converts it"
        )
    return jnp.asarray(array)


def _widest(leaves) -> str:
    # `from_pretrained` casts every tensor to the one dtype of the config, so that it must hold the widest of them.
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(True):
        return str(functools.reduce(jnp.promote_types, {leaf.dtype for leaf in leaves}))
