"""The outputs of a model with a head for every input of a set, in batches of few shapes."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from experiments.tasks.losses import extras
from lora_jax.processes import on_host


def outputs_of(model: Any, params: Any, examples: Any, batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The places of `batch` inputs at a time, the shortest first, and the head's outputs for them in float32,
    (inputs, ...). A head of tokens has some for padding too.

    `examples` has `lengths` and `batch`, as `Sentences` has.
    """
    order = np.argsort(examples.lengths, kind="stable")
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        filled = examples.batch(np.concatenate([rows, np.full(batch - len(rows), -1)]))
        found = on_host(_apply(model)(params, filled["input_ids"], extras(filled)))
        yield rows, found[: len(rows)].astype(np.float32)


@functools.lru_cache(maxsize=2)
def _apply(model: Any) -> Callable:
    """Compiled once for a model, for whatever weights."""
    return jax.jit(lambda params, ids, more: model.apply({"params": params}, ids, **more))
