"""Indexing a factored weight: `W[i] + A[i] B`, or a view of all parts where a stack is indexed."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._packed.lazy import on_weight, value_of
from .factored import Axis, Base, Factored, NEW
from .labels import aligned, RANK, scaled_by
from .pending import added
from .product import times, with_factor


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
