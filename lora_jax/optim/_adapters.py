"""The adapters of one method in the tree that an optimiser is given: a delta or a combined tree, or its
gradient or update.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax

from .._paths import named_leaves
from .._tree.method import Method
from .._tree.nodes import Adapted, Adapter, adapters_of, is_node


def adapters(tree: Any, method: type[Method]) -> dict[str, Adapter]:
    """By their place in the tree. Those that `optax.masked` has emptied are left out."""
    return {
        path: node
        for path, node in adapters_of(tree).items()
        if isinstance(node.spec.method, method) and not _masked(node)
    }


def with_adapters(tree: Any, changed: Mapping[str, Adapter]) -> Any:
    """The same tree with these adapters at their places."""

    def replaced(path: str, node: Any) -> Any:
        if path not in changed:
            return node
        return (
            dataclasses.replace(node, adapter=changed[path]) if isinstance(node, Adapted) else changed[path]
        )

    nodes = [replaced(path, node) for path, node in named_leaves(tree, is_leaf=is_node)]
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=is_node), nodes)


def _masked(adapter: Adapter) -> bool:
    return any(isinstance(array, optax.MaskedNode) for array in adapter.arrays.values())
