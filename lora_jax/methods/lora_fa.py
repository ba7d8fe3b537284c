"""LoRA-FA: Memory-efficient Low-rank Adaptation (Zhang et al., arXiv 2308.03303)."""

import dataclasses
from typing import Any

import jax

from .._lowrank.factored import Canonical, Term
from .._tree.method import Method, Spec
from .._tree.nodes import Adapter, Fixed
from . import _lowrank


@dataclasses.dataclass(frozen=True)
class LoRAFA(_lowrank.LowRank):
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

    sided = True

    def split(self, weight: jax.Array, spec: Spec, key: jax.Array) -> tuple[Any, Any]:
        factors = _lowrank.start(self, weight, spec, key)
        return Fixed(weight, {"a": factors["a"]}, spec), Adapter({"b": factors["b"]}, spec)

    def array_axes(self, spec: Spec) -> dict[str, tuple[int | None, ...]]:
        axes = _lowrank.axes_of(spec)
        return {"a": axes["a"], "b": axes["b"]}

    def canonical(
        self, weight: Any, fixed: dict, trained: dict, spec: Spec, key: jax.Array | None
    ) -> Canonical:
        a = jax.lax.stop_gradient(fixed["a"])
        return Canonical((Term(a, trained["b"], scale=self.scale),), dropout=self.dropout)

    def at_rank(self, trained: dict, spec: Spec, rank: int) -> tuple[Method, dict]:
        _lowrank.check_own_rank(self, spec, rank, "A")
        dtype = trained["b"].dtype
        method = dataclasses.replace(self, alpha=rank, rs=False, init="gaussian", dtype=dtype)
        return method, _lowrank.scaled_and_padded(self, trained, spec, rank)
