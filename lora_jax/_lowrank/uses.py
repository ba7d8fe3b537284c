"""The uses of a factored weight: `x W' = ((x W) + (x A) B) ⊙ m`, for every operation that contracts or looks
up.

Each rule takes the operation's own result on the plain weight as a function (`base`), so that the model's
equation stays as it is, and adds the low-rank terms beside it. Factors are cast to the dtype of the
contraction they join. `NotAView` means that no low-rank form exists for this use.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._kept import named
from .._mesh import moved, sharding_like
from .._packed.lazy import on_weight, used, value_of
from .dropout import dropped_out
from .factored import Axis, Factored, NEW, NotAView, Term
from .labels import aligned, dot, dot_labels, RANK, scaled_by, widened
from .product import with_factor


Base = Callable[[jax.Array, jax.Array], jax.Array]
Piece = tuple[jax.Array, tuple[int, int] | None]  # a summand, and its window along the windowed axis


def dot_general(
    base: Base,
    x: jax.Array,
    weight: Factored,
    numbers: Any,
    weight_on_left: bool,
    precision: Any,
    reduce: Any = None,
) -> "Pending | jax.Array":
    """`lax.dot_general`: any dimension numbers, the weight on either side. `reduce`: see `with_factor`."""
    (left_summed, right_summed), (left_batch, right_batch) = numbers
    own, other = (left_summed, right_summed) if weight_on_left else (right_summed, left_summed)
    own_batch, other_batch = (left_batch, right_batch) if weight_on_left else (right_batch, left_batch)
    x_labels: list[Any] = [f"x{position}" for position in range(x.ndim)]
    for position, label in zip((*other, *other_batch), (*own, *own_batch), strict=True):
        x_labels[position] = label
    w_free = [label for label in range(len(weight.axes)) if label not in (*own, *own_batch)]
    x_free = [label for label in x_labels if isinstance(label, str)]
    out_labels = (*own_batch, *w_free, *x_free) if weight_on_left else (*own_batch, *x_free, *w_free)

    after, x = _magnitude_side(weight, x, x_labels, out_labels)
    y = used(base, x, weight.weight)
    weight = weight.unwindowed(own_batch)
    x, weight = dropped_out(x, weight)
    # The factors do not vary along new axes: contracting with one is summing over it.
    flat = [position for position, label in enumerate(x_labels) if label in own and weight.axes[label] == NEW]
    x = jnp.sum(x, axis=flat, dtype=x.dtype) if flat else x
    x_labels = [label for position, label in enumerate(x_labels) if position not in flat]

    # Start with the factor that the contraction touches, so that everything in between is as narrow as the
    # rank.
    touched = {weight.axes[label].tag for label in own}
    first, second = ("b", "a") if "out" in touched and "in" not in touched else ("a", "b")

    def product(term: Term) -> jax.Array:
        inner = x
        if weight.windowed in own and term.window is not None:
            inner = lax.slice_in_dim(x, *term.window, axis=x_labels.index(weight.windowed))
        if first == "b":
            inner = times(inner, x_labels, term.outer, weight.labels("outer"))
        h, labels = contracted(
            inner, tuple(x_labels), term, first, (x, x_labels), keep=(*out_labels, *weight.labels(second))
        )
        h = times(named(scaled_by(h, term.scale)), labels, term.inner, weight.labels("inner"))
        # The piece lies as the result does. A part of an axis need not divide as the whole axis does.
        whole = [label if term.window is None or label != weight.windowed else None for label in out_labels]
        h, labels = contracted(h, labels, term, second, (y, whole), keep=out_labels)
        if first == "a":
            h = times(h, labels, term.outer, weight.labels("outer"))
        h = term.tapped(h, labels, weight.labels("tap"))
        shape = list(y.shape)
        if term.window is not None and weight.windowed in out_labels:
            shape[out_labels.index(weight.windowed)] = term.window[1] - term.window[0]
        return aligned(h, labels, out_labels, shape)

    def contracted(
        h: jax.Array, labels: tuple, term: Term, name: str, like: tuple, keep: tuple
    ) -> tuple[jax.Array, tuple]:
        own = weight.labels(name)
        found = dot_labels(own, labels, keep) if weight_on_left else dot_labels(labels, own, keep)
        return with_factor(
            h.astype(x.dtype),
            labels,
            getattr(term, name),
            own,
            keep,
            reduce=reduce,
            factor_on_left=weight_on_left,
            precision=precision,
            preferred_element_type=y.dtype,
            out_sharding=sharding_like(like[0], like[1], found),
        )

    axis = out_labels.index(weight.windowed) if weight.windowed in out_labels else None

    def zeros() -> jax.Array:
        labels = weight.labels(second)
        row = lax.index_in_dim(
            getattr(weight.terms[0], second), 0, axis=labels.index(RANK), keepdims=False
        ).astype(y.dtype)
        labels = tuple(label for label in labels if label != RANK)
        row = moved(lax.stop_gradient(row) * jnp.zeros((), y.dtype), sharding_like(y, out_labels, labels))
        return aligned(row, labels, out_labels, y.shape)

    along = weight.windowed is None and weight.terms and set(weight.labels(second)) <= {RANK, *out_labels}
    pieces = tuple((product(term), term.window) for term in weight.terms)
    total = Pending(y, pieces, axis, zeros if along else None)
    return total if after is None else times(total.value(), out_labels, after, weight.labels("magnitude"))


def _magnitude_side(weight: Factored, x: jax.Array, x_labels: Sequence, out_labels: Sequence) -> tuple:
    """Multiplies by m before the contraction if that sums over the out axes, else returns it for
    afterwards.
    """
    if weight.magnitude is None:
        return None, x
    labels = weight.labels("magnitude")
    if all(label in out_labels for label in labels):
        return weight.magnitude, x
    if all(label in x_labels for label in labels):
        return None, times(x, x_labels, weight.magnitude, labels)
    raise NotAView


def times(x: jax.Array, x_labels: Sequence, factor: jax.Array | None, labels: Sequence) -> jax.Array:
    """`x` times a factor for some of its axes, in float32 at least: rounded to bfloat16, a factor of 1.01
    would be 1.0078.
    """
    if factor is None:
        return x
    factor = moved(
        factor, sharding_like(x, x_labels, labels)
    )  # otherwise the result would be split as the factor is
    wide = widened(x.dtype)

    def product(x: jax.Array, factor: jax.Array) -> jax.Array:
        return (x.astype(wide) * aligned(factor.astype(wide), labels, x_labels, x.shape)).astype(x.dtype)

    # The backward pass keeps the two as they are: neither `x` in the wider dtype nor the factor as large as
    # `x`.
    return jax.checkpoint(product, prevent_cse=False)(named(x), factor)


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


def conv_general_dilated(base: Base, x: jax.Array, weight: Factored, params: dict) -> jax.Array:
    """A convolution: A is the window, to or from `rank` channels, and B a 1×1 convolution behind or before
    it.

    The second form, from out channels to in channels, is what the gradient of the first with respect to its
    input is.
    """
    kernel_spec = params["dimension_numbers"][1]
    tags = [
        weight.axes[axis].tag for axis in kernel_spec
    ]  # of the output channels, the input channels, the window
    if params["batch_group_count"] != 1 or weight.magnitude is not None and tags[0] != "out":
        raise NotAView
    if tags[0] == "out" and set(tags[1:]) == {"in"}:
        return _conv_to_out(base, x, weight, params)
    if tags[:2] == ["in", "out"] and set(tags[2:]) <= {"in"} and params["feature_group_count"] == 1:
        return _conv_to_in(base, x, weight, params)
    raise NotAView


def _window(
    x: jax.Array, weight: Factored, window: jax.Array, first: int, second: int, params: dict, dtype: Any
) -> jax.Array:
    """The convolution with A, whose axes `first` and `second` are the output and the input channels."""
    lhs_spec, kernel_spec, out_spec = params["dimension_numbers"]
    labels = weight.labels("a")
    positions = tuple(labels.index(axis) for axis in (first, second, *kernel_spec[2:]))
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "feature_group_count", "precision")
    return lax.conv_general_dilated(
        *(x, window.astype(x.dtype)),
        **{name: params[name] for name in names},
        dimension_numbers=lax.ConvDimensionNumbers(lhs_spec, positions, out_spec),
        preferred_element_type=dtype,
    )


def _conv_to_out(base: Base, x: jax.Array, weight: Factored, params: dict) -> jax.Array:
    _, kernel_spec, out_spec = params["dimension_numbers"]
    feature, groups = out_spec[1], params["feature_group_count"]
    y = used(base, x, weight.weight)
    weight = weight.plain().unwindowed() if groups > 1 else weight.plain().unwindowed(weight.tagged("in"))
    x, weight = dropped_out(x, weight)

    def product(term: Term) -> jax.Array:
        rank, out = term.b.shape
        # Every group of input channels has the same A: one copy of it each.
        h = _window(
            x, weight, jnp.concatenate([term.a] * groups, axis=-1), RANK, kernel_spec[1], params, y.dtype
        )
        h = scaled_by(h, term.scale).astype(x.dtype)
        h = lax.reshape(h, (*h.shape[:feature], groups, rank, *h.shape[feature + 1 :]))
        b = lax.reshape(term.b.astype(x.dtype), (rank, groups, out // groups))
        before, behind = (
            tuple(f"x{position}" for position in part)
            for part in (range(feature), range(feature + 1, y.ndim))
        )
        options = {"keep": ("group",), "precision": params["precision"], "preferred_element_type": y.dtype}
        grouped = dot(h, (*before, "group", RANK, *behind), b, (RANK, "group", "out"), **options)
        placed = aligned(*grouped, (*before, "group", "out", *behind), ())
        return term.tapped(lax.reshape(placed, (*y.shape[:feature], out, *y.shape[feature + 1 :])), (), ())

    y = added(
        y,
        [(product(term), term.window) for term in weight.terms],
        None if weight.windowed is None else feature,
    )
    return times(
        y,
        ["out" if position == feature else f"x{position}" for position in range(y.ndim)],
        weight.magnitude,
        ("out",),
    )


def _conv_to_in(base: Base, x: jax.Array, weight: Factored, params: dict) -> jax.Array:
    lhs_spec, kernel_spec, _ = params["dimension_numbers"]
    y, feature = used(base, x, weight.weight), lhs_spec[1]
    weight = weight.plain().unwindowed()
    x, weight = dropped_out(x, weight)
    labels = tuple("out" if position == feature else f"x{position}" for position in range(x.ndim))
    narrow = tuple(RANK if label == "out" else label for label in labels)
    for term in weight.terms:
        h = dot(
            x,
            labels,
            term.b.astype(x.dtype),
            (RANK, "out"),
            precision=params["precision"],
            preferred_element_type=y.dtype,
        )
        summand = _window(
            scaled_by(aligned(*h, narrow, ()), term.scale).astype(x.dtype),
            weight,
            term.a,
            kernel_spec[0],
            RANK,
            params,
            y.dtype,
        )
        y = y + term.tapped(summand, (), ())
    return y


def ragged_dot(base: Base, x: jax.Array, weight: Factored, group_sizes: jax.Array, params: dict) -> jax.Array:
    """`lax.ragged_dot`: rows of `x` in runs, each run with the weight of its group; the group axis is a
    `layer`.
    """
    numbers = params["ragged_dot_dimension_numbers"]
    (x_summed, w_summed), (x_batch, w_batch) = numbers.dot_dimension_numbers
    (group,) = numbers.rhs_group_dimensions
    kinds = {weight.axes[label].tag for label in w_summed}
    ragged_rows = all(position not in x_summed for position in numbers.lhs_ragged_dimensions)
    if (
        not ragged_rows
        or x_batch
        or w_batch
        or weight.tagged("layer") != (group,)
        or kinds not in ({"in"}, {"out"})
        or x.ndim != 2
        or len(weight.axes) != 3
    ):
        raise NotAView
    if weight.magnitude is not None or any(term.tap is not None for term in weight.terms):
        raise NotAView
    y = used(base, x, weight.weight)
    weight = weight.plain().unwindowed()
    h0, weight = dropped_out(x, weight)
    order = ("a", "b") if kinds == {"in"} else ("b", "a")
    for term in weight.terms:
        h, summed, rows = h0, x_summed, numbers.lhs_ragged_dimensions
        for name, label in zip(order, (w_summed[0], RANK), strict=True):
            labels = weight.labels(name)
            step = lax.RaggedDotDimensionNumbers(
                dot_dimension_numbers=((tuple(summed), (labels.index(label),)), ((), ())),
                lhs_ragged_dimensions=rows,
                rhs_group_dimensions=[labels.index(group)],
            )
            h = lax.ragged_dot_general(
                *(h.astype(x.dtype), getattr(term, name).astype(x.dtype), group_sizes),
                ragged_dot_dimension_numbers=step,
                precision=params["precision"],
                preferred_element_type=y.dtype,
                group_offset=params["group_offset"],
            )
            h = scaled_by(h, term.scale) if name == order[0] else h
            summed, rows = (1,), [0]
        y = y + h
    return y


def gather(
    base: Base, weight: Factored, indices: jax.Array, params: dict, reduce: Any = None
) -> "Factored | jax.Array":
    """Indexing. Picking from a stack is a view; picking rows of an embedding is `W[i] + A[i] B`. `reduce`:
    see `with_factor`.

    Out-of-range rows of the factors are filled with zeros, so that the fill value of the base stays alone
    there.
    """
    weight = weight.plain()
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    picked, paired = numbers.start_index_map, numbers.operand_batching_dims
    weight = weight.unwindowed(
        [axis for axis in (*picked, *paired) if axis in paired or sizes[axis] != weight.shape[axis]]
    )
    gone = (*numbers.collapsed_slice_dims, *paired)
    kept = [axis for axis in range(len(weight.axes)) if axis not in gone]
    ndim = indices.ndim - 1 + len(kept)
    batch = [position for position in range(ndim) if position not in numbers.offset_dims]
    position_of = dict(zip(kept, numbers.offset_dims, strict=True)) | {RANK: RANK}
    batch_of = {
        axis: batch[column] for axis, column in zip(paired, numbers.start_indices_batching_dims, strict=True)
    }

    def view(
        array: jax.Array, labels: tuple[int, ...], fill: float | None
    ) -> tuple[jax.Array, tuple[int, ...]]:
        columns = [column for column, axis in enumerate(picked) if axis in labels]
        if not columns:
            return array, tuple((batch_of | position_of)[label] for label in labels)
        mine = (
            indices
            if len(columns) == len(picked)
            else jnp.stack([indices[..., column] for column in columns], axis=-1)
        )
        stay = [label for label in labels if label not in gone]
        pairs = [
            pair
            for pair in zip(paired, numbers.start_indices_batching_dims, strict=True)
            if pair[0] in labels
        ]
        own = lax.GatherDimensionNumbers(
            offset_dims=tuple(range(len(batch), len(batch) + len(stay))),
            collapsed_slice_dims=tuple(
                labels.index(axis) for axis in numbers.collapsed_slice_dims if axis in labels
            ),
            start_index_map=tuple(labels.index(picked[column]) for column in columns),
            operand_batching_dims=tuple(labels.index(axis) for axis, _ in pairs),
            start_indices_batching_dims=tuple(column for _, column in pairs),
        )
        whole = (RANK, weight.windowed)
        slices = [
            array.shape[position] if label in whole else sizes[label] for position, label in enumerate(labels)
        ]
        options = {name: params[name] for name in ("indices_are_sorted", "unique_indices")}
        mode = params["mode"] if fill is not None else "clip"
        result = lax.gather(array, mine, own, slices, fill_value=fill, mode=mode, **options)
        return result, (*batch, *(position_of[label] for label in stay))

    axes: list[Axis] = [NEW] * ndim
    for axis in kept:
        axes[position_of[axis]] = weight.axes[axis]
    rows = on_weight(base, weight.weight, indices)
    if any(axis.tag == "?" for axis in weight.axes):
        cut = [axis for axis in picked if sizes[axis] != weight.shape[axis]]
        looked_up = (stored for axis in cut for stored in weight.axes[axis].origin)
        axes = [Axis("?") if position in batch else axis for position, axis in enumerate(axes)]
        return weight.replace(weight=rows, axes=tuple(axes), looked_up=(*weight.looked_up, *looked_up))

    lookup = not {"in", "out"} <= {weight.axes[axis].tag for axis in kept}
    weight = weight.unwindowed() if lookup else weight
    names = ("a", "b", "tap")
    terms = [
        {
            name: view(getattr(term, name), weight.labels(name), 0.0)
            for name in names
            if getattr(term, name) is not None
        }
        for term in weight.terms
    ]
    magnitude = None if weight.magnitude is None else view(weight.magnitude, weight.labels("magnitude"), 1.0)
    everything = tuple(range(ndim))
    if lookup:
        rows = value_of(rows)
        summands = []
        for parts, term in zip(terms, weight.terms, strict=True):
            (a, a_labels), (b, b_labels) = parts["a"], parts["b"]
            tap, layers = parts.get("tap", (None, ()))
            both = [label for label in a_labels if label in b_labels and label != RANK]
            options = {"reduce": reduce, "preferred_element_type": rows.dtype}
            product, labels = with_factor(
                scaled_by(a, term.scale).astype(rows.dtype), a_labels, b, b_labels, both, **options
            )
            summands.append(
                (
                    aligned(
                        term.replace(tap=tap).tapped(product, labels, layers), labels, everything, rows.shape
                    ),
                    None,
                )
            )
        rows = added(rows, summands, None)
        return rows if magnitude is None else times(rows, everything, *magnitude)

    # An index axis belongs to the factors that were indexed: to both if the stack was.
    in_a, in_b = ({label for parts in terms for label in parts[name][1]} for name in ("a", "b"))
    for position in batch:
        axes[position] = Axis("layer" if position in in_a & in_b else "in" if position in in_a else "out")
    key = None if weight.key is None else view(weight.key, weight.labels("key"), None)
    windowed = None if weight.windowed is None else position_of[weight.windowed]
    result = weight.replace(weight=rows, axes=tuple(axes), windowed=windowed)

    def stored(part: tuple | None, name: str) -> jax.Array | None:
        if part is None:
            return None
        array, labels = part
        return aligned(array, labels, result.labels(name), ())

    return result.replace(
        terms=tuple(
            term.replace(**{name: stored(part, name) for name, part in parts.items()})
            for parts, term in zip(terms, weight.terms, strict=True)
        ),
        magnitude=stored(magnitude, "magnitude"),
        key=stored(key, "key"),
    )
