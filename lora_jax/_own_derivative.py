"""A mark for functions whose `custom_jvp` is their own derivative, only computed in another order.

`adapt` cannot hand a factored weight to a `custom_jvp`, and evaluating the function in its place would drop
the author's derivative. Of a function with this mark nothing is lost: where a weight of it is adapted, JAX's
derivative of the function itself is used.
"""

from collections.abc import Callable
from typing import Any

import jax


NAME = "own_derivative_of_lora_jax"


def own_derivative(function: Callable) -> Callable:
    """`function`, which a `custom_jvp` calls and does nothing else, with the mark: a jitted call of that
    name.

    >>> square = jax.custom_jvp(own_derivative(lambda x: x * x))
    >>> _ = square.defjvp(lambda x, t: (x[0] * x[0], 2 * (x[0] * t[0])))
    >>> float(jax.grad(square)(3.0))
    6.0
    """

    def marked(*args: Any) -> Any:
        return function(*args)

    marked.__name__ = marked.__qualname__ = NAME
    return jax.jit(marked)
