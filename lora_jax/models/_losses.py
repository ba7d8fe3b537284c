"""The cross-entropy of a language model's head, without an array of all its logits.

Logits are as wide as the vocabulary: those of 512 tokens of GPT-2 take 103 MB, and their gradient as much
again. Here some columns at a time have logits. Their gradient with respect to the hidden states is computed
beside them, in the forward pass, so that the backward pass needs no logits and no product is made twice. A
head that trains itself needs the logits of all tokens for its own gradient, and gets them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from .._own_derivative import own_derivative
from ._layers import accumulator


# Tokens that have logits at the same time, on all devices together. More are no faster on a CPU, which reads
# the head once for them all.
TOKENS = 128


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """(1 − s) NLL + s mean_v(−log p_v) of every token, in float32, or float64 of float64 logits.

    >>> cross_entropy(jnp.zeros((1, 2, 4)), jnp.array([[3, -100]])).round(3).tolist()
    [[1.3860000371932983, 0.0]]

    Args:
      logits: (..., V).
      labels: (...) integers. The loss at a negative one, such as the -100 of `transformers`, is 0.
      smoothing: s, spread over the whole vocabulary, the label included (Szegedy et al. 2016, section 7).
    """
    # Both terms have one log-sum-exp, so that no array of log-probabilities is kept for the backward pass:
    # NLL = lse − logit[label], mean(−log p) = lse − mean(logits).
    logits = logits.astype(accumulator(logits.dtype))
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    loss = normalizer - target
    if smoothing:
        loss = (1 - smoothing) * loss + smoothing * (normalizer - jnp.mean(logits, axis=-1))
    return jnp.where(labels < 0, 0, loss)


def head_losses(
    logits_of: Callable[[jax.Array, jax.Array], jax.Array],
    x_BxNxD: jax.Array,
    head: jax.Array,
    labels_BxN: jax.Array,
    smoothing: float = 0.0,
) -> jax.Array:
    """`cross_entropy(logits_of(x, head), labels)`, (B, N), some columns at a time.

    `logits_of` closes over no array.
    """
    whole = lambda x, head, labels: cross_entropy(logits_of(x, head), labels, smoothing)

    def each(some: Callable) -> Callable:
        """`some(x, head, labels)` of each chunk, one after the other."""

        def function(x_BxNxD, head, labels_BxN):
            columns, chunks = labels_BxN.shape[1], _chunks(*labels_BxN.shape)
            if chunks == 1:
                return some(x_BxNxD, head, labels_BxN)
            pieces = (_split(x_BxNxD, chunks, 0), _split(labels_BxN, chunks, -1))
            _, found = jax.lax.scan(lambda _, piece: (None, some(piece[0], head, piece[1])), None, pieces)
            return jax.tree.map(lambda array: _together(array)[:, :columns], found)

        return function

    def with_gradient(x, head, labels):
        losses, backward = jax.vjp(lambda x: whole(x, head, labels), x)
        return losses, backward(jnp.ones_like(losses))[0]

    # One chunk keeps its logits, as no others wait to be computed.
    again = whole if _chunks(*labels_BxN.shape) == 1 else jax.checkpoint(whole)
    losses = jax.custom_jvp(own_derivative(each(again)))

    def rule(primals: tuple, tangents: tuple) -> tuple:
        x, head, labels = primals
        dx, dhead, _ = tangents
        if not isinstance(dhead, SymbolicZero):
            dx = jnp.zeros_like(x) if isinstance(dx, SymbolicZero) else dx
            return jax.jvp(lambda x, head: whole(x, head, labels), (x, head), (dx, dhead))
        if isinstance(dx, SymbolicZero):
            found = losses(x, head, labels)
            return found, jnp.zeros_like(found)
        # A loss depends on the state of its own column alone.
        found, gradient = _by_rows(each(with_gradient))(x, head, labels)
        wide = found.dtype
        return found, jnp.sum(gradient.astype(wide) * dx.astype(wide), axis=-1)

    losses.defjvp(rule, symbolic_zeros=True)
    return losses(x_BxNxD, head, labels_BxN)


def _chunks(batch: int, columns: int) -> int:
    """Into how many the columns are cut."""
    return -(-columns // -(-TOKENS // batch)) if columns else 1


def _by_rows(function: Callable) -> Callable:
    """`function(x, head, labels)`, which `vmap` over one head gives more rows, and no axis more.

    Chunks are then as large for all adapters of a `vmap` together as for one. A derivative is that of
    `function` as it is, since `custom_vmap` has none of its own backwards.
    """
    batched = jax.custom_batching.custom_vmap(function)

    def rule(size: int, mapped: Sequence[bool], x: jax.Array, head: jax.Array, labels: jax.Array) -> tuple:
        if mapped[1]:
            axes = [0 if own else None for own in mapped]
            found = jax.vmap(function, axes, axis_size=size)(x, head, labels)
        else:
            whole = (
                array if own else jnp.broadcast_to(array, (size, *array.shape))
                for array, own in ((x, mapped[0]), (labels, mapped[2]))
            )
            x, labels = (array.reshape(-1, *array.shape[2:]) for array in whole)
            found = _by_rows(function)(x, head, labels)
            found = jax.tree.map(lambda array: array.reshape(size, -1, *array.shape[1:]), found)
        return found, jax.tree.map(lambda _: True, found)

    batched.def_vmap(rule)
    by_rows = jax.custom_jvp(lambda *operands: batched(*operands))
    by_rows.defjvp(lambda primals, tangents: jax.jvp(function, primals, tangents))
    return by_rows


def _split(x: jax.Array, chunks: int, fill: int) -> jax.Array:
    """(B, N, …) as (chunks, B, N / chunks, …), filled up where N is no multiple."""
    batch, columns, *rest = x.shape
    size = -(-columns // chunks)
    widths = [(0, 0), (0, chunks * size - columns), *[(0, 0)] * len(rest)]
    return jnp.moveaxis(jnp.pad(x, widths, constant_values=fill).reshape(batch, chunks, size, *rest), 1, 0)


def _together(x: jax.Array) -> jax.Array:
    """The inverse of `_split`, still filled up."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def check_labels(labels: Any, smoothing: float, rows: tuple[int, int], head: Any, cache: Any) -> None:
    """Raises for a caller's mistakes with `labels`. `rows`: the shape that they must have."""
    if labels is None:
        if smoothing:
            raise ValueError(
                f"`label_smoothing` is {smoothing}, and no `labels` were given that it could smooth; pass "
                "both, or neither."
            )
        return
    if head is not None or cache is not None:
        raise ValueError(
            "`labels` go with the language model's head and without a `cache`; leave one of them out."
        )
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer) or jnp.shape(labels) != rows:
        raise ValueError(
            f"`labels` must be integers of shape {rows}, one for each column that has logits, got "
            f"{jnp.result_type(labels)}{jnp.shape(labels)}."
        )
    if not 0 <= smoothing < 1:
        raise ValueError(f"`label_smoothing` must be at least 0 and less than 1, got {smoothing}.")
