"""One equation of a jaxpr: binding it again as it was, and saying what and where it is."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from .._lowrank.factored import Factored
from .._lowrank.pending import Pending


def trace(function: Callable, *arguments: Any) -> Any:
    """The jaxpr of `function`, which takes and returns flat lists of arrays."""
    return jax.make_jaxpr(function)(*arguments)


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    parameters = eqn.primitive.get_bind_params(eqn.params)
    functions, parameters = parameters if isinstance(parameters, tuple) else ((), parameters)
    with eqn.ctx.manager:
        outputs = eqn.primitive.bind(*functions, *values, **parameters)
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def postponed(eqn: Any, values: Sequence[Any]) -> list[Any] | None:
    """The outputs of an equation that adds to a pending sum or splits it; None for any other equation."""
    positions = [position for position, value in enumerate(values) if isinstance(value, Pending)]
    if len(positions) != 1 or any(isinstance(value, Factored) for value in values):
        return None
    pending = values[positions[0]]
    if eqn.primitive.name == "add" and eqn.outvars[0].aval.shape == pending.y.shape:
        plain = [value.y if isinstance(value, Pending) else value for value in values]
        return [dataclasses.replace(pending, y=bind(eqn, plain)[0], zeros=None)]
    if eqn.primitive.name == "split":
        return pending.cut(bind(eqn, [pending.y]), eqn.params["axis"])
    return None


def source(eqn: Any) -> str:
    """`file:line (function)` of the innermost frame outside of the libraries, or nothing."""
    frames = getattr(eqn.source_info.traceback, "frames", None) or []
    for frame in frames:
        if (
            "site-packages" not in frame.file_name
            and "<frozen" not in frame.file_name
            and "/lora_jax/_" not in frame.file_name
        ):
            return f"{frame.file_name}:{frame.line_num} ({frame.function_name})"
    return ""


def described(eqn: Any) -> str:
    name = eqn.params.get("name")
    return f"`{eqn.primitive.name}`" + (f" ({name})" if isinstance(name, str) else "")
