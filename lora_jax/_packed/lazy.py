"""The view of a packed weight until it is used, and what computes with it.

A packed weight stays packed on its way to its use, through `scan`, `checkpoint` and the rest. The views on
that way are noted, and done after unpacking, at the use itself. The use forgets the result, and the backward
pass unpacks again. So one unpacked weight at most is in memory, and no derivative of a weight exists.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._mesh import is_explicit
from .packed import Packed


@dataclasses.dataclass(frozen=True)
class Cast:
    """A cast, the one operation that is the same on a stack and on its layers."""

    dtype: Any

    def __call__(self, array: jax.Array) -> jax.Array:
        return lax.convert_element_type(array, self.dtype)


@partial(
    jax.tree_util.register_dataclass, data_fields=["packed"], meta_fields=["operations", "shape", "dtype"]
)
@dataclasses.dataclass(frozen=True)
class Lazy:
    """The view of a packed weight that `operations` make of it once it is unpacked."""

    packed: Packed
    operations: tuple[Callable, ...]
    shape: tuple[int, ...]
    dtype: Any

    @classmethod
    def of(cls, packed: Packed, operations: tuple[Callable, ...] = ()) -> "Lazy":
        shape = jax.ShapeDtypeStruct(packed.shape, packed.dtype)
        for operation in operations:
            shape = jax.eval_shape(operation, shape)
        return cls(packed, operations, tuple(shape.shape), jnp.dtype(shape.dtype))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return jax.ShapeDtypeStruct(self.shape, self.dtype).size

    def value(self) -> jax.Array:
        array = self.packed.value()
        for operation in self.operations:
            array = operation(array)
        return array

    def then(self, operation: Callable[[jax.Array], jax.Array]) -> "Lazy":
        result = jax.eval_shape(operation, jax.ShapeDtypeStruct(self.shape, self.dtype))
        return dataclasses.replace(
            self,
            operations=(*self.operations, operation),
            shape=tuple(result.shape),
            dtype=jnp.dtype(result.dtype),
        )

    def leads(self, axes: Sequence[int]) -> bool:
        """Whether these axes of the view are stacked ones, along which the packed arrays can be cut
        themselves.
        """
        only_casts = all(isinstance(operation, Cast) for operation in self.operations)
        return only_casts and all(axis < len(self.packed.stack) for axis in axes)

    def along_stack(self, operation: Callable[[jax.Array], jax.Array]) -> "Lazy":
        return Lazy.of(self.packed.along_stack(operation), self.operations)


def on_weight(operation: Callable[..., jax.Array], weight: Any, *others: Any) -> Any:
    """A view of a weight, `operation(weight, *others)`. Of a packed weight it is done when that is used.

    A view that depends on traced values is done at once: what is kept for later may hold no tracer.
    """
    if not isinstance(weight, Lazy):
        return operation(weight, *others)
    if any(isinstance(other, jax.core.Tracer) for other in others):
        return operation(weight.value(), *others)
    return weight.then(lambda array: operation(array, *others))


def value_of(weight: Any) -> jax.Array:
    return weight.value() if isinstance(weight, Lazy | Packed) else weight


def used(use: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, weight: Any) -> jax.Array:
    """`use(x, weight)`, which is linear in `x`, with a packed weight unpacked for this alone, and again for
    the backward pass.

    Like everything with a derivative of its own, it has no forward-mode one.
    """
    if not isinstance(weight, Lazy):
        return use(x, weight)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)

    def unpacked(packed: Packed, beside: jax.Array) -> jax.Array:
        return dataclasses.replace(
            weight, packed=_after(packed, lax.stop_gradient(beside)).gathered()
        ).value()

    @jax.custom_vjp
    def product(x: jax.Array, packed: Packed) -> jax.Array:
        return use(x, unpacked(packed, x))

    def backward(packed: Packed, cotangent: jax.Array) -> tuple[jax.Array, None]:
        array = unpacked(packed, cotangent)
        (result,) = jax.linear_transpose(lambda x: use(x, array), shape)(cotangent)
        return result, None

    product.defvjp(lambda x, packed: (product(x, packed), packed), backward)
    return product(x, weight.packed)


@jax.custom_batching.custom_vmap
def _after(packed: Packed, beside: jax.Array) -> Packed:
    """`packed`, which must wait for `beside`.

    Without this XLA may unpack all weights of a model first, and keep those of the forward pass for the
    backward pass.
    """
    barrier = lambda packed, beside: lax.optimization_barrier((packed, beside))[0]
    return lax.platform_dependent(packed, beside, cpu=_depending, default=barrier)


@_after.def_vmap
def _after_one(size: int, batched: tuple, packed: Packed, beside: jax.Array) -> tuple[Packed, Packed]:
    """One example is enough to wait for. To depend on each would be to unpack the weight for each."""
    return _after(packed, beside[0] if batched[1] else beside), batched[0]


def _false_from(beside: jax.Array) -> jax.Array:
    """False, computed from `beside`: XLA does not know that no number is above infinity.

    One entry is enough. It is a slice, because a reshape of the whole gathers what is split.
    """
    if is_explicit(jax.typeof(beside).sharding.mesh):
        return jnp.max(beside) > jnp.inf  # there is no type for one entry of a split array
    return lax.slice(beside, (0,) * beside.ndim, (1,) * beside.ndim).reshape(()) > jnp.inf


def _depending(packed: Packed, beside: jax.Array) -> Packed:
    """The same on the CPU, for which XLA drops barriers early: `packed`, computed from `beside`."""
    if beside.size == 0:
        return packed
    false = _false_from(beside)
    integers = lambda array: jnp.issubdtype(array.dtype, jnp.integer)
    return packed.along_stack(lambda array: array + false.astype(array.dtype) if integers(array) else array)


def _apart(function: Callable, packed: Packed, *arrays: jax.Array) -> jax.Array:
    """`function(weight, *arrays)`, on the CPU in a branch that is always taken.

    XLA for the CPU does not know that it is. So it cannot move the unpacking out of the branch.
    """

    def branch(packed: Packed, *arrays: jax.Array) -> jax.Array:
        compute = lambda packed, *arrays: function(packed.value(), *arrays)
        result = jax.eval_shape(compute, packed, *arrays)
        return lax.cond(
            _false_from(_floating((arrays, packed))),
            lambda *_: jnp.zeros(result.shape, result.dtype),
            compute,
            packed,
            *arrays,
        )

    return lax.platform_dependent(
        packed, *arrays, cpu=branch, default=lambda packed, *arrays: function(packed.value(), *arrays)
    )


def _floating(tree: Any) -> jax.Array:
    """Some floating-point array of a tree, or bytes of it taken for one."""
    leaves = jax.tree.leaves(tree)
    floating = (array for array in leaves if jnp.issubdtype(array.dtype, jnp.floating))
    first = next(floating, None)
    return lax.bitcast_convert_type(leaves[0].reshape(-1)[:2], jnp.float16) if first is None else first


def layer_by_layer(function: Callable, weight: Any, layers: Sequence[int], *arrays: jax.Array) -> jax.Array:
    """`function(weight, *arrays)` of each layer, one after the other, stacked as the layers are.

    `layers` are the stacked axes of the weight; they lead in `arrays`. Whatever a layer's weight is cast or
    unpacked to is gone before the next.
    """
    if not layers:
        return _apart(function, weight, *arrays) if isinstance(weight, Packed) else function(weight, *arrays)
    sizes = tuple(weight.shape[axis] for axis in layers)
    if isinstance(weight, Packed) and tuple(layers) != tuple(range(len(layers))):
        weight = value_of(weight)
    if not isinstance(weight, Packed):
        weight = jnp.moveaxis(weight, layers, range(len(layers)))
    flat = lambda array: array.reshape(-1, *array.shape[len(sizes) :])
    rows = jax.tree.map(flat, (weight, arrays))
    result = lax.map(lambda row: function(value_of(row[0]), *row[1]), rows)
    return result.reshape(*sizes, *result.shape[1:])
