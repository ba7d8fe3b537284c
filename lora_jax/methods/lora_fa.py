"""LoRA-FA: Memory-efficient Low-rank Adaptation (Zhang et al., arXiv 2308.03303)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .._lowrank.factored import Canonical, Term
from .._tree.method import Method, Spec
from .._tree.nodes import Adapter, Fixed
from . import _factors


@dataclasses.dataclass(frozen=True)
class LoRAFA(Method):
    r"""`W' = W + s·A·B` with A random and frozen: B alone trains (paper, section 3).

    >>> import jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((64, 32))}
    >>> frozen, delta = lora_jax.lorafy(params, "kernel", method=lora_jax.LoRAFA(rank=4))
    >>> {name: array.shape for name, array in delta["kernel"].arrays.items()}
    {'b': (4, 32)}

    The gradient of B needs `x·A`, of width rank, and nothing else of the layer's input: no array as wide as x
    waits for the backward pass on this layer's account. (With dropout, its mask does.) A is in `frozen`. The
    corrected gradient of PEFT's optimiser is `lora_jax.optim.lorafa`.

    Args:
      rank, alpha, dropout, rs, init, dtype: as in `LoRA`.

    Shapes, for a weight (in, out): `b` (rank, out); in `frozen`, `a` (in, rank); layer axes come first.

    Raises:
      ValueError: an option out of range; (from `lorafy`) a rank above min(in, out).
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    rs: bool = False
    init: str = "gaussian"
    dtype: Any = None

    needs_axes = True
    sided = True

    def __post_init__(self) -> None:
        _factors.check_options(self)

    @property
    def scale(self) -> float:
        return _factors.scale_of(self)

    @property
    def random(self) -> bool:
        return self.dropout > 0.0

    def check(self, spec: Spec) -> None:
        _factors.check_low(self, spec)

    def split(self, weight: jax.Array, spec: Spec, key: jax.Array) -> tuple[Any, Any]:
        dtype, sizes = _factors.dtype_of(self, weight), _factors.shapes(spec, self.rank)
        a = _factors.random_a(key, sizes["a"], dtype, spec, self.init)
        return Fixed(weight, {"a": a}, spec), Adapter({"b": jnp.zeros(sizes["b"], dtype)}, spec)

    def array_axes(self, spec: Spec) -> dict[str, tuple[int | None, ...]]:
        axes = _factors.axes_of(spec)
        return {"a": axes["a"], "b": axes["b"]}

    def canonical(
        self, weight: Any, fixed: dict, trained: dict, spec: Spec, key: jax.Array | None
    ) -> Canonical:
        a = jax.lax.stop_gradient(fixed["a"])
        return Canonical((Term(a, trained["b"], scale=self.scale),), dropout=self.dropout)

    def at_rank(self, trained: dict, spec: Spec, rank: int) -> tuple[Method, dict]:
        _factors.only_own_rank(self, spec, rank, "A")
        b = trained["b"]
        method = dataclasses.replace(self, alpha=rank, rs=False, init="gaussian", dtype=b.dtype)
        return method, {"b": b * jnp.asarray(self.scale, b.dtype)}
