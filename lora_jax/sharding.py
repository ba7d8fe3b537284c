"""Where each array lives on a mesh: rules for weights, and adapters that follow the weight they belong to.

Mesh axes are named `data` (only the batch is split), `fsdp` (batch and weights) and `tensor` (weights). A's
and B's specs are W's restricted to the axes they share with it; rank and block axes are never split, being
small. The models of `lora_jax.models` have their rules as `partition_rules`. Left out: moving anything; give
`shardings(...)` to `jax.device_put` or `jax.jit`, or a mesh to `hf.load`.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from ._mesh import axis_names, parts
from ._packed.packed import Packed
from ._paths import matches, named_leaves
from ._tree.nodes import Adapter, Fixed, is_node


Rules = Mapping[str, P] | Iterable[tuple[str, P]]


def partition_specs(params: Any, rules: Rules) -> Any:
    """A tree like `params` with the `PartitionSpec` of every leaf.

    ```python
    specs = partition_specs(params, model.partition_rules)
    # {'h': {'0': {'attn': {'c_attn': {'kernel': P('fsdp', 'tensor'), 'bias': P()}, …
    ```

    `rules`: pairs or a mapping of a pattern (as in `targets`) and a spec; the first match wins, no match is
    replicated. A spec with fewer entries than the leaf has axes speaks of the last ones, so one table serves
    layers that are stacked and layers that are not. Raises `ValueError` for a spec with more entries than the
    leaf has axes.
    """
    pairs = list(rules.items() if isinstance(rules, Mapping) else rules)

    def spec_of(path: str, leaf: Any) -> P:
        spec = next((spec for pattern, spec in pairs if matches(pattern, path)), P())
        rank = len(leaf.shape)
        if len(spec) > rank:
            raise ValueError(
                f"`rules` give {path!r} the spec {spec}, of {len(spec)} entries, but its shape is "
                f"{tuple(leaf.shape)}."
            )
        return P(*[None] * (rank - len(spec)), *spec) if len(spec) else P()

    return jax.tree.unflatten(
        jax.tree.structure(params), [spec_of(path, leaf) for path, leaf in named_leaves(params)]
    )


def frozen_specs(frozen: Any, specs: Any) -> Any:
    """A tree like `frozen` with the spec of every array: each weight's own, and its restriction for what a
    method keeps beside it.

    >>> import jax.numpy as jnp, lora_jax
    >>> from jax.sharding import PartitionSpec as P
    >>> frozen = lora_jax.lorafy({"w": jnp.ones((8, 4))}, "w", method=lora_jax.LoRA(rank=2)).frozen
    >>> lora_jax.sharding.frozen_specs(frozen, {"w": P("fsdp", "tensor")}) == {"w": P("fsdp", "tensor")}
    True

    For LoRA, `frozen` equals `params`, and this returns `specs`. The codes of a quantised weight are split
    over all the devices that would share the weight. After `gather_codes`, which knows the mesh, the scales
    of the blocks are split too, where the mesh divides them. The few numbers that are left are on every
    device.
    """

    def spec_of(node: Any, spec: P) -> Any:
        if isinstance(node, Fixed):
            entries = {
                name: P(*(_entry(spec, axis) for axis in axes)) for name, axes in node.array_axes().items()
            }
            shared = {name: array for name, array in node.arrays.items() if name not in entries}
            return Fixed(spec_of(node.weight, spec), entries | shared, node.spec)
        return _packed_specs(node, spec) if isinstance(node, Packed) else None if node is None else spec

    return jax.tree.map(spec_of, frozen, specs, is_leaf=is_node)


def _packed_specs(node: Packed, spec: P) -> Packed:
    stack = len(node.stack)
    entries = [_entry(spec, axis) for axis in range(len(node.shape))]
    # In the order of storage, so that a part of the first axis is one piece of the codes.
    own = tuple(name for entry in entries[stack:][:: -1 if node.turned else 1] for name in axis_names(entry))

    def split(name: str, array: Any) -> bool:
        if not own or name not in node.format.in_order:
            return False
        # Codes are always split: `shardings` raises where the mesh does not divide them. Scales are split
        # where the mesh is known and divides them.
        return (
            name == "codes" or node.at_use is not None and array.shape[-1] % parts(node.at_use.mesh, own) == 0
        )

    def of(name: str, array: Any) -> P:
        if not split(name, array):
            return P(*entries[:stack]) if any(entries[:stack]) and array.ndim >= stack else P()
        # The codes have the shape of the weight, or stand in a row.
        return P(*entries) if array.ndim == len(node.shape) and not node.turned else P(*entries[:stack], own)

    return dataclasses.replace(node, arrays={name: of(name, array) for name, array in node.arrays.items()})


def gather_codes(frozen: Any, specs: Any, mesh: Mesh, axes: Sequence[str] = ("fsdp",)) -> Any:
    """`frozen`, whose quantised weights are sent as codes and scales: each use of one gathers these along
    `axes`, and unpacks then.

    ```python
    frozen = lora_jax.quantize(frozen, "nf4", delta=delta)
    frozen = gather_codes(frozen, specs, mesh)
    frozen = jax.device_put(frozen, shardings(mesh, frozen_specs(frozen, specs), frozen))
    ```

    Without it XLA unpacks what each device has and gathers numbers: four or eight times the bytes of `"nf4"`,
    twice or four times those of `"int8"`. `specs`: of the base. `axes`: those of `mesh` along which a weight
    is whole where it is used, as it is where the batch is split along them too; along the others it stays
    split. The values are the same. For use under `jax.jit` with this mesh; arrays and shapes stay where they
    are. Plain weights, which XLA gathers as it likes, are left alone.
    """
    unknown = [name for name in axes if name not in mesh.shape]
    if unknown:
        raise ValueError(
            f"`axes` has {unknown[0]!r}, and the mesh has the axes {', '.join(map(repr, mesh.shape))}."
        )

    def kept(entry: Any) -> Any:
        return tuple(name for name in axis_names(entry) if name not in axes) or None

    def of(node: Any, spec: P) -> Any:
        if isinstance(node, Fixed):
            return Fixed(of(node.weight, spec), node.arrays, node.spec)
        if not isinstance(node, Packed):
            return node
        own = range(len(node.stack), len(node.shape))
        return dataclasses.replace(
            node, at_use=NamedSharding(mesh, P(*(kept(_entry(spec, axis)) for axis in own)))
        )

    return jax.tree.map(of, frozen, specs, is_leaf=is_node)


def delta_specs(delta: Any, specs: Any) -> Any:
    """A tree like `delta` with the spec of every trainable array: its weight's, restricted to the axes they
    share.

    >>> import jax.numpy as jnp, lora_jax
    >>> from jax.sharding import PartitionSpec as P
    >>> delta = lora_jax.lorafy({"w": jnp.ones((8, 4))}, "w", method=lora_jax.LoRA(rank=2)).delta
    >>> found = lora_jax.sharding.delta_specs(delta, {"w": P("fsdp", "tensor")})["w"].arrays
    >>> found["a"] == P("fsdp", None), found["b"] == P(None, "tensor")
    (True, True)

    For W of `P("fsdp", "tensor")`, A is `P("fsdp", None)` and B `P(None, "tensor")`; a leaf that trains
    itself has W's own.
    """

    def spec_of(node: Any, spec: P) -> Any:
        if node is None:
            return None
        if not isinstance(node, Adapter):
            return spec
        entries = {
            name: P(*(_entry(spec, axis) for axis in axes)) for name, axes in node.array_axes().items()
        }
        return Adapter({**node.arrays, **entries}, node.spec)

    return jax.tree.map(spec_of, delta, specs, is_leaf=is_node)


def _entry(spec: P, axis: int | None) -> Any:
    return spec[axis] if axis is not None and axis < len(spec) else None


def shardings(mesh: Mesh, specs: Any, arrays: Any) -> Any:
    """`NamedSharding`s for `arrays` (or their shapes), a tree like `specs`.

    >>> import jax, jax.numpy as jnp, lora_jax, numpy as np
    >>> from jax.sharding import PartitionSpec as P
    >>> mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("fsdp",))
    >>> lora_jax.sharding.shardings(mesh, {"w": P("fsdp")}, {"w": jnp.ones(4)})["w"].spec == P("fsdp")
    True

    Raises `ValueError` where an axis does not divide, naming the array, its shape and the sizes that would.
    """

    def sharding_of(path: str, spec: P, array: Any) -> NamedSharding:
        for axis, names in enumerate(spec):
            count, size = parts(mesh, names), array.shape[axis]
            if size % count:
                fitting = [n for n in range(1, min(size, mesh.size) + 1) if size % n == 0]
                raise ValueError(
                    f"the mesh {dict(mesh.shape)} does not divide {path!r}: axis {axis} of its shape "
                    f"{tuple(array.shape)} would be split into "
                    f"{count} parts ({names}); {', '.join(map(str, fitting))} would do."
                )
        return NamedSharding(mesh, spec)

    leaves, treedef = jax.tree.flatten(specs)
    placed = [
        sharding_of(path, spec, array)
        for (path, array), spec in zip(named_leaves(arrays), leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, placed)
