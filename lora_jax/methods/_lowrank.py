"""What the methods with an A and a B have in common: their options, scale and shapes, and the start of A."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from .._lowrank.labels import scaled_by, widened
from .._tree.method import Method, Spec


Axes = tuple[int | None, ...]


class LowRank(Method):
    """A method that adds `s·A·B` of a low rank: `s = alpha / rank`, or `alpha / sqrt(rank)` with `rs`.

    A subclass is a frozen dataclass with the fields `rank`, `alpha` and `dtype`, and those of `dropout`, `rs`
    and `init` that it has.
    """

    proportional = True

    rank: int
    alpha: float
    dtype: Any
    dropout: float = 0.0
    rs: bool = False
    init: str = "gaussian"

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def scale(self) -> float:
        """s, by which A·B is multiplied."""
        return self.alpha / (math.sqrt(self.rank) if self.rs else self.rank)

    @property
    def random(self) -> bool:
        return self.dropout > 0.0

    def check(self, spec: Spec) -> None:
        smaller = min(math.prod(spec.sizes("in")), math.prod(spec.sizes("out")))
        if self.rank > smaller:
            raise ValueError(
                f"`rank` is {self.rank}, above min(in, out) = {smaller} of {spec.path!r}, of shape "
                f"{spec.shape} with axes {' '.join(spec.axes)!r}: it would not be low. Lower the rank, or "
                f"train this leaf itself, first in a mapping: `targets={{{spec.path!r}: Full(), ...}}`."
            )


def check_options(method: Any) -> None:
    """Raises `ValueError` for an option out of range. `dtype` becomes a NumPy one."""
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


def dtype_of(method: Any, weight: Any) -> Any:
    """That of the factors: the method's own, or float32, or float64 for float64 weights."""
    return widened(jax.dtypes.canonicalize_dtype(weight.dtype)) if method.dtype is None else method.dtype


def shapes(spec: Spec, rank: int) -> dict[str, tuple[int, ...]]:
    """Of A (layers…, in…, rank), of B (layers…, rank, out…), and of what has one number for each rank, out
    axis or layer.
    """
    layers, ins, outs = (spec.sizes(word) for word in ("layer", "in", "out"))
    return {
        "a": (*layers, *ins, rank),
        "b": (*layers, rank, *outs),
        "inner": (*layers, rank),
        "outer": (*layers, *outs),
    }


def axes_of(spec: Spec) -> dict[str, Axes]:
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


def start(method: LowRank, weight: Any, spec: Spec, key: jax.Array) -> dict[str, jax.Array]:
    """A random and B zero, so that training starts from the base exactly."""
    dtype, sizes = dtype_of(method, weight), shapes(spec, method.rank)
    return {"a": random_a(key, sizes["a"], dtype, spec, method.init), "b": jnp.zeros(sizes["b"], dtype)}


def scaled_and_padded(method: LowRank, trained: dict, spec: Spec, rank: int) -> dict[str, Any]:
    """The arrays with the scale in B, and with zeros for the ranks above the method's own."""
    more = rank - method.rank
    # From the end, since a blocks axis may stand before the rank.
    rank_axis = {"a": -1, "b": -1 - len(spec.sizes("out")), "e": -1}

    def of(name: str, array: Any) -> Any:
        if name not in rank_axis:
            return array
        array = scaled_by(array, method.scale) if name == "b" else array
        widths = [(0, 0)] * array.ndim
        widths[rank_axis[name]] = (0, more)
        return jnp.pad(array, widths) if more else array

    return {name: of(name, array) for name, array in trained.items()}


def check_own_rank(method: Any, spec: Spec, rank: int, fixed: str) -> None:
    """Raises `ValueError` where a method has no other rank than its own, because of an array that does not
    train.
    """
    if rank != method.rank:
        raise ValueError(
            f"the adapter of {spec.path!r} has rank {method.rank} and cannot be padded to {rank}: {fixed} is "
            "in `frozen`, of that rank. "
            "Stack adapters of one rank, or make plain ones of them first with "
            "`lora_jax.arithmetic.as_lora(frozen, delta)`."
        )
