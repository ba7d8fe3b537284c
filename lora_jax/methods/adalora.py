"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (Zhang et al., ICLR 2023, arXiv
2303.10512).

Here are its form and its regulariser. The importance scores, and the budget by which ranks are given up, are
an update rule: `lora_jax.optim.adalora`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .._lowrank.factored import Canonical, Term
from .._lowrank.labels import dot, RANK
from .._mesh import sharding_like
from .._tree.method import Method, Spec
from .._tree.nodes import Adapter, adapters_of
from . import _lowrank


@dataclasses.dataclass(frozen=True)
class AdaLoRA(_lowrank.LowRank):
    r"""`W' = W + s·A·diag(e)·B`, a singular value decomposition whose ranks can be given up by setting
    entries of e to zero (paper, equation 3); `s = alpha / rank`, with the rank at the start, however many are
    left.

    >>> import jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((64, 32))}
    >>> frozen, delta = lora_jax.lorafy(params, "kernel", method=lora_jax.AdaLoRA(rank=12))
    >>> {name: array.shape for name, array in delta["kernel"].arrays.items()}
    {'a': (64, 12), 'b': (12, 32), 'e': (12,)}
    >>> float(lora_jax.methods.orthogonality(delta)) > 0  # to be added to the loss
    True

    A and B start as N(0, 0.02²) and e at zero, so training starts from the base exactly. As in the authors'
    code, and PEFT's, the divisor is `rank + 1e-5`.

    Args:
      rank: at the start; the final average is `optim.adalora`'s `target_rank`.
      alpha, dropout, dtype: as in `LoRA`.

    Shapes, for a weight (in, out): `a` (in, rank), `b` (rank, out), `e` (rank,); layer axes come first.

    Raises:
      ValueError: an option out of range; (from `lorafy`) a rank above min(in, out).
    """

    rank: int = 12
    alpha: float = 16
    dropout: float = 0.0
    dtype: Any = None

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank + 1e-5)

    def split(self, weight: jax.Array, spec: Spec, key: jax.Array) -> tuple[Any, Any]:
        dtype, sizes = _lowrank.dtype_of(self, weight), _lowrank.shapes(spec, self.rank)
        a, b = (
            jax.random.normal(own, sizes[name], dtype) * jnp.asarray(0.02, dtype)
            for name, own in zip("ab", jax.random.split(key), strict=True)
        )
        return weight, Adapter({"a": a, "b": b, "e": jnp.zeros(sizes["inner"], dtype)}, spec)

    def array_axes(self, spec: Spec) -> dict[str, tuple[int | None, ...]]:
        axes = _lowrank.axes_of(spec)
        return {"a": axes["a"], "b": axes["b"], "e": axes["inner"]}

    def canonical(
        self, weight: Any, fixed: dict, trained: dict, spec: Spec, key: jax.Array | None
    ) -> Canonical:
        term = Term(trained["a"], trained["b"], inner=trained["e"], scale=self.scale)
        return Canonical((term,), dropout=self.dropout)

    def at_rank(self, trained: dict, spec: Spec, rank: int) -> tuple[Method, dict]:
        method = dataclasses.replace(self, rank=rank, alpha=rank + 1e-5, dtype=trained["b"].dtype)
        return method, _lowrank.scaled_and_padded(self, trained, spec, rank)


def orthogonality(delta: Any) -> jax.Array:
    """The mean of `‖AᵀA − I‖` and `‖B Bᵀ − I‖` over all AdaLoRA adapters: what keeps e a spectrum (paper,
    equation 4).

    >>> import jax.numpy as jnp, lora_jax
    >>> method = lora_jax.AdaLoRA(rank=2)
    >>> delta = lora_jax.lorafy({"kernel": jnp.ones((4, 4))}, "kernel", method=method).delta
    >>> delta["kernel"].arrays.update(a=jnp.eye(4)[:, :2], b=jnp.eye(4)[:2])
    >>> float(lora_jax.methods.orthogonality(delta))
    0.0

    Frobenius norms, not their squares, as in the authors' code. Add it to the loss, times 0.1 (paper) to 0.5
    (PEFT). Every layer of a stack counts as a matrix.

    Raises:
      ValueError: `delta` holds no AdaLoRA adapter, or adapters that `stack` has stacked.
    """
    norms = []
    for node in adapters_of(delta).values():
        if isinstance(node.spec.method, AdaLoRA):
            rank, layers = node.spec.method.rank, len(node.spec.sizes("layer"))
            a, b = node.arrays["a"], node.arrays["b"]
            if a.ndim != len(node.array_axes()["a"]):
                raise ValueError(
                    f"`delta` holds stacked adapters at {node.spec.path!r}: `jax.vmap` this over them, or "
                    "`take` one."
                )
            a = a.reshape(*a.shape[:layers], -1, rank)
            b = b.reshape(*b.shape[: layers + 1], -1)
            lead = tuple(range(layers))
            for factor, labels, others in (
                (a, (*lead, "in", RANK), (*lead, "in", "other")),
                (b, (*lead, RANK, "out"), (*lead, "other", "out")),
            ):
                gram, _ = dot(
                    factor,
                    labels,
                    factor,
                    others,
                    keep=lead,
                    out_sharding=sharding_like(factor, labels, (*lead, RANK, "other")),
                )
                squares = jnp.sum(
                    jnp.square(gram - jnp.broadcast_to(jnp.eye(rank, dtype=gram.dtype), gram.shape)),
                    axis=(-2, -1),
                )
                # The root has no derivative at zero; like PyTorch's norm, this one has zero there.
                some = squares > 0
                norms.append(jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1.0)), 0.0).reshape(-1))
    if not norms:
        raise ValueError(
            "`delta` holds no AdaLoRA adapter; pass the delta of `lorafy(..., method=AdaLoRA(...))`."
        )
    return jnp.mean(jnp.concatenate(norms))
