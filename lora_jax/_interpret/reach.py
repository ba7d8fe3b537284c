"""Which inputs of a function reach a contraction as a weight, also by ways for which there is no rule.

A value is followed as the set of parameters from which alone it is computed, or as DATA, which depends on
anything else too. Where a contraction meets such a set and DATA, the set is a weight there. The rules of
`uses.py` and `views.py` decide what `adapt` can follow; this file tells what it cannot.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex

from .._paths import is_array
from .calls import scan_parts
from .equation import trace


DATA = None
Origin = frozenset[int] | None  # the inputs of which a value is made, or DATA

_CONTRACTIONS = {"dot_general", "conv_general_dilated", "ragged_dot_general", "ragged_dot"}
_LOOKUPS = {"gather", "dynamic_slice", "take"}
# Code that nobody can look into.
_OPAQUE = {
    "pallas_call",
    "ffi_call",
    "custom_partitioning",
    "pure_callback",
    "io_callback",
    "tpu_custom_call",
}


def is_matrix(leaf: Any) -> bool:
    """Whether a leaf looks like a weight of a contraction: an array with two axes or more that are not 1."""
    return is_array(leaf) and sum(size > 1 for size in leaf.shape) > 1


def reaching(fn: Callable, values: Sequence[Any], parameters: Sequence[int]) -> set[int]:
    """The indices of the matrices among the `parameters` that reach a contraction of `fn(values)` as weights.

    `values` is a flat list of arrays, shapes and other arguments. `parameters` are indices of it. Its other
    arrays are data.
    """
    arrays = [index for index, value in enumerate(values) if is_array(value)]

    def flat(*given: Any) -> list[Any]:
        filled = list(values)
        for index, array in zip(arrays, given, strict=True):
            filled[index] = array
        outputs = jax.tree.leaves(fn(filled))
        return [output for output in outputs if isinstance(output, jax.Array)]

    def origin(index: int) -> Origin:
        if index not in parameters:
            return DATA
        # Scales and biases: a weight may be computed with them, and they are none.
        return frozenset({index} if is_matrix(values[index]) else ())

    shapes = [jax.ShapeDtypeStruct(values[index].shape, values[index].dtype) for index in arrays]
    found: set[int] = set()
    _follow(trace(flat, *shapes), list(map(origin, arrays)), found)
    return found


def _follow(jaxpr: Any, inputs: Sequence[Origin], found: set[int]) -> list[Origin]:
    """The origins of the outputs of a jaxpr. What reaches a contraction in it is added to `found`."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    origins: dict[Any, Origin] = dict.fromkeys(jaxpr.constvars, frozenset())
    origins.update(zip(jaxpr.invars, inputs, strict=True))
    of = lambda atom: frozenset() if isinstance(atom, jex.Literal) else origins[atom]
    for eqn in jaxpr.eqns:
        values = [of(atom) for atom in eqn.invars]
        origins.update(zip(eqn.outvars, _of_equation(eqn, values, found), strict=True))
    return [of(atom) for atom in jaxpr.outvars]


def _of_equation(eqn: Any, values: list[Origin], found: set[int]) -> list[Origin]:
    name, params = eqn.primitive.name, eqn.params
    everywhere = [_union(values)] * len(eqn.outvars)
    if name in _CONTRACTIONS:
        left, right = values[:2]
        if not left or not right:  # one of them is data, or a constant
            found.update(left or right or ())
        return everywhere
    if name in _LOOKUPS and DATA in values[1:]:
        return [DATA] * len(eqn.outvars)  # rows that the data picks are data
    if name in _OPAQUE:
        if DATA in values:
            found.update(*(value for value in values if value))
        return everywhere
    if name == "scan":
        return _of_scan(eqn, values, found)
    if name == "while":
        first, last = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        consts, carry = values[first:last], values[last:]
        return _of_loop(lambda carry: _follow(params["body_jaxpr"], [*consts, *carry], found), carry)
    if name == "cond":
        branches = [_follow(branch, values[1:], found) for branch in params["branches"]]
        return [_union([values[0], *outputs]) for outputs in zip(*branches, strict=True)]
    inner = next((params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params), None)
    invars = getattr(getattr(inner, "jaxpr", inner), "invars", None)
    if invars is not None and len(invars) == len(values):
        outputs = _follow(inner, values, found)
        return outputs if len(outputs) == len(eqn.outvars) else everywhere
    return everywhere


def _of_scan(eqn: Any, values: list[Origin], found: set[int]) -> list[Origin]:
    consts, carry, xs = scan_parts(eqn.params, values)
    ys: list[Origin] = []

    def step(carry: list[Origin]) -> list[Origin]:
        outputs = _follow(eqn.params["jaxpr"], [*consts, *carry, *xs], found)
        ys[:] = outputs[len(carry) :]
        return outputs[: len(carry)]

    return [*_of_loop(step, carry), *ys]


def _of_loop(step: Callable[[list[Origin]], list[Origin]], carry: list[Origin]) -> list[Origin]:
    """The carry after any number of steps: its origins only grow, so that the loop ends."""
    while True:
        grown = [_union(pair) for pair in zip(carry, step(carry), strict=True)]
        if grown == carry:
            return carry
        carry = grown


def _union(values: Sequence[Origin]) -> Origin:
    return DATA if DATA in values else frozenset().union(*(value for value in values if value))
