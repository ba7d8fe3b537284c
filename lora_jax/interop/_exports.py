"""What every export of adapters does, whatever the format: it checks the two trees, and writes new heads and
other frozen tensors whole.
"""

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from .. import arithmetic
from .._merge import merge
from .._packed.lazy import value_of
from .._paths import named_leaves
from .._tree.nodes import Adapted, Adapter, adapters_of, Fixed, is_node, Shared, Trained, weight_of
from .._tree.pairs import paired
from ..arithmetic._leaves import check_arrays
from ._families import Family, Tensor, tensors_of


# PyTorch's user may have no such head, or a fresh one. So these heads are written, whether they trained or
# not.
NEW_HEADS = ("sequence_classification", "token_classification", "question_answering")
NOTHING_ADAPTED = (
    "`delta` holds no adapter, and such files need one; for weights that train themselves, write the model, "
    "`hf.save(dir, model, merge(frozen, delta))`."
)


def check_trees(frozen: Any, delta: Any) -> None:
    """Raises unless these are the two trees of one `lorafy`, in this order. They must hold arrays, and no
    stacked adapters.
    """
    if any(
        isinstance(leaf, Adapted | Trained)
        for tree in (frozen, delta)
        for leaf in jax.tree.leaves(tree, is_leaf=is_node)
    ):
        raise TypeError(
            "a combined tree was passed, as `combine` returns it; pass the two trees that it was made of, "
            "as `partition(tree)` returns them."
        )
    if adapters_of(frozen):
        raise TypeError("`frozen` holds adapters: the order is `frozen`, `delta`. Exchange the two.")
    check_arrays("save(..., frozen, delta)", delta=delta)
    paired(lambda *_: None, frozen, delta, resolve=False)
    for leaf in adapters_of(delta).values():
        for name, axes in leaf.array_axes().items():
            if leaf.arrays[name].ndim != len(axes):
                raise ValueError(
                    f"`delta` holds stacked adapters at {leaf.spec.path!r}; save one of them, `take(stacked, "
                    "0)`."
                )


def with_heads_whole(model: nn.Module, family: Family, frozen: Any, delta: Any) -> tuple[Any, Any]:
    """The two trees with every adapter of the head merged. An adapter does not hold the weight that it adds
    to, and the weight of a new head is in no other file.
    """
    head = {tensor.path for tensor in tensors_of(model, family) if not tensor.name.startswith(family.prefix)}
    if not any(leaf.spec.path in head for leaf in adapters_of(delta).values()):
        return frozen, delta
    leaves = jax.tree.leaves((frozen, delta), is_leaf=is_node)
    if any(
        isinstance(array, Shared)
        for leaf in leaves
        if isinstance(leaf, Adapter | Fixed)
        for array in leaf.arrays.values()
    ):
        frozen, delta = arithmetic.as_lora(frozen, delta)
    paths = [path for path, _ in named_leaves(frozen, is_leaf=is_node)]
    pairs: list[tuple[Any, Any]] = []
    paired(lambda leaf, other: pairs.append((leaf, other)), frozen, delta)
    pairs = [
        (None, merge(*pair)) if path in head and isinstance(pair[1], Adapter) else pair
        for path, pair in zip(paths, pairs, strict=True)
    ]
    treedef = jax.tree.structure(frozen, is_leaf=is_node)
    frozen, delta = (jax.tree.unflatten(treedef, side) for side in zip(*pairs, strict=True))
    return frozen, delta


def frozen_tensors(frozen: Any, tensors: Iterable[Tensor]) -> dict[str, np.ndarray]:
    """Tensors of leaves that do not train, by name; quantised leaves as the values that they stand for."""
    leaves = dict(named_leaves(frozen, is_leaf=is_node))
    return {tensor.name: tensor.to_theirs(value_of(weight_of(leaves[tensor.path]))) for tensor in tensors}
