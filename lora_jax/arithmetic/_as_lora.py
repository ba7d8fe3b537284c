"""`as_lora`: the adapters of other methods as LoRA adapters."""

import functools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._lorafy import Lorafied
from .._lowrank.factored import Term
from .._lowrank.labels import widened
from .._merge import mergeable
from .._tree.canonical import factored
from .._tree.nodes import Adapted, Adapter, Fixed, is_node, weight_of
from .._tree.pairs import paired
from ._leaves import check_arrays, is_plain, lora_leaf


def as_lora(frozen: Any, delta: Any) -> Lorafied:
    """Every adapter as a plain `LoRA` adapter that computes the same, and the base without what other methods
    keep in it.

    >>> import jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((64, 32))}
    >>> frozen, delta = lora_jax.lorafy(params, "kernel", method=lora_jax.PiSSA(rank=4))
    >>> frozen, delta = lora_jax.arithmetic.as_lora(frozen, delta)
    >>> frozen["kernel"].shape, delta["kernel"].spec.method.rank
    ((64, 32), 8)

    Exact: an adapter adds a sum of products s·A·B, whose A's and B's are put side by side; diagonals go into
    B, and products that have one A become one. So AdaLoRA, VeRA, DyLoRA and LoRA-FA keep their rank. PiSSA
    and Delta-LoRA get 2r, Delta-LoRA `[A, A_s]` and `[(1 + ratio)·B; −ratio·B_s]`, with twice the alpha. n
    `blocks` make n·r, block-diagonal. This rank may be above min(in, out); `compress` lowers it. Every leaf
    has an A and a B of its own, and both train from here on.

    Plain LoRA adapters and leaves that train themselves are left as they are, and packed weights packed.

    Args:
      frozen, delta: the two trees of `lorafy`, or later states of them.

    Returns:
      `Lorafied(frozen, delta)`; this `frozen` holds the plain weights.

    Raises:
      ValueError: an adapter multiplies W (DoRA), so that what it does to W is not low-rank; the trees do not
        belong together.
      TypeError: the trees hold shapes.
    """
    check_arrays("as_lora(frozen, delta)", frozen=frozen, delta=delta)
    pairs: list[tuple[Any, Any]] = []
    paired(lambda leaf, other: pairs.append(_as_lora(leaf, other)), frozen, delta)
    treedef: Any = jax.tree.structure(frozen, is_leaf=is_node)
    return Lorafied(
        jax.tree.unflatten(treedef, [leaf for leaf, _ in pairs]),
        jax.tree.unflatten(treedef, [other for _, other in pairs]),
    )


def _as_lora(frozen: Any, delta: Any) -> tuple[Any, Any]:
    if not isinstance(delta, Adapter):
        return weight_of(frozen), delta
    node = mergeable(frozen, delta)
    if is_plain(delta):
        return node.weight, delta
    form = jax.eval_shape(factored, node)
    if form.magnitude is not None:
        raise ValueError(
            f"the {type(delta.spec.method).__name__} adapter of {delta.spec.path!r} is no LoRA: its "
            "magnitude multiplies W too, and what that adds "
            "to W is not low-rank. Use its weights instead: `merge(frozen, delta)`."
        )
    a, b = _side_by_side(node, _first_with_this_a(node, len(form.terms)))
    return node.weight, lora_leaf(delta.spec, a, b, scale=_first_scale(form.terms), dropout=form.leaf.dropout)


def _first_scale(terms: Sequence[Term]) -> float:
    """The scale of the result. B takes the other terms' scales as multiples of it: ±1 for PiSSA, exactly."""
    return next((term.scale for term in terms if term.scale), 1.0)


def _first_with_this_a(node: Adapted, count: int) -> tuple[int, ...]:
    """For each term, the index of the first one with the same A.

    Told by placeholders outside of any trace, where `stop_gradient` of an array is that array.
    """
    if count == 1:
        return (0,)
    with jax.ensure_compile_time_eval():
        fixed, adapter = jax.tree.map(
            lambda array: jnp.zeros(array.shape, array.dtype), (node.fixed, node.adapter)
        )
        weight = jax.tree.map(
            lambda array: np.broadcast_to(np.zeros((), array.dtype), array.shape), node.weight
        )  # takes no memory
        found = [term.a for term in factored(Adapted(Fixed(weight, fixed, adapter.spec), adapter)).terms]
    return tuple(next(index for index, other in enumerate(found) if other is a) for a in found)


@partial(jax.jit, static_argnums=1)
def _side_by_side(node: Adapted, first: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    whole = factored(node).plain().unwindowed()
    terms, scale = whole.terms, _first_scale(whole.terms)
    dtype = functools.reduce(jnp.promote_types, [array.dtype for term in terms for array in (term.a, term.b)])
    wide = widened(dtype)
    summed: dict[int, jax.Array] = {}
    for index, term in zip(first, terms, strict=True):
        b = term.b.astype(wide) * (term.scale / scale)
        summed[index] = summed[index] + b if index in summed else b
    a = jnp.concatenate([terms[index].a.astype(dtype) for index in summed], axis=-1)
    return a, jnp.concatenate(list(summed.values()), axis=len(whole.tagged("layer"))).astype(dtype)
