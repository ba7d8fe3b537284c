"""From the two trees of `lorafy` to the adapters and tensors of a file, whatever the format.

Here the trees are checked, layers are taken from their stacks, and the adapter of an embedding that is also
the head becomes two.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .. import arithmetic
from .._merge import merge
from .._packed.lazy import value_of
from .._paths import is_array, named_leaves
from .._tree.nodes import Adapted, Adapter, adapters_of, Fixed, is_node, Shared, Trained, weight_of
from .._tree.pairs import paired
from ..arithmetic._leaves import check_arrays
from ..methods import LoRA
from ..processes import on_host
from ._adapters import FileMethod, Part
from ._families import Family
from ._modules import Module, modules_of, uncalled_modules
from ._tensors import layout_of, shapes_of, Tensor, tensors_of


_NEW_HEADS = ("sequence_classification", "token_classification", "question_answering")
NOTHING_ADAPTED = (
    "`delta` holds no adapter, and such files need one; for weights that train themselves, write the model, "
    "`hf.save(dir, model, merge(frozen, delta))`."
)


def has_new_head(model: nn.Module) -> bool:
    """Whether the model's head is one that PyTorch's user may not have, or have fresh. Such heads are written
    whole, whether they trained or not.
    """
    return getattr(model, "head", None) in _NEW_HEADS


def checked_trees(model: nn.Module, family: Family, frozen: Any, delta: Any) -> tuple[Any, Any]:
    """The two trees, after a check that they are those of one `lorafy`, with the adapters of a new head
    merged, and those that PyTorch's model would pass by.
    """
    _check_trees(frozen, delta)
    if not adapters_of(delta):
        raise ValueError(NOTHING_ADAPTED)
    uncalled = uncalled_modules(model, family)
    paths = {
        tensor.path
        for tensor in tensors_of(model, family)
        if has_new_head(model) and family.in_head(tensor.name) or tensor.name.rpartition(".")[0] in uncalled
    }
    return _with_whole(paths, frozen, delta)


def _check_trees(frozen: Any, delta: Any) -> None:
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


def _with_whole(whole: set[str], frozen: Any, delta: Any) -> tuple[Any, Any]:
    """The two trees with every adapter of these leaves merged. An adapter does not hold the weight that it
    adds to, and the weight of a new head is in no other file.
    """
    if not any(leaf.spec.path in whole for leaf in adapters_of(delta).values()):
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
        (None, merge(*pair)) if path in whole and isinstance(pair[1], Adapter) else pair
        for path, pair in zip(paths, pairs, strict=True)
    ]
    treedef = jax.tree.structure(frozen, is_leaf=is_node)
    frozen, delta = (jax.tree.unflatten(treedef, side) for side in zip(*pairs, strict=True))
    return frozen, delta


def frozen_tensors(frozen: Any, tensors: Iterable[Tensor]) -> dict[str, np.ndarray]:
    """Tensors of leaves that do not train, by name; quantised leaves as the values that they stand for."""
    leaves = dict(named_leaves(frozen, is_leaf=is_node))
    return {tensor.name: tensor.to_theirs(value_of(weight_of(leaves[tensor.path]))) for tensor in tensors}


def parts_of(model: nn.Module, family: Family, delta: Any) -> list[Part]:
    """The adapters of `delta`, module by module; a tied embedding's counts for the head too."""
    leaves = _checked_leaves(model, delta)
    modules = {
        (module.matrix.path, module.matrix.layer): module
        for module in modules_of(model, family)
        if module.weight is not None and not module.tied
    }
    parts = []
    for module in modules.values():
        leaf = leaves.get(module.matrix.path)
        if isinstance(leaf, Adapter):
            oriented = _with_pytorch_axes(leaf, module)
            method = oriented.spec.method
            assert isinstance(method, FileMethod), "brought to one by the caller"
            arrays = {name: _in_file(array, module.matrix.layer) for name, array in oriented.arrays.items()}
            parts.append(Part(module, method, arrays))
    return parts + [
        _adapter_of_head(part, head)
        for head in modules_of(model, family)
        if head.tied
        for part in parts
        if part.module.weight == head.weight
    ]


def trained_whole(model: nn.Module, family: Family, delta: Any) -> dict[str, np.ndarray]:
    """Tensors that train without an adapter, heads and biases for example, by name and as files hold them."""
    leaves = _checked_leaves(model, delta)
    return {
        tensor.name: tensor.to_theirs(leaves[tensor.path])
        for tensor in tensors_of(model, family)
        if is_array(leaves.get(tensor.path))
    }


def _checked_leaves(model: nn.Module, tree: Any) -> dict[str, Any]:
    shapes = shapes_of(model)
    leaves = {path: leaf for path, leaf in named_leaves(tree, is_leaf=is_node) if leaf is not None}
    for path, leaf in leaves.items():
        shape = leaf.spec.shape if isinstance(leaf, Adapter) else tuple(leaf.shape)
        if path not in shapes or shape != shapes[path].shape:
            expected = f"shape {shapes[path].shape}" if path in shapes else "no such leaf"
            raise ValueError(
                f"`delta` is not of `model`, whose layers are {layout_of(model)}: at {path!r} `delta` has "
                f"shape {shape}, and the model has {expected}. Pass the two trees that `lorafy` made of this "
                "model's parameters."
            )
    return leaves


def _with_pytorch_axes(leaf: Adapter, module: Module) -> Adapter:
    """The adapter with A along the axes that PyTorch calls `in`. LoRA is the same with its sides exchanged;
    methods that are not are refused.
    """
    spec = leaf.spec
    layers = () if module.matrix.layer is None else ("layer",)
    ours = (*layers, *["in"] * (len(spec.axes) - len(layers) - 1), "out")
    if spec.axes == ours:
        return leaf
    if type(spec.method) is LoRA and spec.method.blocks is None and spec.axes == (*layers, "out", "in"):
        a, b = (jnp.swapaxes(leaf.arrays[name], -1, -2) for name in "ba")
        return Adapter({"a": a, "b": b}, dataclasses.replace(spec, axes=ours))
    raise ValueError(
        f"the adapter of {spec.path!r} was made with the axes {' '.join(spec.axes)!r}, and files have "
        f"{' '.join(ours)!r}: adapt the leaf with `axes={' '.join(ours)!r}`."
    )


def _in_file(array: jax.Array, layer: int | None) -> np.ndarray:
    return np.ascontiguousarray(on_host(array, layer).T)


def _adapter_of_head(part: Part, head: Module) -> Part:
    """The adapter of an embedding as that of the head that is tied to it. PyTorch's heads are (out, in) and
    its embeddings (in, out), so that A and B change places.
    """
    if type(part.method) is not LoRA:
        raise ValueError(
            f"the {type(part.method).__name__} adapter of the embedding acts in the head too, to which it is "
            "tied, and there it would have another form. Load the base with `hf.load(dir, tie='untie')` and "
            "adapt one of the two, or `merge` and save the model with `hf.save`."
        )
    return Part(
        head,
        part.method,
        {"a": np.ascontiguousarray(part.arrays["b"].T), "b": np.ascontiguousarray(part.arrays["a"].T)},
    )
