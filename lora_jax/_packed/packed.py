"""What a tree holds in place of an array that is quantised: packed arrays, and what they stand for."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P

from .._mesh import is_explicit, moved, parts, sharding_like
from .formats import Format


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

    >>> import jax.numpy as jnp, lora_jax
    >>> packed = lora_jax.quantize({"kernel": jnp.ones((64, 32))}, "nf4", targets="kernel")["kernel"]
    >>> isinstance(packed, lora_jax.quant.Packed), packed.shape, str(packed.dtype)
    (True, (64, 32), 'float32')
    """

    arrays: dict[str, Any]  # in a tree of specs, what stands for the array
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
        own = self.format.ndims(self.own)
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
        """The codes and their scales, where `at_use` needs them.

        XLA by itself unpacks what each device has, and sends the numbers.
        """
        if self.at_use is None or is_explicit(self.at_use.mesh):  # there `value` makes the codes whole
            return self
        found, ndims = dict(self.arrays), self.format.ndims(self.own)
        for name in self.format.in_order:
            spec = tuple(self.at_use.spec)[:: -1 if self.turned else 1]
            if ndims[name] < len(self.own):
                # All codes stand in a row, in which a part of the first axis alone is one piece.
                spec = (None,) if found[name].shape[-1] % parts(self.at_use.mesh, spec[0]) else spec[:1]
            # XLA chooses how the axes of a stack lie.
            free = [P.UNCONSTRAINED] * (found[name].ndim - len(spec))
            where = NamedSharding(self.at_use.mesh, P(*free, *spec))
            found[name] = lax.with_sharding_constraint(found[name], where)
        return dataclasses.replace(self, arrays=found)

    def along_stack(self, operation: Callable[[jax.Array], jax.Array]) -> "Packed":
        """`operation`, which changes leading axes only, on every array."""
        return dataclasses.replace(self, arrays=jax.tree.map(operation, self.arrays))


def _whole(array: jax.Array) -> jax.Array:
    """The whole array on a mesh of explicit axes, whose types cannot say how a row of codes is split.

    On other meshes it stays as it is.
    """
    return moved(array, sharding_like(array, range(array.ndim), [None] * array.ndim))


def is_packed(leaf: Any) -> bool:
    return isinstance(leaf, Packed)
