"""What adapters have learned: sections 7.2 and 7.3 of LoRA (Hu et al., ICLR 2022, arXiv 2106.09685).

`similarity` says how much of the directions of one adapter lies in those of another, of another rank or
another seed. `amplification` says how much an adapter enlarges directions that W has already. W + s·A·B is
never formed, nor is A·B: the decompositions are those of A, of B, or of a product that is r by r.

Both take plain LoRA adapters, with `blocks` too. Every other adapter but DoRA's first becomes one by
`arithmetic.as_lora`.
"""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._lowrank.labels import widened
from ._merge import mergeable
from ._packed.lazy import value_of
from ._paths import named_leaves, path_seed
from ._table import table
from ._tree.method import Spec
from ._tree.nodes import Adapter, is_node, method_of, resolved
from ._tree.pairs import paired
from .arithmetic._leaves import (
    by_layer,
    check_arrays,
    check_plain,
    check_single,
    decomposed,
    matrices_of,
    product,
)
from .methods import LoRA


_OF = ("A", "B", "in", "out")


class _Update(NamedTuple):
    """What one adapter adds, or one of its blocks, whose part of the out axis is `outs`: A and B as matrices,
    layer axes first, and their scale.
    """

    a: jax.Array
    b: jax.Array
    scale: float
    outs: slice


def similarity(delta: Any, other: Any, *, of: str = "A") -> dict[str, jax.Array]:
    """How much of the leading directions of one adapter lies in those of another:
    `φ(i, j) = ‖UᵢᵀVⱼ‖² / min(i, j)`, a squared Frobenius norm, for every i and j (paper, section 7.2,
    equation 4).

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((64, 32))}
    >>> def adapter(rank, seed):
    ...     method, key = lora_jax.LoRA(rank=rank), jax.random.key(seed)
    ...     return lora_jax.lorafy(params, "kernel", method=method, key=key).delta
    >>> phi = lora_jax.subspaces.similarity(adapter(2, seed=0), adapter(8, seed=1))["kernel"]
    >>> phi.shape, bool(phi[1, 7] < 0.5)
    ((2, 8), True)

    The columns of Uᵢ are the first i singular vectors of one, those of Vⱼ the first j of the other. 1 says
    that the smaller of the two subspaces lies in the larger, 0 that they are orthogonal. Random subspaces of
    n dimensions have max(i, j) / n on average. An adapter has 1 with itself, everywhere. Directions of
    singular values that are zero, or equal, are arbitrary.

    Args:
      delta, other: of one base, with LoRA adapters of any rank.
      of: whose singular vectors. `"A"`: those of A on the side of the inputs, as in the paper; `"B"`: those
        of B on the side of the outputs. `"in"` and `"out"`: those of ΔW on either side, which do not depend
        on how A and B share the product.

    Returns:
      φ(i, j) at `[i - 1, j - 1]`, (rank of `delta`, rank of `other`), layer axes first, by the paths that
      have an adapter in both. A block has a path of its own, such as `c_attn/kernel[2]`.

    Raises:
      ValueError: `of` is another word; no path has an adapter in both, or the weights differ; an adapter that
        is not LoRA, or stacked; B is zero, as before training, where its directions are asked for.
      TypeError: the deltas hold shapes.
    """
    check_arrays("similarity(delta, other)", delta=delta, other=other)
    if of not in _OF:
        raise ValueError(f"`of` is {of!r}; pass one of {', '.join(map(repr, _OF))}.")
    ours, theirs = _updates_of(delta), _updates_of(other)
    shared = [path for path in ours if path in theirs]
    if not shared:
        raise ValueError(
            f"`delta` and `other` have no adapter of one leaf: {_some(ours)} here, {_some(theirs)} there. "
            "Pass adapters of one base and of the same targets."
        )
    found = {}
    for path in shared:
        (one, spec), (two, its) = ours[path], theirs[path]
        if (spec.shape, spec.axes) != (its.shape, its.axes):
            raise ValueError(
                f"`other` is of another base: at {path!r} its weight is {its.shape} with axes "
                f"{' '.join(its.axes)!r}, and that of `delta` {spec.shape} with {' '.join(spec.axes)!r}."
            )
        for argument, update in (("delta", one), ("other", two)):
            if of != "A":
                _check_trained(argument, path, update)
        found[path] = _phi(one.a, one.b, two.a, two.b, of)
    return found


@dataclasses.dataclass(frozen=True)
class AmplifiedLeaf:
    """What an adapter does to directions of its W. All are Frobenius norms: of ΔW, of W, and of `UᵀWV` with
    the leading singular vectors of ΔW, with those of W itself, and with random ones. `layer` is the index of
    a stacked weight's layer.

    >>> from lora_jax.subspaces import AmplifiedLeaf
    >>> norms = {"update": 6.0, "weight": 14.0, "along_update": 3.0, "along_weight": 8.0, "along_random": 0.5}
    >>> AmplifiedLeaf("kernel", layer=(), rank=1, **norms).factor
    2.0
    """

    path: str
    layer: tuple[int, ...]
    rank: int
    update: float
    weight: float
    along_update: float
    along_weight: float | None
    along_random: float

    @property
    def factor(self) -> float:
        """`‖ΔW‖ / ‖UᵀWV‖`, by which the directions of ΔW are amplified."""
        return self.update / self.along_update if self.along_update else math.inf


class Amplification(list[AmplifiedLeaf]):
    """One `AmplifiedLeaf` an adapter, and layer of a stacked weight. Prints as a table.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> frozen, delta = lora_jax.lorafy({"w": jnp.eye(8)}, "w", method=lora_jax.LoRA(rank=1))
    >>> delta["w"].arrays.update(b=jnp.ones((1, 8)))
    >>> print(str(lora_jax.subspaces.amplification(frozen, delta)).split()[0])
    leaf
    """

    def __str__(self) -> str:
        rows = [
            (
                ", layer ".join([leaf.path, *(["/".join(map(str, leaf.layer))] if leaf.layer else [])]),
                str(leaf.rank),
                *(f"{getattr(leaf, name):.4g}" for name in ("update", "weight")),
                f"{leaf.along_update:.4g}",
                "-" if leaf.along_weight is None else f"{leaf.along_weight:.4g}",
                f"{leaf.along_random:.4g}",
                f"{leaf.factor:.4g}",
            )
            for leaf in self
        ]
        head = ("leaf", "rank", "|ΔW|", "|W|", "|UᵀWV| of ΔW", "of W", "random", "factor")
        return table(head, rows, right=range(1, len(head)))

    __repr__ = __str__


def amplification(
    frozen: Any, delta: Any, *, leading: bool = True, key: jax.Array | None = None
) -> Amplification:
    """By how much each adapter amplifies directions that its W has already: `‖ΔW‖ / ‖UᵀWV‖`, with the
    singular vectors of ΔW in U and V (paper, section 7.3, table 7).

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.diag(jnp.arange(1.0, 9.0))}
    >>> frozen, delta = lora_jax.lorafy(params, "kernel", method=lora_jax.LoRA(rank=1, alpha=1))
    >>> delta["kernel"].arrays.update(a=jnp.eye(8)[:, 2:3], b=6 * jnp.eye(8)[2:3])
    >>> lora_jax.subspaces.amplification(frozen, delta)[0].factor  # from 3 to 9
    2.0

    `‖UᵀWV‖` is what W has along the directions of ΔW. Beside it are the same of W's own leading directions,
    the most that so many directions can have, and of random ones. A large factor and a small `‖UᵀWV‖` say
    what the paper found: ΔW enlarges directions that W has and does not emphasise.

    A packed W is unpacked, one leaf at a time.

    Args:
      frozen, delta: the two trees of `lorafy`, or later states of them.
      leading: whether to decompose W too, for its own leading directions: some in·out·min(in, out)
        operations, which are most of the time. False leaves `along_weight` None.
      key: for the random directions; `jax.random.key(0)` if None. Folded with each path.

    Returns:
      An `Amplification`: a list of `AmplifiedLeaf` that prints as a table.

    Raises:
      ValueError: the trees do not belong together; an adapter that is not LoRA, or stacked; B is zero, as
        before training.
      TypeError: the trees hold shapes.
    """
    check_arrays("amplification(frozen, delta)", frozen=frozen, delta=delta)
    key = jax.random.key(0) if key is None else key
    found = Amplification()

    def add(leaf: Any, other: Any) -> None:
        if not isinstance(other, Adapter):
            return
        for path, (update, _) in _updates(other.spec.path, other).items():
            _check_trained("delta", path, update)
            weight = _matrix(mergeable(leaf, other).weight, other.spec)[..., update.outs]
            drawn = jax.random.fold_in(key, path_seed(path))
            layers = weight.shape[:-2]
            keys = jax.random.split(drawn, layers) if layers else drawn
            norms = np.asarray(_norms(weight, update.a, update.b, update.scale, keys, leading))
            rank = min(update.a.shape[-1], *weight.shape[-2:])
            for layer in np.ndindex(*layers):
                added, whole, along_update, own_directions, random = map(float, norms[layer])
                along_weight = own_directions if leading else None
                found.append(
                    AmplifiedLeaf(path, layer, rank, added, whole, along_update, along_weight, random)
                )

    paired(add, frozen, delta)
    return found


def _updates_of(delta: Any) -> dict[str, tuple[_Update, Spec]]:
    paths = [path for path, _ in named_leaves(delta, is_leaf=is_node)]
    leaves = resolved(jax.tree.leaves(delta, is_leaf=is_node))
    found: dict[str, tuple[_Update, Spec]] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        if isinstance(leaf, Adapter):
            found |= _updates(path, leaf)
    return found


def _updates(path: str, leaf: Adapter) -> dict[str, tuple[_Update, Spec]]:
    """What the adapter adds, by its path; of several blocks each, by its path and its place."""
    spec, method = leaf.spec, leaf.spec.method
    if not isinstance(method, LoRA) or method.blocks is None:
        check_plain(path, leaf)
        return {path: (_Update(*matrices_of(leaf), method_of(leaf, LoRA).scale, slice(None)), spec)}
    check_single(path, leaf)
    axis, (out,), (size,) = len(spec.sizes("layer")), spec.axis_indices("out"), spec.sizes("out")
    size //= len(method.blocks)
    shape = (*spec.shape[:out], size, *spec.shape[out + 1 :])
    own = dataclasses.replace(spec, shape=shape, method=dataclasses.replace(method, blocks=None))
    found = {}
    for place, block in enumerate(index for index, adapted in enumerate(method.blocks) if adapted):
        arrays = {
            name: lax.index_in_dim(array, place, axis, keepdims=False) for name, array in leaf.arrays.items()
        }
        outs = slice(block * size, (block + 1) * size)
        found[f"{path}[{block}]"] = (_Update(*matrices_of(Adapter(arrays, own)), method.scale, outs), own)
    return found


def _check_trained(argument: str, path: str, update: _Update) -> None:
    if not isinstance(update.b, jax.core.Tracer) and not bool(jnp.any(update.b)):
        raise ValueError(
            f"`{argument}` adds nothing at {path!r}, where B is zero, as before training: it has no "
            "directions "
            'yet. Pass a trained one, or take `of="A"` of `similarity`.'
        )


def _some(paths: Any) -> str:
    shown = ", ".join(map(repr, list(paths)[:3]))
    return shown + (f" and {len(paths) - 3} more" if len(paths) > 3 else "") or "none"


def _matrix(weight: Any, spec: Spec) -> jax.Array:
    """W with its layer axes first, and one in and one out axis."""
    layers, ins, outs = (spec.sizes(word) for word in ("layer", "in", "out"))
    order = [axis for word in ("layer", "in", "out") for axis in spec.axis_indices(word)]
    return jnp.transpose(value_of(weight), order).reshape(*layers, math.prod(ins), math.prod(outs))


def _directions(a: jax.Array, b: jax.Array, of: str) -> jax.Array:
    """Orthonormal columns, those of the largest singular values first."""
    wide = widened(a.dtype)
    if of == "A":
        return jnp.linalg.svd(a.astype(wide), full_matrices=False)[0]
    if of == "B":
        return jnp.linalg.svd(b.astype(wide).T, full_matrices=False)[0]
    u, _, v = decomposed(a, b, 1.0)
    return u if of == "in" else v.T


@partial(jax.jit, static_argnums=4)
def _phi(a: jax.Array, b: jax.Array, other_a: jax.Array, other_b: jax.Array, of: str) -> jax.Array:
    def of_layer(a: jax.Array, b: jax.Array, other_a: jax.Array, other_b: jax.Array) -> jax.Array:
        ours, theirs = _directions(a, b, of), _directions(other_a, other_b, of)
        dtype = jnp.promote_types(ours.dtype, theirs.dtype)
        squares = jnp.square(product(ours.astype(dtype).T, theirs.astype(dtype)))
        counts = [jnp.arange(1, size + 1, dtype=dtype) for size in squares.shape]
        smaller = jnp.minimum(counts[0][:, None], counts[1][None, :])
        return jnp.cumsum(jnp.cumsum(squares, axis=0), axis=1) / smaller

    return by_layer(of_layer, a.ndim - 2, a, b, other_a, other_b)


@partial(jax.jit, static_argnums=(3, 5))
def _norms(
    weight: jax.Array, a: jax.Array, b: jax.Array, scale: float, key: jax.Array, leading: bool
) -> jax.Array:
    """Of ΔW, of W, and of `UᵀWV` with the directions of ΔW, of W and of neither."""
    norm = lambda array: jnp.sqrt(jnp.sum(jnp.square(array)))

    def of_layer(weight: jax.Array, a: jax.Array, b: jax.Array, key: jax.Array) -> jax.Array:
        wide = jnp.promote_types(widened(weight.dtype), widened(a.dtype))
        weight = weight.astype(wide)
        u, values, v = decomposed(a.astype(wide), b.astype(wide), scale)
        count = len(values)
        drawn = [
            jnp.linalg.qr(jax.random.normal(own, (size, count), wide))[0]
            for own, size in zip(jax.random.split(key), weight.shape, strict=True)
        ]
        along = lambda u, v: norm(product(product(u.T, weight), v))
        own = jnp.linalg.svd(weight, compute_uv=False)[:count] if leading else jnp.zeros(1, wide)
        return jnp.stack([norm(values), norm(weight), along(u, v.T), norm(own), along(*drawn)])

    return by_layer(of_layer, weight.ndim - 2, weight, a, b, key)
