"""What a mesh and a `PartitionSpec` say of one array. Left out: which weight lies where, which is
`sharding.py`.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec as P


def axis_names(entry: Any) -> tuple[str, ...]:
    """The axes of the mesh in one entry of a `PartitionSpec`."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def parts(mesh: Mesh | AbstractMesh, entry: Any) -> int:
    """The number of parts into which one entry of a `PartitionSpec` splits an axis."""
    return math.prod(mesh.shape[name] for name in axis_names(entry))


def is_explicit(mesh: Any) -> bool:
    """Whether JAX must be told how results lie, as on a mesh of `jax.make_mesh`. Else XLA decides."""
    return AxisType.Explicit in mesh.axis_types


def one_device() -> bool:
    """Whether no array can be split: there is one device, and no mesh of others is traced for."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() == 1 and (mesh.empty or mesh.size == 1)


def sharding_like(
    array: jax.Array, labels: Sequence, wanted: Sequence, mesh: Any = None
) -> NamedSharding | None:
    """The sharding of `array` for the wanted labels, whole along those it lacks. None where XLA decides."""
    where = jax.typeof(array).sharding
    mesh = where.mesh if mesh is None else mesh
    if not is_explicit(mesh):
        return None
    entries = dict(zip(labels, where.spec, strict=True))
    return NamedSharding(mesh, P(*(entries.get(label) for label in wanted)))


def moved(array: jax.Array, where: NamedSharding | None) -> jax.Array:
    """`array` as `sharding_like` says."""
    return array if where is None else jax.sharding.reshard(array, where)
