"""Quantised weights: `Packed` is what a tree holds in place of an array, `Lazy` what a factored weight holds.

A packed weight stays packed on its way to its use, through `scan`, `checkpoint` and the rest; the views on
that way are noted and done after unpacking, at the use itself, which forgets the result: the backward pass
unpacks again. So no more than one unpacked weight is in memory at a time, and no derivative of a weight
exists.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P

from ._formats import Format
from ._mesh import is_explicit, moved, parts, sharding_like


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["arrays"],
    meta_fields=["format", "own", "dtype", "turned", "at_use"],
)
@dataclasses.dataclass(frozen=True)
class Packed:
    """A quantised weight. `own` is the shape of what is packed together; the axes before it, those of a
    stack, lead in every array, so that slicing all arrays along the first is slicing the weight. `turned`: it
    is stored transposed. `at_use`: how the own axes lie on a mesh when the weight is used, if that is known.
    """

    arrays: dict[str, jax.Array]
    format: Format
    own: tuple[int, ...]
    dtype: Any
    turned: bool = False
    at_use: NamedSharding | None = None

    @classmethod
    def of(cls, weight: Any, format: Format, stack: int | None = None) -> "Packed":
        """`weight`, an array or a shape, packed. Of its axes the first `stack` are those of a stack, or if
        that is not known all but the last two."""
        stack = max(len(weight.shape) - 2, 0) if stack is None else stack
        pack = lambda weight: format.pack(weight, stack)
        arrays = jax.eval_shape(pack, weight) if isinstance(weight, jax.ShapeDtypeStruct) else pack(weight)
        return cls(arrays, format, tuple(weight.shape[stack:]), jnp.dtype(weight.dtype))

    @property
    def stack(self) -> tuple[int, ...]:
        own = _own_ndims(self.format, self.own, self.dtype)
        return min(
            (self.arrays[name].shape[: self.arrays[name].ndim - ndim] for name, ndim in own.items()), key=len
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.stack, *self.own)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many numbers it stands for, not how many bytes it takes."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype).size

    def value(self) -> jax.Array:
        """The weight, unpacked."""

        def unpack(arrays: dict[str, jax.Array]) -> jax.Array:
            arrays = jax.tree.map(_whole, arrays)
            stored = self.format.unpack(arrays, self.own[::-1] if self.turned else self.own, self.dtype)
            return stored.T if self.turned else stored

        for _ in self.stack:
            unpack = jax.vmap(unpack)
        return unpack(self.arrays)

    def gathered(self) -> "Packed":
        """With the codes, and their scales, where `at_use` needs them. Left alone, XLA unpacks what each
        device has, and sends the numbers.
        """
        if self.at_use is None or is_explicit(self.at_use.mesh):  # on which `value` does more
            return self
        found, ndims = dict(self.arrays), _own_ndims(self.format, self.own, self.dtype)
        for name in self.format.in_order:
            spec = tuple(self.at_use.spec)[:: -1 if self.turned else 1]
            if (
                ndims[name] < len(self.own)
                # All in a row, in which a part of the first axis is one piece, and a part of another axis is
                # not.
            ):
                spec = (None,) if found[name].shape[-1] % parts(self.at_use.mesh, spec[0]) else spec[:1]
            # The axes of a stack lie as XLA likes.
            spec = [P.UNCONSTRAINED] * (found[name].ndim - len(spec)) + [*spec]
            found[name] = lax.with_sharding_constraint(found[name], NamedSharding(self.at_use.mesh, P(*spec)))
        return dataclasses.replace(self, arrays=found)

    def along_stack(self, operation: Callable[[jax.Array], jax.Array]) -> "Packed":
        """`operation`, which changes leading axes only, on every array."""
        return dataclasses.replace(self, arrays=jax.tree.map(operation, self.arrays))


def _whole(array: jax.Array) -> jax.Array:
    """On a mesh of explicit axes, whose types know nothing of how a row of codes is split; elsewhere as
    it is.
    """
    return moved(array, sharding_like(array, range(array.ndim), [None] * array.ndim))


def is_packed(leaf: Any) -> bool:
    return isinstance(leaf, Packed)


@functools.lru_cache(maxsize=1024)
def _own_ndims(format: Format, own: tuple[int, ...], dtype: Any) -> dict[str, int]:
    arrays = jax.eval_shape(lambda weight: format.pack(weight, 0), jax.ShapeDtypeStruct(own, dtype))
    return {name: array.ndim for name, array in arrays.items()}


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
    """A view of a weight, `operation(weight, *others)`: now, or if it is packed, when it is used.

    What depends on traced values is done now all the same: nothing that is kept for later may hold them.
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
    """`packed`, which is not there before `beside` is.

    Without it XLA may unpack all weights of a model first, and take the forward pass's for the backward pass.
    """
    barrier = lambda packed, beside: lax.optimization_barrier((packed, beside))[0]
    return lax.platform_dependent(packed, beside, cpu=_depending, default=barrier)


@_after.def_vmap
def _after_one(size: int, batched: tuple, packed: Packed, beside: jax.Array) -> tuple[Packed, Packed]:
    """To wait for one example is enough: to depend on each would be to unpack the weight for each."""
    return _after(packed, beside[0] if batched[1] else beside), batched[0]


def _nothing(beside: jax.Array) -> jax.Array:
    """False, computed from `beside`: that no number is above infinity, XLA does not know. A slice, since
    a reshape gathers what is split.
    """
    if is_explicit(jax.typeof(beside).sharding.mesh):
        return jnp.max(beside) > jnp.inf  # a slice of a part would be a type that there is not
    return lax.slice(beside, (0,) * beside.ndim, (1,) * beside.ndim).reshape(()) > jnp.inf


def _depending(packed: Packed, beside: jax.Array) -> Packed:
    """For the CPU, for which XLA drops barriers early: computed from `beside`."""
    if beside.size == 0:
        return packed
    nothing = _nothing(beside)
    integers = lambda array: jnp.issubdtype(array.dtype, jnp.integer)
    return packed.along_stack(lambda array: array + nothing.astype(array.dtype) if integers(array) else array)


def _apart(function: Callable, packed: Packed, *arrays: jax.Array) -> jax.Array:
    """`function(weight, *arrays)`, in a branch that is always taken: for the same reason, and as unknown
    to XLA for the CPU.
    """

    def branch(packed: Packed, *arrays: jax.Array) -> jax.Array:
        compute = lambda packed, *arrays: function(packed.value(), *arrays)
        result = jax.eval_shape(compute, packed, *arrays)
        scale = next(
            array for array in jax.tree.leaves((arrays, packed)) if jnp.issubdtype(array.dtype, jnp.floating)
        )
        return lax.cond(
            _nothing(scale), lambda *_: jnp.zeros(result.shape, result.dtype), compute, packed, *arrays
        )

    return lax.platform_dependent(
        packed, *arrays, cpu=branch, default=lambda packed, *arrays: function(packed.value(), *arrays)
    )


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
