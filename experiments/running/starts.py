"""What trains, where it does not start as it is drawn.

An adapter that another run has trained can be the start of this one's, as LoRA's authors begin MRPC, RTE and
STS-B from MNLI's. A and B are the other's, and DoRA's magnitudes. The head of the task is new, since the
labels are others. A method that keeps a part of the adapter beside the base cannot start so.

The bias of a new head of one output may start at a number that the task knows.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import Config, method_value
from experiments.running.base import Loaded, where_paths_start
from experiments.running.baselines import named
from lora_jax import DoRA, LoRA
from lora_jax.interop import peft


def check(config: Config) -> None:
    """Raises `ValueError` for a method whose adapter is not all in what trains."""
    if config.base.adapter is not None and type(method_value(config.method)) not in (LoRA, DoRA):
        raise ValueError(
            f"`base.adapter` is {config.base.adapter!r}, where LoRA and DoRA can begin, and `method.name` is "
            f"{config.method['name']}: leave `base.adapter` out."
        )


def find(path: str, data: Path, beside: Path) -> Path:
    """The directory of the adapter, below `data`, or below `beside` if `path` begins with a dot. It may be
    that of a finished run.
    """
    local = (beside / path).resolve() if path.startswith(".") else data / path
    for directory in (local, local / "adapter"):
        if (directory / "adapter_config.json").is_file():
            return directory
    raise FileNotFoundError(
        f"`base.adapter`: no `adapter_config.json` in `{local}` or its adapter/. {where_paths_start(data)}"
    )


def started(directory: Path, loaded: Loaded, delta: Any) -> Any:
    """`delta` with the arrays of the adapter in `directory`, but for a head that the task has given.

    Raises:
      ValueError: the adapter is of other leaves, another rank or another method; its base is another.
    """
    model, params = loaded.model, loaded.params
    count = peft.head_of(directory).get("num_labels")
    if loaded.head is not None and count is not None:
        labels = tuple(f"LABEL_{number}" for number in range(count))
        model = model.clone(config=dataclasses.replace(model.config, labels=labels))
        params = _with_head_of(model, params)
    theirs = named(peft.load(directory, model, params).delta)
    ours = named(delta)
    heads = ("classifier", "pooler", "score", "qa_outputs")
    kept = lambda name: loaded.head is not None and name.split("/")[0] in heads
    wanted = {name: leaf for name, leaf in ours.items() if not kept(name)}
    other = [name for name in theirs if name not in ours and not kept(name)]
    for name in [*(name for name in wanted if name not in theirs), *other]:
        where = "and the adapter does not have" if name in wanted else "and the adapter has more:"
        raise ValueError(
            f"`base.adapter`: {directory} does not fit `method` and `targets`, {where} {name!r}. Take the "
            "method and the targets that it was trained with."
        )
    for name, leaf in wanted.items():
        if theirs[name].shape != leaf.shape:
            raise ValueError(
                f"`base.adapter`: {name!r} has the shape {theirs[name].shape} in {directory}, and "
                f"{leaf.shape} here: set `method.rank` to the adapter's."
            )
    arrays = [
        jax.device_put(jnp.asarray(theirs[name], leaf.dtype), leaf.sharding) if name in wanted else leaf
        for name, leaf in ours.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(delta), arrays)


def with_bias(value: float, loaded: Loaded, delta: Any) -> Any:
    """`delta` with this bias in the head of one output that the task has given.

    A bias that is not zero was trained with the base, and stays. The head of a decoder has no bias, and
    starts as it is drawn.
    """
    if loaded.head is None:
        return delta
    new = lambda name, leaf: re.fullmatch(loaded.head, name) and leaf.shape == (1,) and not jnp.any(leaf)
    arrays = [
        jax.device_put(jnp.full_like(leaf, value), leaf.sharding) if new(name, leaf) else leaf
        for name, leaf in named(delta).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(delta), arrays)


def _with_head_of(model: Any, params: Any) -> Any:
    """`params` with leaves of zeros where the model has another shape, which are the head's."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    return jax.tree.map(
        lambda leaf, shape: leaf if leaf.shape == shape.shape else np.zeros(shape.shape, leaf.dtype),
        params,
        shapes,
    )
