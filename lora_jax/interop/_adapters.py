"""Between our trees and the adapters of PyTorch's libraries, which have one for each module: A is (r, in), B
is (out, r).

What a file calls them, and what else it says, is the business of `peft` and `loralib`; here are the axes, the
stacked layers and the embedding that is also the head.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .._lorafy import Lorafied
from .._lowrank.labels import widened
from .._paths import is_array, named_leaves
from .._tree.method import Grouped, Method, Spec
from .._tree.nodes import Adapter, Fixed, is_node, Shared, weight_of
from ..methods import LoRA
from ..processes import on_host
from ._families import Family, shapes_of, Tensor, tensors_of
from ._modules import Module, modules_of, tied_head
from ._strict import on_device


class Part(NamedTuple):
    """The adapter of one module. `arrays` have our names and, without the layers, our axes in the
    opposite order: a (r, in), b (out, r).
    """

    module: Module
    method: Method
    arrays: dict[str, np.ndarray]


def weights_of(frozen: Any) -> dict[str, Any]:
    """The base's weights by path, without what methods keep beside them; None where the leaf itself
    trains.
    """
    return {path: weight_of(leaf) for path, leaf in named_leaves(frozen, is_leaf=is_node)}


def adapters_of(tree: Any) -> list[Adapter]:
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_node) if isinstance(leaf, Adapter)]


# --- out of our trees ---------------------------------------------------------------------------------------


def parts_of(model: nn.Module, family: Family, delta: Any) -> list[Part]:
    """The adapters of `delta`, module by module; a tied embedding's counts for the head too."""
    leaves = _checked_leaves(model, delta)
    modules = {
        (module.weight.path, module.weight.layer): module
        for module in modules_of(model, family)
        if module.weight is not None and not module.tied
    }
    parts = []
    for module in modules.values():
        leaf = leaves.get(module.weight.path)
        if isinstance(leaf, Adapter):
            oriented = _oriented(leaf, module)
            parts.append(
                Part(
                    module,
                    oriented.spec.method,
                    {name: _theirs(array, module.weight.layer) for name, array in oriented.arrays.items()},
                )
            )
    return parts + [
        _as_head(part, head)
        for head in modules_of(model, family)
        if head.tied
        for part in parts
        if part.module.weight == head.weight
    ]


def trained_whole(model: nn.Module, family: Family, delta: Any) -> dict[str, np.ndarray]:
    """What trains without an adapter: heads, biases. By the tensor's name, in its layout."""
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
            layout = (
                "stacked, `stack_layers(params)`" if model.scan else "not stacked, `unstack_layers(params)`"
            )
            raise ValueError(
                f"`delta` is not of `model`, whose layers are {layout}: at {path!r} it has shape {shape}, "
                f"and the model {expected}"
            )
    return leaves


def _oriented(leaf: Adapter, module: Module) -> Adapter:
    """The adapter with A along the axes that PyTorch calls in. LoRA does not care which side is called
    so; methods that do are refused.
    """
    spec = leaf.spec
    layers = () if module.weight.layer is None else ("layer",)
    ours = (*layers, *["in"] * (len(spec.axes) - len(layers) - 1), "out")
    if spec.axes == ours:
        return leaf
    if type(spec.method) is LoRA and spec.method.blocks is None and spec.axes == (*layers, "out", "in"):
        a, b = (jnp.swapaxes(leaf.arrays[name], -1, -2) for name in "ba")
        return Adapter({"a": a, "b": b}, dataclasses.replace(spec, axes=ours))
    raise ValueError(
        f"the adapter of {spec.path!r} was made with the axes {' '.join(spec.axes)!r}, and files have "
        f"{' '.join(ours)!r}: adapt the leaf with these"
    )


def _theirs(array: jax.Array, layer: int | None) -> np.ndarray:
    return np.ascontiguousarray(on_host(array, layer).T)


def _as_head(part: Part, head: Module) -> Part:
    """The same addition to the embedding, as that of the head that is tied to it: in PyTorch (out, in) is
    (in, out) of an embedding.
    """
    if type(part.method) is not LoRA:
        raise ValueError(
            f"the {type(part.method).__name__} adapter of the embedding acts in the head too, to which it "
            "is tied, and there it would have another form: "
            "load the base with `hf.load(dir, tie='untie')` and adapt one of the two, or `merge` and save "
            "the model with `hf.save`"
        )
    return Part(
        head,
        part.method,
        {"a": np.ascontiguousarray(part.arrays["b"].T), "b": np.ascontiguousarray(part.arrays["a"].T)},
    )


# --- into our trees -----------------------------------------------------------------------------------------


def adapted(
    model: nn.Module,
    family: Family,
    params: Any,
    parts: list[Part],
    whole: Mapping[str, np.ndarray],
    shared: Mapping[str, np.ndarray],
    source: Any,
) -> Lorafied:
    """`params` split as `lorafy` splits them, with these adapters, and these tensors in the place of the
    base's.

    `shared`: fixed arrays that the first leaf of a `Grouped` method has for all. `source` is for errors.
    """
    found = named_leaves(params, is_leaf=is_node)
    leaves = dict(found)
    _check_params(model, leaves)
    nodes: dict[str, tuple[Any, Any]] = {}
    by_path: dict[str, list[Part]] = {}
    head = next((module for module in modules_of(model, family) if module.tied), None)
    for part in _untied(parts, head, source):
        by_path.setdefault(part.module.weight.path, []).append(part)
    specs = {
        path: _spec(path, leaves[path], own, _layers(model, family), source) for path, own in by_path.items()
    }
    for method in dict.fromkeys(spec.method for spec in specs.values() if isinstance(spec.method, Grouped)):
        specs.update(
            (spec.path, spec)
            for spec in method.grouped(tuple(spec for spec in specs.values() if spec.method == method))
        )
    for path, own in by_path.items():
        nodes[path] = _node(leaves[path], specs[path], own, shared)
    for path, tensors in itertools.groupby(
        (tensor for tensor in tensors_of(model, family) if tensor.name in whole), lambda tensor: tensor.path
    ):
        nodes[path] = None, on_device(path, _whole(list(tensors), whole, _layers(model, family), source))
    treedef = jax.tree.structure(params, is_leaf=is_node)
    pairs = [nodes.get(path, (leaf, None)) for path, leaf in found]
    return Lorafied(
        treedef.unflatten([frozen for frozen, _ in pairs]), treedef.unflatten([delta for _, delta in pairs])
    )


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
                "both as `hf.load` returned them, without an outer 'params'"
            )


def _layers(model: nn.Module, family: Family) -> int | None:
    return getattr(model.config, family.layers) if model.scan else None


def _untied(parts: list[Part], head: Module | None, source: Any) -> list[Part]:
    """The parts without that of a tied head, which must say what the embedding's does."""
    if head is None:
        return parts
    pair = [part for part in parts if part.module.weight == head.weight]
    if not pair:
        return parts
    if len(pair) != 2 or not _same(*sorted(pair, key=lambda part: part.module.tied)):
        raise one_sided(source, pair[-1].module.name)
    return [part for part in parts if not part.module.tied]


def _same(embedding: Part, head: Part) -> bool:
    """Whether the two add the same to their common weight."""
    if type(embedding.method) is not LoRA or embedding.method != head.method:
        return False
    return all(np.array_equal(embedding.arrays[one].T, head.arrays[other]) for one, other in ("ab", "ba"))


class OneSided(ValueError):
    """An adapter changes one of two modules that share their weight."""


def one_sided(source: Any, module: str) -> OneSided:
    return OneSided(
        f"{source} changes {module!r} for itself, whose weight is that of another module in this model too: "
        "one array cannot be both. Load the base "
        "with `hf.load(dir, tie='untie')`"
    )


def _spec(path: str, leaf: Any, parts: list[Part], layers: int | None, source: Any) -> Spec:
    """What is adapted at a path, after making sure that a stack of layers has one kind of adapter."""
    methods = {part.method: part.module.name for part in parts}
    if (
        layers is not None
        and parts[0].module.weight.layer is not None
        and (len(methods) > 1 or len(parts) < layers)
    ):
        few = f"adapters in {len(parts)} of {layers} layers ({parts[0].module.name})"
        found = (
            f"different adapters in {' and '.join(list(methods.values())[:2])}" if len(methods) > 1 else few
        )
        raise ValueError(
            f"{source} has {found}, and `model` keeps its layers in one array ({path!r}): load the base "
            "with `hf.load(dir, scan=False)`"
        )
    method, convolved = parts[0].method, parts[0].module.kind == "convolution"
    stacked = () if parts[0].module.weight.layer is None else ("layer",)
    axes = (*stacked, *["in"] * (2 if convolved else 1), "out")
    dtype = next(iter(parts[0].arrays.values())).dtype
    if dtype != widened(leaf.dtype):
        method = dataclasses.replace(method, dtype=jnp.dtype(dtype))
    return Spec(path, tuple(leaf.shape), axes, method)


def _node(weight: Any, spec: Spec, parts: list[Part], shared: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
    ordered = sorted(parts, key=lambda part: part.module.weight.layer or 0)
    stacked = ordered[0].module.weight.layer is not None
    arrays = {
        name: on_device(
            spec.path,
            np.stack([part.arrays[name].T for part in ordered]) if stacked else ordered[0].arrays[name].T,
        )
        for name in ordered[0].arrays
    }
    # The start of the method makes what it keeps beside the weight; its own A and B are the file's.
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


def _whole(
    tensors: list[Tensor], whole: Mapping[str, np.ndarray], layers: int | None, source: Any
) -> np.ndarray:
    arrays = [tensor.to_ours(whole[tensor.name]) for tensor in tensors]
    if tensors[0].layer is None:
        return arrays[0]
    if len(arrays) < layers:
        raise ValueError(
            f"{source} replaces {tensors[0].name!r} in {len(arrays)} of {layers} layers, and `model` keeps "
            "its layers in one array "
            f"({tensors[0].path!r}): load the base with `hf.load(dir, scan=False)`"
        )
    return np.stack(arrays)


def once(
    model: nn.Module, family: Family, whole: Mapping[str, np.ndarray], source: Any
) -> dict[str, np.ndarray]:
    """`whole` with each tensor of the model under one name: a tied head and a bias with two names must
    agree with what they repeat.
    """
    again = [(alias, name) for alias, name in family.aliases.items() if alias in whole]
    if tied_head(model, family) is not None and {family.decoder, family.embedding} & whole.keys():
        again.append((family.decoder, family.embedding))
    for one, other in again:
        if one not in whole or other not in whole or not np.array_equal(whole[one], whole[other]):
            raise one_sided(source, (one if one in whole else other).rpartition(".")[0])
    return {name: array for name, array in whole.items() if name not in {one for one, _ in again}}


# --- fused projections --------------------------------------------------------------------------------------


def with_blocks(parts: list[Part], family: Family) -> list[Part]:
    """Adapters of fused projections whose B is zero outside of a block for each group of ranks, as LoRA of
    those blocks.

    Only exact zeros count, and a group whose block is zero too decides nothing: then all stay as they are.
    """
    count = {part.module.name: family.fused.get(part.module.name.rpartition(".")[2]) for part in parts}
    groups: dict[str, list[Part]] = {}
    for part in parts:
        groups.setdefault(part.module.weight.path, []).append(part)
    result = {}
    for own in groups.values():
        fused = count[own[0].module.name]
        chosen = {
            _blocks(part.arrays["b"], fused) if fused and type(part.method) is LoRA else None for part in own
        }
        blocks = chosen.pop() if len(chosen) == 1 else None
        result.update((part.module.name, part if blocks is None else _blocked(part, blocks)) for part in own)
    return [result[part.module.name] for part in parts]


def _blocks(b: np.ndarray, count: int) -> tuple[bool, ...] | None:
    outs, rank = b.shape
    for blocks in sorted(itertools.product((True, False), repeat=count), key=sum):
        chosen = sum(blocks)
        if chosen and rank % chosen == 0 and outs % count == 0:
            there = (b.reshape(count, outs // count, chosen, rank // chosen) != 0).any((1, 3))
            if (there == np.eye(count, dtype=bool)[:, np.flatnonzero(blocks)]).all():
                return blocks
    return None


def _blocked(part: Part, blocks: tuple[bool, ...]) -> Part:
    chosen, (rank, ins), (outs, _) = sum(blocks), part.arrays["a"].shape, part.arrays["b"].shape
    r, d = rank // chosen, outs // len(blocks)
    a = part.arrays["a"].reshape(chosen, r, ins)
    b = part.arrays["b"].reshape(len(blocks), d, chosen, r)
    b = np.stack([b[block, :, index] for index, block in enumerate(np.flatnonzero(blocks))])
    scale = part.method.scale * r
    method = dataclasses.replace(part.method, rank=r, alpha=plain_number(scale), rs=False, blocks=blocks)
    # As our arrays are, reversed: (blocks, in, r) and (blocks, r, out).
    return Part(part.module, method, {"a": a.transpose(1, 2, 0), "b": b.transpose(1, 2, 0)})


def plain_number(value: float) -> float | int:
    """The integer that a quotient and a product were meant to be, if there is one."""
    near = round(value)
    return near if near and math.isclose(value, near, rel_tol=1e-12) else value
