"""Low-rank summands that wait to be added to the product with W."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax
from jax import lax


Piece = tuple[jax.Array, tuple[int, int] | None]  # a summand, and its window along the windowed axis


def added(y: jax.Array, pieces: Sequence[Piece], axis: int | None) -> jax.Array:
    """`y` plus the pieces, each in its window along `axis`; only the covered ranges are touched."""
    windowed: list[tuple[jax.Array, tuple[int, int]]] = []
    whole = None
    for piece, window in pieces:
        if window is None or axis is None or window == (0, y.shape[axis]):
            # Pieces first: those of a method that starts as a difference (PiSSA) are then exactly zero.
            whole = piece if whole is None else whole + piece
        else:
            windowed.append((piece, window))
    y = y if whole is None else y + whole
    if axis is None or not windowed:
        return y
    # One concatenation for all windows. With one for each, XLA adds and copies what lies between them again
    # and again.
    edges = sorted({0, y.shape[axis], *(edge for _, window in windowed for edge in window)})
    parts = []
    for start, stop in itertools.pairwise(edges):
        part = lax.slice_in_dim(y, start, stop, axis=axis)
        for piece, (first, last) in windowed:
            if first <= start and stop <= last:
                part = part + lax.slice_in_dim(piece, start - first, stop - first, axis=axis)
        parts.append(part)
    return lax.concatenate(parts, axis)


@dataclasses.dataclass(frozen=True)
class Pending:
    """`y` plus low-rank pieces that are not added yet, because what comes next is better done to `y` first.

    After a bias, `(x W + c) + (x A) B`: the sum with the bias is then one array for XLA. Of a sum of two
    products alone it keeps x W and (x A) B both for the backward pass: it moves the reshapes of the products
    behind their sum, and then adds them anew in all that uses the sum. Where no bias comes, or m comes before
    it, `zeros` does the same: a row of B times zero, which XLA may not take for zero.

    After a fused projection is split, the parts that have no window are not touched.
    """

    y: jax.Array
    pieces: tuple[Piece, ...]
    axis: int | None
    zeros: Callable[[], jax.Array] | None = None

    def value(self) -> jax.Array:
        y = self.y if self.zeros is None else self.y + self.zeros()
        return added(y, self.pieces, self.axis)

    def cut(self, parts: Sequence[jax.Array], axis: int) -> "list[Pending | jax.Array] | None":
        """The same for `parts`, into which `y` has been split along `axis`, if no window crosses a border."""
        windowed = [(piece, window) for piece, window in self.pieces if window is not None]
        if axis != self.axis or len(windowed) < len(self.pieces):
            return None
        start = 0
        results: list[Pending | jax.Array] = []
        for part in parts:
            stop = start + part.shape[axis]
            inside = [(piece, window) for piece, window in windowed if window[0] < stop and start < window[1]]
            if any(window[0] < start or stop < window[1] for _, window in inside):
                return None
            shifted = tuple((piece, (window[0] - start, window[1] - start)) for piece, window in inside)
            results.append(Pending(part, shifted, axis) if shifted else part)
            start = stop
        return results
