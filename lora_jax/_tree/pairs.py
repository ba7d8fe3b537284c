"""`frozen` and `delta` side by side, leaf by leaf."""

from collections.abc import Callable
from typing import Any

import jax

from .._paths import is_array, named_leaves
from .method import Spec
from .nodes import Adapted, Adapter, Fixed, is_node, resolved, Trained


def paired(join: Callable, frozen: Any, delta: Any, *rest: Any, resolve: bool = True) -> Any:
    """`join(frozen leaf, delta leaf, *rest)` at every leaf. `resolve` puts shared arrays in place first."""
    treedef: Any
    leaves, treedef = jax.tree.flatten(frozen, is_leaf=is_node)
    try:
        others = treedef.flatten_up_to(delta)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "`frozen` and `delta` do not have the same containers; pass the two trees of one `lorafy`. "
            f"({error})"
        ) from error
    for index, (leaf, other) in enumerate(zip(leaves, others, strict=True)):
        if leaf is None and isinstance(other, dict | list | tuple):
            raise ValueError(
                "`frozen` and `delta` do not have the same containers: `frozen` has None where `delta` has "
                "more; pass the two trees of one `lorafy`."
            )
        alone = other is None or isinstance(other, Adapter) or leaf is None
        if isinstance(leaf, Adapter | Adapted | Trained) or not alone:
            path, _ = named_leaves(frozen, is_leaf=is_node)[index]
            raise ValueError(
                f"`frozen` and `delta` do not belong together: at {path!r} the first has {_kind(leaf)} and "
                f"the second {_kind(other)}. "
                "Pass the two trees of one `lorafy`, `frozen` first."
            )
    for leaf, other in zip(leaves, others, strict=True):
        if isinstance(other, Adapter) and leaf is not None:
            _check_fixed(leaf, other.spec, other.arrays.keys())
    if resolve:
        leaves, others = resolved(leaves), resolved(others)
    return jax.tree.unflatten(
        treedef, [join(leaf, other, *rest) for leaf, other in zip(leaves, others, strict=True)]
    )


def _check_fixed(leaf: Any, spec: Spec, trained: Any) -> None:
    """Raises `ValueError` where the arrays that a method keeps in `frozen` are missing, or another
    adapter's.
    """
    own, method = leaf.spec if isinstance(leaf, Fixed) else None, type(spec.method).__name__
    missing = (
        spec.method.array_axes(spec).keys()
        - trained
        - (leaf.arrays.keys() if isinstance(leaf, Fixed) else set())
    )
    if missing and not (spec.method.delayed_start and own is None):
        raise ValueError(
            f"`frozen` and `delta` do not belong together: the {method} adapter of {spec.path!r} needs "
            f"{', '.join(sorted(missing))} in `frozen`. "
            "Pass the `frozen` that `lorafy` returned with this `delta`, not the parameters it was made from."
        )
    if own is not None and (own.path, own.group, type(own.method)) != (
        spec.path,
        spec.group,
        type(spec.method),
    ):
        raise ValueError(
            f"`frozen` and `delta` do not belong together: at {spec.path!r} `delta` has {method} "
            f"({spec.group}), and `frozen` holds the arrays of "
            f"{type(own.method).__name__} ({own.group}) at {own.path!r}. Pass the two trees of one `lorafy`."
        )


def _kind(leaf: Any) -> str:
    return f"an array of shape {tuple(leaf.shape)}" if is_array(leaf) else f"an {type(leaf).__name__}"
