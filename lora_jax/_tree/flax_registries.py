"""Flax's own tools on our nodes: its state dicts, and NNX's updates in place.

Flax keeps registries of its own beside JAX's. They are told of our nodes when Flax is imported, before or
after `lora_jax`, which never imports it. Left out: an `nnx.Variable` that holds an adapter, as in what
`lorafy` makes of a state of variables. `nnx.Optimizer` takes apart whatever pytree a variable holds;
`nnx.as_pure` gives a state without.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import jax


def tell_flax(kinds: Iterable[type], changeable: type) -> None:
    """Registers these nodes with Flax, now or once it is imported. `changeable` has its arrays in a dict,
    `arrays`, of which NNX may change the values.
    """
    kinds = tuple(kinds)

    # A version of Flax without one of these functions is imported all the same.
    def to_serialization(module: Any) -> None:
        register = getattr(module, "register_serialization_state", lambda *_, **__: None)
        for kind in kinds:
            register(kind, _to_state, _from_state, override=True)

    def to_nnx(module: Any) -> None:
        register = getattr(module, "register_pytree_node_type", lambda *_, **__: None)
        register(
            changeable,
            flatten=lambda node: (sorted(node.arrays.items()), node.spec),
            unflatten=lambda items, spec: changeable(dict(items), spec),
            set_key=lambda node, name, array: node.arrays.update({name: array}),
        )

    told: dict[str, Callable[[ModuleType], None]] = {
        "flax.serialization": to_serialization,
        "flax.nnx.graphlib": to_nnx,
    }
    for name in [name for name in told if name in sys.modules]:
        told.pop(name)(sys.modules[name])
    if told:
        sys.meta_path.insert(0, _Watch(told))


class _Watch(MetaPathFinder):
    """Calls a function with each of these modules, right after it is first imported."""

    def __init__(self, told: dict[str, Callable[[ModuleType], None]]):
        self._told = told

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        tell = self._told.pop(name, None)
        spec = None if tell is None else importlib.util.find_spec(name)  # as all others find it
        if tell is None or spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_tell(module: ModuleType) -> None:
            run(module)
            tell(module)

        spec.loader.exec_module = run_and_tell  # type: ignore[method-assign]
        return spec


def _children(node: Any) -> tuple[dict[str, Any], Any]:
    """The children of a node by name, and its treedef."""
    found, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)
    return {_name(*path): child for path, child in found}, treedef


def _name(key: Any) -> str:
    return key.name if isinstance(key, jax.tree_util.GetAttrKey) else str(key.key)


def _to_state(node: Any) -> dict[str, Any]:
    serialization: Any = sys.modules["flax.serialization"]
    return {name: serialization.to_state_dict(child) for name, child in _children(node)[0].items()}


def _from_state(node: Any, state: dict[str, Any]) -> Any:
    serialization: Any = sys.modules["flax.serialization"]
    children, treedef = _children(node)
    where = f" of {node.spec.path!r}" if hasattr(node, "spec") else ""
    if set(children) != set(state):
        raise ValueError(
            f"the state{where} has {sorted(state)}, and {type(node).__name__} has {sorted(children)}: pass "
            "what the same `lorafy` returned."
        )
    restored = {
        name: serialization.from_state_dict(child, state[name], name=name) for name, child in children.items()
    }
    for name, child in children.items():
        before, after = getattr(child, "shape", None), getattr(restored[name], "shape", None)
        # Another rank would be scaled as this one.
        if jax.tree_util.all_leaves([child]) and before != after:
            raise ValueError(
                f"{name!r}{where} has shape {after} in the state, and {before} in the adapter: pass what the "
                "same `lorafy` returned, with the same rank."
            )
    return jax.tree.unflatten(treedef, list(restored.values()))
