"""What methods with an A and a B have in common: options and their errors, shapes, axes, the start of A,
padding.
"""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from .._lowrank.labels import widened
from .._tree.method import Method, Spec
from .._tree.nodes import Shared


def check_options(method: Method) -> None:
    """Raises `ValueError` for a `rank`, `alpha`, `dropout`, `init` or `dtype` out of range; `dtype`
    becomes a NumPy one.
    """
    options = vars(method)
    rank, dtype = options["rank"], options["dtype"]
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"`rank` is {rank!r}; it must be a positive integer.")
    for name in {"alpha", "dropout", "d_initial", "ratio"} & set(options):
        if isinstance(options[name], bool) or not isinstance(options[name], numbers.Real):
            raise ValueError(f"`{name}` is {options[name]!r}; it must be a number, because it is static.")
        if not math.isfinite(options[name]):
            raise ValueError(f"`{name}` is {options[name]!r}; it must be finite.")
    if not 0.0 <= options.get("dropout", 0.0) < 1.0:
        raise ValueError(f"`dropout` is {options['dropout']!r}; it must be at least 0 and below 1.")
    if options.get("init", "gaussian") not in ("gaussian", "kaiming"):
        raise ValueError(
            f"`init` is {options['init']!r}; pass 'gaussian' (the paper) or 'kaiming' (its code)."
        )
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"`dtype` is {dtype!r}; A and B need a floating-point dtype.")
    object.__setattr__(method, "dtype", None if dtype is None else jnp.dtype(dtype))


def check_low(method: Any, spec: Spec) -> None:
    """Raises `ValueError` for a rank above min(in, out)."""
    smaller = min(math.prod(spec.sizes("in")), math.prod(spec.sizes("out")))
    if method.rank > smaller:
        raise ValueError(
            f"`rank` is {method.rank}, above min(in, out) = {smaller} of {spec.path!r}, of shape "
            f"{spec.shape} with axes "
            f"{' '.join(spec.axes)!r}: it would not be low. Lower the rank, or train this leaf with `Full()`."
        )


def scale_of(method: Any) -> float:
    """s = alpha / rank, or alpha / sqrt(rank) where the method is rank-stabilised."""
    return method.alpha / (math.sqrt(method.rank) if getattr(method, "rs", False) else method.rank)


def dtype_of(method: Any, weight: Any) -> Any:
    """That of the factors: the method's own, or float32, or float64 for float64 weights."""
    return widened(jax.dtypes.canonicalize_dtype(weight.dtype)) if method.dtype is None else method.dtype


def shapes(spec: Spec, rank: int) -> dict[str, tuple[int, ...]]:
    """Of A (layers…, in…, rank), of B (layers…, rank, out…), and of what has one number for each rank,
    out axis or layer.
    """
    layers, ins, outs = (spec.sizes(word) for word in ("layer", "in", "out"))
    return {
        "a": (*layers, *ins, rank),
        "b": (*layers, rank, *outs),
        "inner": (*layers, rank),
        "outer": (*layers, *outs),
    }


def axes_of(spec: Spec) -> dict[str, tuple[int | None, ...]]:
    """The weight's axes that these run along; None for the rank."""
    layers, ins, outs = (spec.axis_indices(word) for word in ("layer", "in", "out"))
    return {
        "a": (*layers, *ins, None),
        "b": (*layers, None, *outs),
        "inner": (*layers, None),
        "outer": (*layers, *outs),
    }


def random_a(key: jax.Array, shape: tuple[int, ...], dtype: Any, spec: Spec, init: str) -> jax.Array:
    """N(0, 1/in), or U(±1/sqrt(in)) for `"kaiming"`. Stacked axes do not count into `in`."""
    bound = 1.0 / math.sqrt(math.prod(spec.sizes("in")))
    if init == "gaussian":
        return jax.random.normal(key, shape, dtype) * jnp.asarray(bound, dtype)
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def padded(array: Any, axis: int, count: int) -> Any:
    """`array` with `count` zeros behind it along the axis."""
    if isinstance(array, Shared) or count == 0:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, count)
    return jnp.pad(array, widths)


def only_own_rank(method: Any, spec: Spec, rank: int, fixed: str) -> None:
    """Raises `ValueError` where a method cannot be brought to another rank, because of an array that does
    not train.
    """
    if rank != method.rank:
        raise ValueError(
            f"the adapter of {spec.path!r} has rank {method.rank} and cannot be padded to {rank}: {fixed} "
            "is in `frozen`, of that rank. "
            "Stack adapters of one rank, or make plain ones of them first with "
            "`lora_jax.arithmetic.as_lora(frozen, delta)`."
        )
