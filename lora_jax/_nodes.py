"""The leaves that `lorafy` and `combine` put where a plain array was.

| tree | targeted leaf | other leaf |
|---|---|---|
| `frozen` | the weight, or `Fixed` when the method keeps more beside it, or None when the leaf itself trains | the leaf |
| `delta` | `Adapter`, or the weight itself when the leaf itself trains | None |
| combined | `Adapted`, or `Trained` when the leaf itself trains | the leaf |
"""

import dataclasses
from typing import Any

import jax
from jax import tree_util

from ._method import Spec


@tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Adapter:
    """What trains at one leaf: the arrays of its method by name, and what the leaf is."""

    arrays: dict[str, jax.Array]
    spec: Spec

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        """For each array, the weight axis that each of its axes runs along; None for rank and block axes."""
        return self.spec.method.array_axes(self.spec)

    def tree_flatten_with_keys(self) -> tuple:
        names = tuple(sorted(self.arrays))
        return [(tree_util.DictKey(name), self.arrays[name]) for name in names], (names, self.spec)

    @classmethod
    def tree_unflatten(cls, static: tuple, arrays: Any) -> "Adapter":
        names, spec = static
        return cls(dict(zip(names, arrays, strict=True)), spec)


@tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Fixed:
    """A frozen weight and the arrays that its method needs beside it but does not train."""

    weight: Any
    arrays: dict[str, jax.Array]

    def tree_flatten_with_keys(self) -> tuple:
        names = tuple(sorted(self.arrays))
        keyed = [(tree_util.DictKey(name), self.arrays[name]) for name in names]
        return [(tree_util.GetAttrKey("weight"), self.weight), *keyed], names

    @classmethod
    def tree_unflatten(cls, names: tuple, children: Any) -> "Fixed":
        weight, *arrays = children
        return cls(weight, dict(zip(names, arrays, strict=True)))


@tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A frozen leaf with its adapter: what an adapted function takes in place of the weight."""

    frozen: Any
    adapter: Adapter
    key: jax.Array | None = None

    def tree_flatten_with_keys(self) -> tuple:
        names = ("frozen", "adapter", "key")
        return [(tree_util.GetAttrKey(name), getattr(self, name)) for name in names], None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> "Adapted":
        return cls(*children)

    @property
    def weight(self) -> Any:
        return self.frozen.weight if isinstance(self.frozen, Fixed) else self.frozen

    @property
    def fixed(self) -> dict[str, jax.Array]:
        return self.frozen.arrays if isinstance(self.frozen, Fixed) else {}


@tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Trained:
    """A leaf that trains itself, in a combined tree: marked, so that optimiser masks can tell it from a frozen one."""

    value: Any

    def tree_flatten_with_keys(self) -> tuple:
        return [(tree_util.GetAttrKey("value"), self.value)], None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> "Trained":
        return cls(*children)


def is_node(leaf: Any) -> bool:
    """Whether a tree walk should stop here: at a node of ours, or at a None that stands for an absent leaf."""
    return leaf is None or isinstance(leaf, Adapter | Fixed | Adapted | Trained)
