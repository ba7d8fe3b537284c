"""From the adapters in a file to the two trees of `lorafy`, whatever the format.

Here layers are stacked, and the embedding that is also the head is found to be changed on both sides or on
one.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .._lorafy import Lorafied
from .._lowrank.labels import widened
from .._packed.packed import is_packed
from .._paths import is_array, is_shape, named_leaves
from .._tree.method import grouped, Spec
from .._tree.nodes import Adapter, Fixed, is_node, Shared
from ..methods import LoRA
from ..processes import agree
from ._adapters import Part
from ._families import Family
from ._modules import Module, modules_of, tied_head
from ._strict import on_device
from ._tensors import shapes_of, Tensor, tensors_of


class OneSided(ValueError):
    """An adapter changes one of two modules that share their weight.

    ```python
    try:
        frozen, delta = peft.load("adapter", model, params)
    except OneSided:
        model, params = hf.load("base", tie="untie")  # an array for each of the two
        frozen, delta = peft.load("adapter", model, params)
    ```
    """


def adapted(
    model: nn.Module,
    family: Family,
    params: Any,
    parts: list[Part],
    whole: Mapping[str, np.ndarray],
    shared: Mapping[str, np.ndarray],
    source: Any,
) -> Lorafied:
    """`params` split as `lorafy` splits them, with the adapters of a file.

    Args:
      parts: the adapters, module by module.
      whole: tensors that take the place of the base's and train, by name. Those that the model has once, and
        files twice, must be equal.
      shared: fixed arrays that the first leaf of a method has for all of its leaves.
      source: the file's name, for errors.
    """
    agree()
    found = named_leaves(params, is_leaf=is_node)
    leaves = dict(found)
    _check_params(model, leaves)
    whole = _under_one_name(model, family, whole, leaves, source)
    nodes: dict[str, tuple[Any, Any]] = {}
    by_path: dict[str, list[Part]] = {}
    head = next((module for module in modules_of(model, family) if module.tied), None)
    for part in _untied(parts, head, source):
        by_path.setdefault(part.module.matrix.path, []).append(part)
    layers = _layers(model, family)
    specs = grouped(_spec(path, leaves[path], own, layers, source) for path, own in by_path.items())
    for path, own in by_path.items():
        nodes[path] = _node(leaves[path], specs[path], own, shared)
    for path, tensors in itertools.groupby(
        (tensor for tensor in tensors_of(model, family) if tensor.name in whole), lambda tensor: tensor.path
    ):
        trained = _trained_leaf(list(tensors), whole, layers, source)
        nodes[path] = None, on_device(path, trained)
    treedef = jax.tree.structure(params, is_leaf=is_node)
    pairs = [nodes.get(path, (leaf, None)) for path, leaf in found]
    return Lorafied(*(jax.tree.unflatten(treedef, side) for side in zip(*pairs, strict=True)))


def _check_params(model: nn.Module, leaves: dict[str, Any]) -> None:
    for path, shape in shapes_of(model).items():
        if not is_array(leaves.get(path)) or tuple(leaves[path].shape) != shape.shape:
            has = (
                f"has shape {tuple(leaves[path].shape)}"
                if is_array(leaves.get(path))
                else "is missing"
                if path not in leaves
                else "is no plain array"
            )
            raise ValueError(
                f"`params` are not those of `model`: {path!r} {has} and must have shape {shape.shape}; pass "
                "both as `hf.load` returned them, without an outer 'params'."
            )


def _layers(model: nn.Module, family: Family) -> int | None:
    """The number of layers in a stack; None for a model whose layers are not stacked."""
    return getattr(model.config, family.layers) if model.scan else None


def _untied(parts: list[Part], head: Module | None, source: Any) -> list[Part]:
    """The parts without that of a tied head, which must add to the weight what the embedding's part adds."""
    if head is None:
        return parts
    pair = [part for part in parts if part.module.weight == head.weight]
    if not pair:
        return parts
    if len(pair) != 2 or not _same(*sorted(pair, key=lambda part: part.module.tied)):
        raise _one_sided(source, pair[-1].module.name)
    return [part for part in parts if not part.module.tied]


def _same(embedding: Part, head: Part) -> bool:
    """Whether the two parts add the same matrix to their common weight."""
    if type(embedding.method) is not LoRA or embedding.method != head.method:
        return False
    return all(np.array_equal(embedding.arrays[one].T, head.arrays[other]) for one, other in ("ab", "ba"))


def _one_sided(source: Any, module: str) -> OneSided:
    return OneSided(
        f"{source} changes {module!r} for itself, and in this model the weight of that module is also "
        "another module's: one array cannot be both. Load the base with `hf.load(dir, tie='untie')`."
    )


def _spec(path: str, leaf: Any, parts: list[Part], layers: int | None, source: Any) -> Spec:
    """The spec of an adapted path, after a check that all layers of a stack have the same kind of adapter."""
    methods = {part.method: part.module.name for part in parts}
    if (
        layers is not None
        and parts[0].module.matrix.layer is not None
        and (len(methods) > 1 or len(parts) < layers)
    ):
        few = f"adapters in {len(parts)} of {layers} layers ({parts[0].module.name})"
        found = (
            f"different adapters in {' and '.join(list(methods.values())[:2])}" if len(methods) > 1 else few
        )
        raise ValueError(
            f"{source} has {found}, and `model` keeps its layers in one array ({path!r}): load the base with "
            "`hf.load(dir, scan=False)`."
        )
    method, convolved = parts[0].method, parts[0].module.kind == "convolution"
    stacked = () if parts[0].module.matrix.layer is None else ("layer",)
    axes = (*stacked, *["in"] * (2 if convolved else 1), "out")
    dtype = next(iter(parts[0].arrays.values())).dtype
    if dtype != widened(leaf.dtype):
        method = dataclasses.replace(method, dtype=jnp.dtype(dtype))
    return Spec(path, tuple(leaf.shape), axes, method)


def _node(weight: Any, spec: Spec, parts: list[Part], shared: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
    ordered = sorted(parts, key=lambda part: part.module.matrix.layer or 0)
    stacked = ordered[0].module.matrix.layer is not None
    arrays = {
        name: on_device(
            spec.path,
            np.stack([part.arrays[name].T for part in ordered]) if stacked else ordered[0].arrays[name].T,
        )
        for name in ordered[0].arrays
    }
    # `split` makes the arrays that the method keeps beside the weight; its new A and B are not used.
    frozen, _ = spec.method.split(weight, spec, jax.random.key(0))
    if isinstance(frozen, Fixed):
        fixed = {
            name: array
            if isinstance(array, Shared) or name not in shared
            else on_device(spec.path, shared[name])
            for name, array in frozen.arrays.items()
        }
        frozen = dataclasses.replace(frozen, arrays=fixed)
    return frozen, Adapter(arrays, spec)


def _trained_leaf(
    tensors: list[Tensor], whole: Mapping[str, np.ndarray], layers: int | None, source: Any
) -> np.ndarray:
    arrays = [tensor.to_ours(whole[tensor.name]) for tensor in tensors]
    if tensors[0].layer is None:
        return arrays[0]
    if layers is not None and len(arrays) < layers:
        raise ValueError(
            f"{source} replaces {tensors[0].name!r} in {len(arrays)} of {layers} layers, and `model` keeps "
            f"its layers in one array ({tensors[0].path!r}): load the base with `hf.load(dir, scan=False)`."
        )
    return np.stack(arrays)


def _under_one_name(
    model: nn.Module, family: Family, whole: Mapping[str, np.ndarray], leaves: Mapping[str, Any], source: Any
) -> dict[str, np.ndarray]:
    """`whole` with each tensor of the model under one name. A tied head must equal the embedding, that of the
    file or else that of the base.

    A bias with two names is one array in PyTorch where the head is tied. Elsewhere it is two, and the second
    is the one that the head adds.
    """
    found = dict(whole)
    for alias, name in family.aliases.items():
        if alias in found:
            array = found.pop(alias)
            earlier, found[name] = found.get(name, array), array
            if model.config.tie_word_embeddings and not np.array_equal(array, earlier):
                raise ValueError(
                    f"{source} has two different values of one bias, {name!r} and {alias!r}: save the "
                    "adapter again."
                )
    one, other = family.decoder, family.embedding
    if tied_head(model, family) is not None and {one, other} & found.keys():
        embedding = found[other] if other in found else base_value(model, family, other, leaves)
        if one not in found or embedding is None or not np.array_equal(found[one], embedding):
            raise _one_sided(source, (one if one in found else other).rpartition(".")[0])
        del found[one]
    return found


def base_value(model: nn.Module, family: Family, name: str, leaves: Mapping[str, Any]) -> np.ndarray | None:
    """A tensor of the base as files hold it; None where it has no values here, or others."""
    tensor = next(tensor for tensor in tensors_of(model, family) if tensor.name == name)
    leaf = leaves.get(tensor.path)
    return None if leaf is None or is_shape(leaf) or is_packed(leaf) else tensor.to_theirs(leaf)
