"""The leaves that `lorafy` and `combine` put where a plain array was.

| tree | targeted leaf | other leaf |
|---|---|---|
| `frozen` | the weight; `Fixed` when the method keeps more beside it; None when it trains itself | the leaf |
| `frozen`, quantised | `Packed` in place of the weight, also within `Fixed` | `Packed` |
| `delta` | `Adapter`; the weight itself when it trains itself | None |
| combined | `Adapted`; `Trained` when it trains itself | the leaf |
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

import jax
from jax import tree_util

from .._packed.packed import Packed
from .._paths import named_leaves
from .flax_registries import tell_flax
from .method import Method, Spec


OfKind = TypeVar("OfKind", bound=Method)

_PLAIN_CODE = (
    "{path!r} is an adapted weight, as `combine(frozen, delta)` returns it, and plain code cannot compute "
    "with it. "
    "Call the function through `adapt`: `lora_jax.adapt(fn)(combine(frozen, delta), ...)`; or give it plain "
    "weights, "
    "`lora_jax.merge(frozen, delta)`."
)


@tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Shared:
    """Stands for the array of the same name at another leaf.

    It holds no array, so that nothing counts or trains it twice.
    """

    path: str


@tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Adapter:
    """What trains at one leaf: the arrays of its method by name, and what the leaf is.

    >>> import jax.numpy as jnp, lora_jax
    >>> delta = lora_jax.lorafy({"kernel": jnp.ones((8, 4))}, "kernel", method=lora_jax.LoRA(rank=2)).delta
    >>> {name: array.shape for name, array in delta["kernel"].arrays.items()}, delta["kernel"].spec.path
    ({'a': (8, 2), 'b': (2, 4)}, 'kernel')

    A pytree whose leaves are the arrays. `is_leaf=lambda node: isinstance(node, lora_jax.Adapter)` makes
    `jax.tree.map` see adapters as wholes.
    """

    arrays: dict[str, Any]  # in a tree of specs or of masks, what stands for the array
    spec: Spec

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        """For each array that is here, the weight axis that each of its axes runs along; None for rank
        and block axes.
        """
        return _axes_of_own(self.arrays, self.spec)

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
    arrays: dict[str, Any]
    spec: Spec

    def array_axes(self) -> dict[str, tuple[int | None, ...]]:
        return _axes_of_own(self.arrays, self.spec)

    def tree_flatten_with_keys(self) -> tuple:
        names = tuple(sorted(self.arrays))
        keyed = [(tree_util.DictKey(name), self.arrays[name]) for name in names]
        return [(tree_util.GetAttrKey("weight"), self.weight), *keyed], (names, self.spec)

    @classmethod
    def tree_unflatten(cls, static: tuple, children: Any) -> "Fixed":
        names, spec = static
        weight, *arrays = children
        return cls(weight, dict(zip(names, arrays, strict=True)), spec)


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
        return weight_of(self.frozen)

    @property
    def fixed(self) -> dict[str, jax.Array]:
        return self.frozen.arrays if isinstance(self.frozen, Fixed) else {}

    def _refuse(self, *_: Any) -> Any:
        raise TypeError(_PLAIN_CODE.format(path=self.adapter.spec.path))

    # What plain code does with a weight. JAX's own functions ask for `__jax_array__`.
    __jax_array__ = __matmul__ = __rmatmul__ = __mul__ = __rmul__ = __add__ = __radd__ = _refuse
    __sub__ = __rsub__ = __truediv__ = __rtruediv__ = __neg__ = __getitem__ = __iter__ = __len__ = _refuse

    def __getattr__(self, name: str) -> Any:
        if name in ("T", "shape", "dtype", "ndim", "reshape", "transpose", "astype", "sum", "dot", "value"):
            raise AttributeError(_PLAIN_CODE.format(path=self.adapter.spec.path))
        raise AttributeError(f"'Adapted' object has no attribute {name!r}")


@tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Trained:
    """A leaf of a combined tree that trains itself. The mark tells it from a frozen leaf."""

    value: Any

    def tree_flatten_with_keys(self) -> tuple:
        return [(tree_util.GetAttrKey("value"), self.value)], None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> "Trained":
        return cls(*children)


def _axes_of_own(arrays: dict, spec: Spec) -> dict[str, tuple[int | None, ...]]:
    axes = spec.method.array_axes(spec)
    return {name: axes[name] for name, array in arrays.items() if not isinstance(array, Shared)}


def resolved(nodes: Iterable[Any]) -> list[Any]:
    """The nodes of one tree with every `Shared` replaced by the array that it stands for.

    Raises `ValueError` where no other leaf has that array, or two leaves of one path have different ones.
    """
    nodes = list(nodes)
    parts = [
        part
        for node in nodes
        for part in ((node.frozen, node.adapter) if isinstance(node, Adapted) else (node,))
    ]
    parts = [part for part in parts if isinstance(part, Adapter | Fixed)]
    if not any(isinstance(array, Shared) for part in parts for array in part.arrays.values()):
        return nodes
    own: dict[tuple, list] = {}
    for part in parts:
        for name, array in part.arrays.items():
            if not isinstance(array, Shared):
                own.setdefault((part.spec.path, name), []).append(array)

    def found(name: str, array: Any, spec: Spec) -> Any:
        if not isinstance(array, Shared):
            return array
        owners = own.get((array.path, name), [])
        if len(owners) != 1:
            there = "is missing" if not owners else "is there more than once"
            raise ValueError(
                f"the adapter of {spec.path!r} shares {name} with that of {array.path!r}, which {there}: "
                "pass the whole tree that was adapted, "
                "and each such tree as an argument of its own."
            )
        return owners[0]

    def whole(part: Any) -> Any:
        if isinstance(part, Adapted):
            return dataclasses.replace(part, frozen=whole(part.frozen), adapter=whole(part.adapter))
        if not isinstance(part, Adapter | Fixed):
            return part
        return dataclasses.replace(
            part, arrays={name: found(name, array, part.spec) for name, array in part.arrays.items()}
        )

    return [whole(node) for node in nodes]


def weight_of(leaf: Any) -> Any:
    """The weight of a leaf of `frozen`, without what its method keeps beside it."""
    return leaf.weight if isinstance(leaf, Fixed) else leaf


def adapters_of(tree: Any) -> dict[str, Adapter]:
    """The adapters of a delta or of a combined tree, by their place in it."""
    nodes = ((path, node) for path, node in named_leaves(tree, is_leaf=is_node))
    found = ((path, node.adapter if isinstance(node, Adapted) else node) for path, node in nodes)
    return {path: node for path, node in found if isinstance(node, Adapter)}


def method_of(adapter: Adapter, kind: type[OfKind]) -> OfKind:
    """The method of an adapter that is known to be of this kind."""
    method = adapter.spec.method
    assert isinstance(method, kind), method
    return method


def is_node(leaf: Any) -> bool:
    """Whether a walk over a tree should stop: at a node of ours, or at the None of an absent leaf."""
    return leaf is None or isinstance(leaf, Adapter | Fixed | Adapted | Trained | Packed)


tell_flax((Adapter, Fixed, Adapted, Trained, Packed, Shared), changeable=Adapter)
