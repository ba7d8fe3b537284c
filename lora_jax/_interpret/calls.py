"""Equations that hold jaxprs: emitted again through JAX's public API, with the weights as operands."""

from collections.abc import Callable, Sequence
from typing import Any, TYPE_CHECKING

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from .. import _own_derivative
from .._lowrank.factored import Factored, NotAView
from .._lowrank.views import broadcast, unstacked
from .._packed.lazy import value_of


if TYPE_CHECKING:
    from .interpreter import Interpreter


def _jit(interpreter: "Interpreter", eqn: Any, values: list[Any]) -> list[Any]:
    params = eqn.params
    options: dict[str, Any] = {"keep_unused": params.get("keep_unused", False)}
    shardings = params.get("in_shardings", ())
    if any(isinstance(sharding, jax.sharding.Sharding) for sharding in shardings):
        plain = [
            isinstance(s, jax.sharding.Sharding) and not isinstance(v, Factored)
            for s, v in zip(shardings, values, strict=True)
        ]
        options["in_shardings"] = tuple(s if keep else None for s, keep in zip(shardings, plain, strict=True))
    shardings = params.get("out_shardings", ())
    if any(isinstance(sharding, jax.sharding.Sharding) for sharding in shardings):
        options["out_shardings"] = [s if isinstance(s, jax.sharding.Sharding) else None for s in shardings]
    return interpreter.jitted(params["jaxpr"], options, params.get("name", "jit"))(*values)


def _checkpoint(interpreter: "Interpreter", eqn: Any, values: list[Any]) -> list[Any]:
    options = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
    return jax.checkpoint(lambda *operands: interpreter.evaluate(eqn.params["jaxpr"], operands), **options)(
        *values
    )


def _inlined(interpreter: "Interpreter", eqn: Any, values: list[Any]) -> list[Any]:
    return interpreter.evaluate(eqn.params.get("call_jaxpr", eqn.params.get("jaxpr")), values)


def _custom_jvp(interpreter: "Interpreter", eqn: Any, values: list[Any]) -> list[Any]:
    """Of a function that has the mark; any other is left to the caller, who would form the weight."""
    call = eqn.params["call_jaxpr"]
    if [inner.params.get("name") for inner in call.jaxpr.eqns] != [_own_derivative.NAME]:
        raise NotAView
    return interpreter.evaluate(call, values)


def _handed_on(jaxpr: Any) -> list[int | None]:
    """For each output of a jaxpr the input that it is, also by way of functions inside; None if it is
    computed.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    inputs = {variable: index for index, variable in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        inner = (
            eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            if eqn.primitive.name in _FUNCTIONS
            else None
        )
        for variable, index in zip(eqn.outvars, [] if inner is None else _handed_on(inner), strict=False):
            if index is not None and not isinstance(eqn.invars[index], jex.Literal):
                source = inputs.get(eqn.invars[index])
                if source is not None:
                    inputs[variable] = source
    return [None if isinstance(atom, jex.Literal) else inputs.get(atom) for atom in jaxpr.outvars]


def _invariant(handed_on: Sequence[int | None], carry: Sequence[Any], offset: int) -> list[bool]:
    """Which values of the carry are factored weights that the loop never changes: they are constants."""
    return [isinstance(c, Factored) and handed_on[i] == offset + i for i, c in enumerate(carry)]


def _merged(mask: Sequence[bool], where_true: Sequence[Any], where_false: Sequence[Any]) -> list[Any]:
    true, false = iter(where_true), iter(where_false)
    return [next(true) if flag else next(false) for flag in mask]


def scan_parts(params: dict, values: list[Any]) -> tuple[list, list, list]:
    if "ft_in" in params:  # jax 0.11 and later
        consts, carry, xs = params["ft_in"].update(values).unpack()
        return list(consts), list(carry), list(xs)
    first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
    return values[:first], values[first:last], values[last:]


def _scan(interpreter: "Interpreter", eqn: Any, values: list[Any]) -> list[Any]:
    params, jaxpr = eqn.params, eqn.params["jaxpr"]
    consts, init, xs = scan_parts(params, values)
    handed_on = _handed_on(jaxpr)
    fixed = _invariant(handed_on, init, len(consts))
    init = [
        value if keep else interpreter.formed(eqn, value, -2 - index)
        for index, (value, keep) in enumerate(zip(init, fixed, strict=True))
    ]
    constant_carry = [value for value, keep in zip(init, fixed, strict=True) if keep]
    moving_carry = [value for value, keep in zip(init, fixed, strict=True) if not keep]
    sliced = [unstacked(value) if isinstance(value, Factored) else (value, None) for value in xs]
    # Weights that the body hands back stacked are those that came in, or copies of a constant.
    inputs, back = [*consts, *init, *xs], handed_on[len(init) :]
    stacks = [_stack_of(inputs, index, len(consts) + len(init), params["length"]) for index in back]

    def body(carry: list[Any], step: tuple) -> tuple[list[Any], list[Any]]:
        index, slices = step
        here = [rebuild(part) if rebuild else part for part, (_, rebuild) in zip(slices, sliced, strict=True)]
        shared = [
            value.folded(index) if isinstance(value, Factored) else value
            for value in (*consts, *constant_carry)
        ]
        whole = _merged(fixed, shared[len(consts) :], carry)
        outputs = interpreter.evaluate(jaxpr, [*shared[: len(consts)], *whole, *here])
        kept = [value for value, keep in zip(outputs[: len(init)], fixed, strict=True) if not keep]
        made = [y for y, stack in zip(outputs[len(init) :], stacks, strict=True) if stack is None]
        outputs = interpreter.all_formed(eqn, [*kept, *made])
        return outputs[: len(kept)], outputs[len(kept) :]

    random = any(
        isinstance(value, Factored) and value.key is not None for value in (*consts, *constant_carry)
    )
    steps = jnp.arange(params["length"]) if random else None
    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    with interpreter.recorder.repeated(params["length"]):
        moved, ys = lax.scan(body, moving_carry, (steps, [part for part, _ in sliced]), **options)
    given = [stack is not None for stack in stacks]
    ys = _merged(given, [stack for stack in stacks if stack is not None], ys)
    return [*_merged(fixed, constant_carry, moved), *ys]


def _stack_of(inputs: Sequence[Any], index: int | None, scanned: int, length: int) -> Factored | None:
    """The stack of a weight that every step hands back; `inputs` from `scanned` on are stacks already."""
    if index is None or not isinstance(inputs[index], Factored):
        return None
    weight = inputs[index]
    return (
        weight if index >= scanned else broadcast(weight, (length, *weight.shape), range(1, weight.ndim + 1))
    )


def _while(interpreter: "Interpreter", eqn: Any, values: list[Any]) -> list[Any]:
    params = eqn.params
    first, last = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    cond_consts, body_consts, init = values[:first], values[first:last], values[last:]
    fixed = _invariant(_handed_on(params["body_jaxpr"]), init, len(body_consts))
    init = [
        value if keep else interpreter.formed(eqn, value, -2 - index)
        for index, (value, keep) in enumerate(zip(init, fixed, strict=True))
    ]
    constant_carry = [value for value, keep in zip(init, fixed, strict=True) if keep]
    moving_carry = [value for value, keep in zip(init, fixed, strict=True) if not keep]

    def keep_going(state: tuple) -> Any:
        return interpreter.all_formed(
            eqn,
            interpreter.evaluate(
                params["cond_jaxpr"], [*cond_consts, *_merged(fixed, constant_carry, state[1])]
            ),
        )[0]

    def body(state: tuple) -> tuple:
        index, carry = state
        shared = [
            value.folded(index) if isinstance(value, Factored) else value
            for value in (*body_consts, *constant_carry)
        ]
        whole = _merged(fixed, shared[len(body_consts) :], carry)
        outputs = interpreter.evaluate(params["body_jaxpr"], [*shared[: len(body_consts)], *whole])
        kept = [value for value, keep in zip(outputs, fixed, strict=True) if not keep]
        return (None if index is None else index + 1), interpreter.all_formed(eqn, kept)

    random = any(
        isinstance(value, Factored) and value.key is not None for value in (*body_consts, *constant_carry)
    )
    _, moved = lax.while_loop(keep_going, body, (jnp.zeros((), jnp.int32) if random else None, moving_carry))
    return _merged(fixed, constant_carry, moved)


def _cond(interpreter: "Interpreter", eqn: Any, values: list[Any]) -> list[Any]:
    index, *operands = values
    branches = eqn.params["branches"]
    # A weight that all branches hand back is the one that came in.
    sources = [set(found) for found in zip(*map(_handed_on, branches), strict=True)]
    same = [next(iter(found)) if len(found) == 1 else None for found in sources]
    given = [source is not None and isinstance(operands[source], Factored) for source in same]

    def branch(position: int, jaxpr: Any) -> Callable:
        def run(*operands: Any) -> list[Any]:
            with interpreter.recorder.inside(position):
                outputs = interpreter.evaluate(jaxpr, operands)
                made = [output for output, keep in zip(outputs, given, strict=True) if not keep]
                return interpreter.all_formed(eqn, made)

        return run

    made = lax.switch(index, [branch(*each) for each in enumerate(branches)], *operands)
    weights = [
        operands[source] for source, keep in zip(same, given, strict=True) if keep and source is not None
    ]
    return _merged(given, weights, made)


def _shard_map(interpreter: "Interpreter", eqn: Any, values: list[Any]) -> list[Any]:
    params = eqn.params
    specs = []
    for index, (value, spec) in enumerate(zip(values, params["in_specs"], strict=True)):
        if isinstance(value, Factored):
            split = [axis for axis, names in enumerate(spec) if names is not None]
            value = (
                value.replace(weight=value_of(value.weight)) if split else value
            )  # packed blocks cannot be split
            value = values[index] = value.unwindowed(split)
            spec = value.partition_specs(spec)
        specs.append(spec)
    manual = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]
    function = jax.shard_map(
        lambda *operands: interpreter.all_formed(eqn, interpreter.evaluate(params["jaxpr"], operands)),
        mesh=params["mesh"],
        in_specs=tuple(specs),
        out_specs=list(params["out_specs"]),
        check_vma=params["check_vma"],
        axis_names=set(manual),
    )
    return function(*values)


# Functions inside, through which a weight can be handed on.
_FUNCTIONS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"}

# custom_vjp_call is missing on purpose, and custom_jvp_call is inlined with a mark only: inlining them would
# drop the author's derivative.
CALLS: dict[str, Callable] = {
    "jit": _jit,
    "pjit": _jit,
    "closed_call": _inlined,
    "core_call": _inlined,
    "checkpoint": _checkpoint,
    "remat": _checkpoint,
    "remat2": _checkpoint,
    "custom_jvp_call": _custom_jvp,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
