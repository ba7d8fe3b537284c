"""Equations whose result is a factored weight again.

A rule takes the equation, its operands and, for each operand, the smaller array that it is known to be a
broadcast of.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._lowrank import joins, views
from .._lowrank.factored import Factored, NotAView
from .._packed.lazy import Cast, Lazy, on_weight
from .equation import bind


def _view(method: Callable[..., Factored]) -> Callable:
    return lambda eqn, values, broadcast: [method(eqn, *values)]


def _only_weight(eqn: Any, weight: Factored, *others: Any) -> Factored:
    """A cast, a copy or a sharding constraint of W.

    The factors are cast at their use, and sharded by propagation.
    """
    return weight.replace(
        weight=on_weight(lambda array, *others: bind(eqn, [array, *others])[0], weight.weight, *others)
    )


def _cast(eqn: Any, weight: Factored, *others: Any) -> Factored:
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        raise NotAView
    if isinstance(weight.weight, Lazy):
        return weight.map_weight(Cast(eqn.params["new_dtype"]))
    return _only_weight(eqn, weight, *others)


def _every_part(eqn: Any, weight: Factored, *others: Any) -> Factored:
    return weight.map_parts(lambda array: bind(eqn, [array, *others])[0])


def _barrier(eqn: Any, values: list[Any], broadcast: list[Any]) -> list[Any]:
    """`optimization_barrier` of any number of values.

    All factors go through one barrier together, and each W through its own. The derivative of a barrier is
    that of all its operands: beside factors that train, W would get a gradient.
    """
    leaves, treedef = jax.tree.flatten(
        [value.replace(weight=None, key=None) if isinstance(value, Factored) else value for value in values]
    )
    outputs = jax.tree.unflatten(treedef, lax.optimization_barrier(leaves))
    weights = [
        on_weight(lax.optimization_barrier, value.weight) if isinstance(value, Factored) else None
        for value in values
    ]
    return [
        out.replace(weight=weight, key=value.key) if isinstance(value, Factored) else out
        for out, weight, value in zip(outputs, weights, values, strict=True)
    ]


def _multiplied(eqn: Any, values: list[Any], broadcast: list[Any]) -> list[Any]:
    """`mul` and `div` by a scalar or by an array that varies along few axes, and `neg`."""
    positions = [position for position, value in enumerate(values) if isinstance(value, Factored)]
    if len(positions) != 1 or (eqn.primitive.name == "div" and positions != [0]):
        raise NotAView
    weight = values[positions[0]]
    if len(values) == 1:
        terms = tuple(term.replace(scale=-term.scale) for term in weight.terms)
        return [weight.map_weight(lambda array: bind(eqn, [array])[0]).replace(terms=terms)]
    other = 1 - positions[0]
    factor, dimensions = broadcast[other] or (values[other], range(jnp.ndim(values[other])))
    if eqn.outvars[0].aval.shape != weight.shape:
        raise NotAView
    sizes = dict(zip(dimensions, jnp.shape(factor), strict=True))
    factor = lax.reshape(jnp.asarray(factor), [sizes.get(index, 1) for index in range(len(weight.shape))])
    product = lambda array, other: bind(eqn, [array, other] if positions == [0] else [other, array])[0]
    array = on_weight(product, weight.weight, values[other])
    return [views.rescaled(weight, array, factor, lax.div if eqn.primitive.name == "div" else lax.mul)]


def _concatenated(eqn: Any, values: list[Any], broadcast: list[Any]) -> list[Any]:
    return [joins.concatenated(values, eqn.params["dimension"])]


def _stacked(eqn: Any, values: list[Any], broadcast: list[Any]) -> list[Any]:
    return [joins.stacked(values, eqn.params["axis"])]


def _padded(eqn: Any, weight: Any, value: Any) -> Factored:
    if not isinstance(weight, Factored) or isinstance(value, Factored):
        raise NotAView
    array = on_weight(lambda array, value: bind(eqn, [array, value])[0], weight.weight, value)
    return views.padded(weight, array, eqn.params["padding_config"])


def _all_gathered(eqn: Any, weight: Factored) -> Factored:
    """A weight that a `shard_map` gathers from its shards. Factors that have the axis are gathered too."""
    params = eqn.params
    if not params["tiled"]:
        raise NotAView
    options = {"axis_index_groups": params["axis_index_groups"], "tiled": True}
    gather = lambda part, axis: lax.all_gather(part, params["axis_name"], axis=axis, **options)
    return views.along(
        weight,
        on_weight(lambda array: bind(eqn, [array])[0], weight.weight),
        params["all_gather_dimension"],
        gather,
    )


def _resharded(eqn: Any, weight: Factored) -> Factored:
    """W moves to another explicit sharding, and each factor to that sharding restricted to its axes."""
    array = on_weight(lambda array: bind(eqn, [array])[0], weight.weight)
    mesh, spec = eqn.params["dst_sharding"].mesh, eqn.params["dst_sharding"].spec
    weight = weight.unwindowed()
    reshard = lambda part, spec: jax.sharding.reshard(part, jax.sharding.NamedSharding(mesh, spec))
    bare = weight.replace(weight=None, key=None)
    parts = jax.tree.map(reshard, bare, bare.partition_specs(spec).replace(weight=None))
    return parts.replace(weight=array, key=weight.key)


def _broadcast(eqn: Any, weight: Factored, *dynamic: Any) -> Factored:
    if dynamic:
        raise NotAView
    return views.broadcast(weight, eqn.params["shape"], eqn.params["broadcast_dimensions"])


def _reshaped(eqn: Any, weight: Factored, *dynamic: Any) -> Factored:
    if dynamic or eqn.params.get("dimensions") is not None:
        raise NotAView
    return views.reshaped(weight, eqn.params["new_sizes"])


def _sliced(eqn: Any, weight: Factored) -> Factored:
    return views.sliced(
        weight, eqn.params["start_indices"], eqn.params["limit_indices"], eqn.params["strides"]
    )


def _split(eqn: Any, values: list[Any], broadcast: list[Any]) -> list[Any]:
    (weight,), axis, start, parts = values, eqn.params["axis"], 0, []
    for size in eqn.params["sizes"]:
        starts, stops = [0] * len(weight.shape), list(weight.shape)
        starts[axis], stops[axis] = start, start + size
        parts.append(views.sliced(weight, starts, stops, None))
        start += size
    return parts


def _dynamic_sliced(eqn: Any, weight: Any, *starts: Any) -> Factored:
    return views.dynamic_sliced(weight, starts, eqn.params["slice_sizes"])


VIEWS: dict[str, Callable] = {
    "convert_element_type": _view(_cast),
    "transpose": _view(lambda eqn, weight: views.transposed(weight, eqn.params["permutation"])),
    "reshape": _view(_reshaped),
    "squeeze": _view(lambda eqn, weight: views.squeezed(weight, eqn.params["dimensions"])),
    "expand_dims": _view(
        lambda eqn, weight: views.broadcast(weight, eqn.outvars[0].aval.shape, eqn.params["dimensions"])
    ),
    "broadcast_in_dim": _view(_broadcast),
    "slice": _view(_sliced),
    "dynamic_slice": _view(_dynamic_sliced),
    "split": _split,
    "rev": _view(lambda eqn, weight: views.flipped(weight, eqn.params["dimensions"])),
    "mul": _multiplied,
    "div": _multiplied,
    "neg": _multiplied,
    "copy": _view(_only_weight),
    "reduce_precision": _view(_only_weight),
    "stop_gradient": _view(_every_part),
    "pvary": _view(_every_part),
    "pcast": _view(_every_part),
    "sharding_constraint": _view(_only_weight),
    "reshard": _view(_resharded),
    "all_gather": _view(_all_gathered),
    "concatenate": _concatenated,
    "stack": _stacked,
    "pad": _view(_padded),
    "optimization_barrier": _barrier,
}
