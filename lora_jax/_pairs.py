"""`frozen` and `delta` side by side, leaf by leaf."""

from collections.abc import Callable
from typing import Any

import jax

from ._nodes import Adapted, Adapter, Trained, is_node, resolved
from ._paths import is_array, named_leaves


def paired(join: Callable, frozen: Any, delta: Any, *rest: Any, resolve: bool = True) -> Any:
    """`join(frozen leaf, delta leaf, *rest)` at every leaf, with shared arrays in place unless they are to stay shared."""
    leaves, treedef = jax.tree.flatten(frozen, is_leaf=is_node)
    try:
        others = treedef.flatten_up_to(delta)
    except (ValueError, TypeError) as error:
        raise ValueError(f"`frozen` and `delta` do not have the same containers; pass the two trees of one `lorafy`. ({error})") from error
    for index, (leaf, other) in enumerate(zip(leaves, others, strict=True)):
        alone = other is None or isinstance(other, Adapter) or leaf is None
        if isinstance(leaf, Adapter | Adapted | Trained) or not alone:
            path, _ = named_leaves(frozen, is_leaf=is_node)[index]
            raise ValueError(
                f"`frozen` and `delta` do not belong together: at {path!r} the first has {_kind(leaf)} and the second {_kind(other)}. "
                "Pass the two trees of one `lorafy`, `frozen` first."
            )
    if resolve:
        leaves, others = resolved(leaves), resolved(others)
    return jax.tree.unflatten(treedef, [join(leaf, other, *rest) for leaf, other in zip(leaves, others, strict=True)])


def _kind(leaf: Any) -> str:
    return f"an array of shape {tuple(leaf.shape)}" if is_array(leaf) else f"an {type(leaf).__name__}"
