"""`count` and `summary`: how many numbers train, in total and per leaf."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax

from ._paths import is_array, named_leaves
from ._table import table
from ._tree.method import Method
from ._tree.nodes import Adapter, is_node, weight_of
from .methods.full import Full


def count(delta: Any) -> int:
    """How many numbers train: those of every array in `delta`, without those of the base.

    >>> import jax, lora_jax
    >>> shape = {"kernel": jax.ShapeDtypeStruct((1024, 1024), "float32")}
    >>> lora_jax.count(lora_jax.lorafy(shape, "kernel", method=lora_jax.LoRA(rank=8)).delta)
    16384
    """
    return sum(int(leaf.size) for leaf in jax.tree.leaves(delta))


@dataclasses.dataclass(frozen=True)
class TrainedLeaf:
    """One leaf that trains, and how many numbers of it do."""

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    method: Method
    trains: int


class Summary(list[TrainedLeaf]):
    """One `TrainedLeaf` a targeted leaf, and how many numbers there are in all. Prints as a table."""

    def __init__(self, leaves: Iterable[TrainedLeaf], total: int):
        super().__init__(leaves)
        self.total = total

    @property
    def trainable(self) -> int:
        return sum(leaf.trains for leaf in self)

    def __str__(self) -> str:
        rows = [
            (leaf.path, str(leaf.shape), " ".join(leaf.axes) or "-", _short(leaf.method), f"{leaf.trains:,}")
            for leaf in self
        ]
        share = 100 * self.trainable / self.total if self.total else 0.0
        return (
            f"{table(('leaf', 'shape', 'axes', 'method', 'trains'), rows, right=(4,))}\n"
            f"trainable {self.trainable:,} of {self.total:,} parameters ({share:.4f} %)"
        )

    __repr__ = __str__


def summary(params: Any, delta: Any) -> Summary:
    """What trains, of how much, and each targeted leaf: a table that prints.

    >>> import jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}
    >>> lora_jax.summary(params, lora_jax.lorafy(params, "kernel", method=lora_jax.LoRA(rank=2)).delta)
    leaf    shape     axes    method        trains
    ----------------------------------------------
    kernel  (64, 64)  in out  LoRA(rank=2)     256
    trainable 256 of 4,160 parameters (6.1538 %)

    Args:
      params: the plain parameters, or the `frozen` of `lorafy`.
      delta: the other tree of `lorafy`, or a later state of it.

    Returns:
      A `Summary`: a list of `TrainedLeaf`, with `trainable` and `total`, the numbers of parameters.

    Raises:
      ValueError: `params` and `delta` do not have the same containers.
    """
    weights = [(path, weight_of(leaf)) for path, leaf in named_leaves(params, is_leaf=is_node)]
    total = sum(int(leaf.size) for _, leaf in weights if is_array(leaf))
    containers: Any = jax.tree.structure(params, is_leaf=is_node)

    def row(path: str, node: Any) -> TrainedLeaf:
        if isinstance(node, Adapter):
            return TrainedLeaf(node.spec.path, node.spec.shape, node.spec.axes, node.spec.method, count(node))
        return TrainedLeaf(path, tuple(node.shape), (), Full(), count(node))

    nodes = zip(weights, containers.flatten_up_to(delta), strict=True)
    return Summary([row(path, node) for (path, _), node in nodes if node is not None], total)


def _short(method: Any) -> str:
    """The method with the fields that differ from its defaults, rank always."""
    fields = [
        field
        for field in dataclasses.fields(method)
        if field.name == "rank" or getattr(method, field.name) != field.default
    ]
    options = ", ".join(f"{field.name}={getattr(method, field.name)!r}" for field in fields)
    return f"{type(method).__name__}({options})"
