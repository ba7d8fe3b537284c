"""PiSSA: Principal Singular Values and Singular Vectors Adaptation (Meng et al., NeurIPS 2024, arXiv
2404.02948).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._lowrank.factored import Canonical, Term
from .._lowrank.labels import widened
from .._packed.packed import is_packed
from .._tree.method import Method, Spec
from .._tree.nodes import Adapter, Fixed
from . import _lowrank


@dataclasses.dataclass(frozen=True)
class PiSSA(_lowrank.LowRank):
    r"""`W' = W + s·(A·B − A₀·B₀)`, where A₀ and B₀, the start of A and B, are the principal singular vectors
    of W: LoRA on the part of W that matters most (paper, equations 2 to 4).

    >>> import jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((64, 32))}
    >>> frozen, delta = lora_jax.lorafy(params, "kernel", method=lora_jax.PiSSA(rank=4))
    >>> frozen["kernel"].weight.shape, sorted(frozen["kernel"].arrays)
    ((64, 32), ['start_a', 'start_b'])

    The paper trains A and B on the residual `W − s·A₀·B₀`. Here W stays what it is and the start is
    subtracted beside it: other adapters of the base stay right, a base of few bits loses nothing, and
    training starts from it exactly. `lora_jax.arithmetic.as_lora` gives the same adapter as a LoRA of rank
    2r. `quantize` quantises W, not the residual.

    Args:
      rank, alpha, rs, dtype: as in `LoRA`; the authors take alpha = rank, so that s = 1.
      dropout: as in `LoRA`, the authors advise against it: it drops the start too, which then no longer
        cancels.
      iterations: None for the exact decomposition; a number for so many power iterations of a randomised one
        (Halko et al.), faster for large weights and a little less exact.

    Shapes, for a weight (in, out): `a` (in, rank), `b` (rank, out); in `frozen` `start_a` and `start_b`, the
    same; layer axes come first.

    Raises:
      ValueError: an option out of range; (from `lorafy`) a rank above min(in, out).
    """

    rank: int = 8
    alpha: float = 8
    dropout: float = 0.0
    rs: bool = False
    dtype: Any = None
    iterations: int | None = None

    proportional = False  # the start is subtracted

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha <= 0:
            raise ValueError(
                f"`alpha` is {self.alpha!r}; it must be positive, because A and B start with the root of "
                "its inverse."
            )
        if self.iterations is not None and (
            isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 0
        ):
            raise ValueError(
                f"`iterations` is {self.iterations!r}; pass None (exact), or how many power iterations to "
                "do, for example 4."
            )

    def split(self, weight: jax.Array, spec: Spec, key: jax.Array) -> tuple[Any, Any]:
        if is_packed(weight):
            raise ValueError(
                f"{spec.path!r} is quantised, and `PiSSA` starts with the singular vectors of the weight "
                "from before: adapt first, then `quantize`."
            )
        layers, ins, outs = (spec.axis_indices(word) for word in ("layer", "in", "out"))
        sizes = _lowrank.shapes(spec, self.rank)
        matrices = lax.transpose(weight.astype(widened(weight.dtype)), (*layers, *ins, *outs))
        matrices = matrices.reshape(*spec.sizes("layer"), math.prod(spec.sizes("in")), -1)
        u, values, v = self._decomposed(matrices, key)
        root = jnp.sqrt(values / self.scale)
        dtype = _lowrank.dtype_of(self, weight)
        a = (u * root[..., None, :]).reshape(sizes["a"]).astype(dtype)
        b = (v * root[..., :, None]).reshape(sizes["b"]).astype(dtype)
        # Copies, because a training step may donate `delta`, and its buffers with it.
        return Fixed(weight, {"start_a": jnp.copy(a), "start_b": jnp.copy(b)}, spec), Adapter(
            {"a": a, "b": b}, spec
        )

    def _decomposed(self, matrices: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The first `rank` singular vectors and values."""
        basis = None
        if self.iterations is not None:
            more = min(
                self.rank + 10, *matrices.shape[-2:]
            )  # a few directions too many, as in the randomised method's own analysis
            basis = matrices @ jax.random.normal(
                key, (*matrices.shape[:-2], matrices.shape[-1], more), matrices.dtype
            )
            basis = jnp.linalg.qr(basis)[0]
            for _ in range(self.iterations):
                turned = jnp.linalg.qr(jnp.matrix_transpose(matrices) @ basis)[0]
                basis = jnp.linalg.qr(matrices @ turned)[0]
            matrices = jnp.matrix_transpose(basis) @ matrices
        u, values, v = jnp.linalg.svd(matrices, full_matrices=False)
        u = u if basis is None else basis @ u
        return u[..., : self.rank], values[..., : self.rank], v[..., : self.rank, :]

    def array_axes(self, spec: Spec) -> dict[str, tuple[int | None, ...]]:
        axes = _lowrank.axes_of(spec)
        return {"a": axes["a"], "b": axes["b"], "start_a": axes["a"], "start_b": axes["b"]}

    def canonical(
        self, weight: Any, fixed: dict, trained: dict, spec: Spec, key: jax.Array | None
    ) -> Canonical:
        start = lax.stop_gradient((fixed["start_a"], fixed["start_b"]))
        terms = (Term(trained["a"], trained["b"], scale=self.scale), Term(*start, scale=-self.scale))
        return Canonical(terms, dropout=self.dropout)

    def at_rank(self, trained: dict, spec: Spec, rank: int) -> tuple[Method, dict]:
        _lowrank.check_own_rank(self, spec, rank, "the start of A and B")
        return self, trained
