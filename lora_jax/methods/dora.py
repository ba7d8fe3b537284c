"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al., ICML 2024, arXiv 2402.09353)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._lowrank.factored import Canonical, Term
from .._lowrank.labels import aligned, dot, dot_labels, RANK, widened
from .._mesh import sharding_like
from .._packed.lazy import layer_by_layer
from .._tree.method import Method, Spec
from .._tree.nodes import Adapter, Fixed
from . import _lowrank


@dataclasses.dataclass(frozen=True)
class DoRA(_lowrank.LowRank):
    r"""`W' = m ⊙ V / ‖V‖` with `V = W + s·A·B`: LoRA for the direction of each output's weights, and its
    length m trained apart (paper, equation 5). ‖V‖ runs over the in axes and is held constant in the backward
    pass (section 4.3).

    >>> import jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((64, 32))}
    >>> frozen, delta = lora_jax.lorafy(params, "kernel", method=lora_jax.DoRA(rank=4))
    >>> {name: array.shape for name, array in delta["kernel"].arrays.items()}
    {'a': (64, 4), 'b': (4, 32), 'm': (32,)}

    V is never formed: `‖V‖² = ‖W‖² + 2s Σ (WᵀA) ⊙ Bᵀ + s² Σ (AᵀA B) ⊙ B`, with ‖W‖² computed once, kept in
    `frozen`. In float32 at least, because the sum cancels in fewer bits. m starts at ‖W‖, so training starts
    from the base exactly. An output whose weights are all zero has no direction: its m is left out until it
    has one.

    With dropout, the scaled base path sees the whole input and only the low-rank path the dropped one; PEFT
    runs the base a second time, on the dropped input. Without dropout the two agree.

    Args:
      rank, alpha, dropout, rs, init, dtype: as in `LoRA`; half of LoRA's rank is often enough (authors'
        notes).

    Shapes, for a weight (in, out): `a` (in, rank), `b` (rank, out), `m` (out,); layer axes come first.

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
    needs_whole_weight = True
    proportional = False  # m multiplies W too

    def split(self, weight: jax.Array, spec: Spec, key: jax.Array) -> tuple[Any, Any]:
        fixed = self.derived(weight, spec)
        trained = {**_lowrank.start(self, weight, spec, key), "m": jnp.sqrt(fixed["square"])}
        return Fixed(weight, fixed, spec), Adapter(trained, spec)

    def derived(self, weight: Any, spec: Spec) -> dict[str, jax.Array]:
        ins = tuple(
            axis - sum(layer < axis for layer in spec.axis_indices("layer"))
            for axis in spec.axis_indices("in")
        )
        wide = widened(weight.dtype)
        return {
            "square": layer_by_layer(
                lambda weight: jnp.sum(jnp.square(weight.astype(wide)), axis=ins),
                weight,
                spec.axis_indices("layer"),
            )
        }

    def array_axes(self, spec: Spec) -> dict[str, tuple[int | None, ...]]:
        axes = _lowrank.axes_of(spec)
        return {"a": axes["a"], "b": axes["b"], "m": axes["outer"], "square": axes["outer"]}

    def canonical(
        self, weight: Any, fixed: dict, trained: dict, spec: Spec, key: jax.Array | None
    ) -> Canonical:
        a, b = trained["a"], trained["b"]
        held = lax.stop_gradient((weight, a, b, fixed["square"]))
        own = [axis for axis in range(len(spec.axes)) if spec.axes[axis] != "layer"]

        def norm(weight: jax.Array, a: jax.Array, b: jax.Array, square: jax.Array) -> jax.Array:
            return jnp.sqrt(jnp.maximum(square + self._added(weight, a, b, own, spec), 0.0))

        norms = layer_by_layer(norm, held[0], spec.axis_indices("layer"), *held[1:])
        m = jnp.where(norms > 0.0, trained["m"] / jnp.where(norms > 0.0, norms, 1.0), 1.0)
        return Canonical((Term(a, b, scale=self.scale),), magnitude=m, dropout=self.dropout)

    def _added(self, weight: jax.Array, a: jax.Array, b: jax.Array, own: list[int], spec: Spec) -> jax.Array:
        """`‖W + s A B‖² − ‖W‖²` of one layer, over the in axes."""
        wide, highest = widened(weight.dtype), lax.Precision.HIGHEST
        ins, outs = spec.axis_indices("in"), spec.axis_indices("out")
        a, b = a.astype(wide), b.astype(wide)
        of_a, of_b, other = (*ins, RANK), (RANK, *outs), (*ins, "other")
        where = sharding_like(b, of_b, dot_labels(own, of_a))
        product, labels = dot(weight.astype(wide), own, a, of_a, out_sharding=where, precision=highest)
        product = aligned(product, labels, of_b, b.shape)
        where = sharding_like(a, of_a, (RANK, "other"))
        gram, _ = dot(a, of_a, a, other, out_sharding=where, precision=highest)
        turned, _ = dot(gram, ("other", RANK), b, of_b, precision=highest)
        return jnp.sum(b * (2 * self.scale * product + self.scale**2 * turned), axis=0)

    def at_rank(self, trained: dict, spec: Spec, rank: int) -> tuple[Method, dict]:
        dtype = trained["b"].dtype
        method = dataclasses.replace(self, rank=rank, alpha=rank, rs=False, init="gaussian", dtype=dtype)
        return method, _lowrank.scaled_and_padded(self, trained, spec, rank)
