"""Equations that contract or look up: their result is an array, and each is a `Use` on record."""

from collections.abc import Callable, Sequence
from typing import Any

from .._lowrank.contraction import dot_general, ragged_dot
from .._lowrank.convolution import conv_general_dilated
from .._lowrank.factored import Factored, NotAView
from .._lowrank.lookup import gather
from .equation import bind
from .recorder import Recorder


def _dot_general(eqn: Any, number: int, values: list[Any], recorder: Recorder, reduce: Any) -> Any:
    left, right = values
    weight_on_left = isinstance(left, Factored)
    weight, x = (left, right) if weight_on_left else (right, left)
    numbers = eqn.params["dimension_numbers"]
    (own, own_batch) = (numbers[0][0], numbers[1][0]) if weight_on_left else (numbers[0][1], numbers[1][1])
    base = lambda x, w: bind(eqn, [w, x] if weight_on_left else [x, w])[0]
    y = dot_general(base, x, weight.folded(number), numbers, weight_on_left, eqn.params["precision"], reduce)
    _contraction(recorder, eqn, number, weight, own, own_batch)
    return y


def _contraction(
    recorder: Recorder,
    eqn: Any,
    number: int,
    weight: Factored,
    own: Sequence[int],
    batch: Sequence[int],
) -> None:
    stored = lambda labels: [axis for label in labels for axis in weight.axes[label].origin]
    free = [label for label in range(len(weight.axes)) if label not in (*own, *batch)]
    out = eqn.outvars[0].aval.size
    flops = 2 * out
    for label in own:
        flops *= weight.shape[label]
    flops //= eqn.params.get("feature_group_count", 1)
    recorder.record(
        eqn,
        number,
        weight,
        "low-rank",
        stored(own),
        stored(free),
        stored(batch),
        _contraction_flops(weight, flops),
    )


def _contraction_flops(weight: Factored, flops: int) -> tuple[int, int, int]:
    sizes = {tag: 1 for tag in ("in", "out")}
    for axis, size in zip(weight.axes, weight.shape, strict=True):
        if axis.tag in sizes:
            sizes[axis.tag] *= size
    low = flops
    for term in weight.terms:
        rank = term.a.shape[-1]
        covered = {"in": 1.0, "out": 1.0}
        if term.window is not None and weight.windowed is not None:
            start, stop = term.window
            covered[weight.axes[weight.windowed].tag] = (stop - start) / weight.shape[weight.windowed]
        low += int(covered["in"] * flops * rank / sizes["out"] + covered["out"] * flops * rank / sizes["in"])
    return flops, low, flops + forming_flops(weight)


def forming_flops(weight: Factored) -> int:
    return sum(2 * term.a.shape[-1] * weight.weight.size + weight.weight.size for term in weight.terms)


def lookup_flops(weight: Factored, size: int) -> tuple[int, int, int]:
    return 0, sum((2 * term.a.shape[-1] + 1) * size for term in weight.terms), forming_flops(weight)


def _convolution(eqn: Any, number: int, values: list[Any], recorder: Recorder, reduce: Any) -> Any:
    x, weight = values
    if not isinstance(weight, Factored) or isinstance(x, Factored):
        raise NotAView
    out_axis = eqn.params["dimension_numbers"].rhs_spec[0]
    reading = any(axis.tag == "?" for axis in weight.axes)
    base = lambda x, w: bind(eqn, [x, w])[0]
    y = (
        base(x, weight.weight)
        if reading
        else conv_general_dilated(base, x, weight.folded(number), eqn.params)
    )
    _contraction(
        recorder,
        eqn,
        number,
        weight,
        [label for label in range(len(weight.axes)) if label != out_axis],
        (),
    )
    return y


def _ragged_dot(eqn: Any, number: int, values: list[Any], recorder: Recorder, reduce: Any) -> Any:
    x, weight, sizes = values
    if not isinstance(weight, Factored) or isinstance(x, Factored) or isinstance(sizes, Factored):
        raise NotAView
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    own = numbers.dot_dimension_numbers[0][1]
    reading = any(axis.tag == "?" for axis in weight.axes)
    base = lambda x, w: bind(eqn, [x, w, sizes])[0]
    y = base(x, weight.weight) if reading else ragged_dot(base, x, weight.folded(number), sizes, eqn.params)
    _contraction(recorder, eqn, number, weight, own, numbers.rhs_group_dimensions)
    return y


def _gather(eqn: Any, number: int, values: list[Any], recorder: Recorder, reduce: Any) -> Any:
    weight, indices = values
    if not isinstance(weight, Factored) or isinstance(indices, Factored):
        raise NotAView
    out = gather(lambda w, i: bind(eqn, [w, i])[0], weight, indices, eqn.params, reduce)
    if not isinstance(out, Factored):
        picked = [
            stored
            for axis in eqn.params["dimension_numbers"].start_index_map
            for stored in weight.axes[axis].origin
        ]
        recorder.record(eqn, number, weight, "lookup", picked, (), flops=lookup_flops(weight, out.size))
    return out


USES: dict[str, Callable] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "ragged_dot_general": _ragged_dot,
    "gather": _gather,
}
