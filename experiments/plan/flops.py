"""FLOPs of a function, counted in its jaxpr: matrix products and convolutions, two for each multiply-add,
loops times their length.

XLA's own count takes the body of a loop once, whatever its length, which is why it is not used. Left out:
everything that is done element by element (about a percent of a transformer at real sizes), and whatever the
compiler finds that it can spare.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


def of(function: Callable, *shapes: Any) -> int:
    """FLOPs of `function(*shapes)` on all devices together.

    >>> import jax.numpy as jnp
    >>> x, w = jax.ShapeDtypeStruct((2, 3), "float32"), jax.ShapeDtypeStruct((3, 5), "float32")
    >>> of(lambda x, w: jnp.tanh(x @ w), x, w)
    60
    """
    return _of(jax.make_jaxpr(function)(*shapes))


def _of(jaxpr: Any) -> int:
    return sum(_of_equation(eqn) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _of_equation(eqn: Any) -> int:
    name = eqn.primitive.name
    if name == "dot_general":
        (summed, _), _ = eqn.params["dimension_numbers"]
        left = eqn.invars[0].aval.shape
        return 2 * eqn.outvars[0].aval.size * math.prod(left[axis] for axis in summed)
    if name == "conv_general_dilated":
        kernel, features = eqn.invars[1].aval, eqn.params["dimension_numbers"].rhs_spec[0]
        return 2 * eqn.outvars[0].aval.size * kernel.size // kernel.shape[features]
    if name == "cond":
        return max(_of(branch) for branch in eqn.params["branches"])
    # A `while` whose length is not known counts once; a step has one only where nothing is multiplied (random
    # bits).
    return (eqn.params["length"] if name == "scan" else 1) * sum(map(_of, _inner(eqn.params.values())))


def _inner(values: Any) -> Iterator[Any]:
    """The jaxprs among the parameters of an equation, closed or not."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from _inner(value)
        elif hasattr(getattr(value, "jaxpr", value), "eqns"):
            yield value
