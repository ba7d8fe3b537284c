"""Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices (Zi et al., arXiv
2309.02411).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._lowrank.factored import Canonical, Term
from .._paths import is_shape
from .._tree.method import Method, Spec
from .._tree.nodes import Adapter, Fixed
from .._tree.pairs import paired
from . import _lowrank


@dataclasses.dataclass(frozen=True)
class DeltaLoRA(_lowrank.LowRank):
    r"""LoRA whose base follows: after every update `W ← W + ratio·s·(A·B − its old value)` (paper, algorithm
    1).

    >>> import jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((64, 32))}
    >>> frozen, delta = lora_jax.lorafy(params, "kernel", method=lora_jax.DeltaLoRA(rank=4))
    >>> sorted(delta["kernel"].arrays), sorted(frozen["kernel"].arrays)
    (['a', 'b'], ['start_a', 'start_b'])

    The updates telescope. With A_s and B_s as they were when W began to follow,

        W' = W₀ + s·A·B + sg(ratio·s·(A·B − A_s·B_s)),

    sg being `stop_gradient`: exactly the algorithm, for a ratio that is constant from then on, with W₀ left
    alone. In a base of few bits the literal algorithm would lose its small steps; this form does not. There
    is no dropout, as the paper demands. The same adapter as a LoRA of rank 2r: `lora_jax.arithmetic.as_lora`.

    Args:
      rank, alpha, rs, init, dtype: as in `LoRA`.
      ratio: the paper's lambda. Its values for each task, like the number of steps before W follows, are
        unverified here.
      delayed: W follows only from when `start_delta` is called (the paper's first K steps are plain LoRA);
        otherwise at once.

    Shapes, for a weight (in, out): `a` (in, rank), `b` (rank, out); in `frozen` `start_a` and `start_b`, the
    same; layer axes come first.

    Raises:
      ValueError: an option out of range; (from `lorafy`) a rank above min(in, out).
    """

    rank: int = 8
    alpha: float = 16
    ratio: float = 2.0
    rs: bool = False
    init: str = "kaiming"
    dtype: Any = None
    delayed: bool = False

    proportional = False  # the start is subtracted

    @property
    def delayed_start(self) -> bool:
        return self.delayed

    def split(self, weight: jax.Array, spec: Spec, key: jax.Array) -> tuple[Any, Any]:
        trained = _lowrank.start(self, weight, spec, key)
        # Copies, here and in `start_delta`, because a training step may donate `delta`, and its buffers with
        # it.
        held = {} if self.delayed else {f"start_{name}": jnp.copy(array) for name, array in trained.items()}
        return Fixed(weight, held, spec) if held else weight, Adapter(trained, spec)

    def array_axes(self, spec: Spec) -> dict[str, tuple[int | None, ...]]:
        axes = _lowrank.axes_of(spec)
        return {"a": axes["a"], "b": axes["b"], "start_a": axes["a"], "start_b": axes["b"]}

    def canonical(
        self, weight: Any, fixed: dict, trained: dict, spec: Spec, key: jax.Array | None
    ) -> Canonical:
        a, b = trained["a"], trained["b"]
        if not fixed:
            return Canonical((Term(a, b, scale=self.scale),))
        held = lax.stop_gradient((a, b, fixed["start_a"], fixed["start_b"]))
        follows = self.ratio * self.scale
        return Canonical(
            (Term(a, b, scale=self.scale), Term(*held[:2], scale=follows), Term(*held[2:], scale=-follows))
        )

    def at_rank(self, trained: dict, spec: Spec, rank: int) -> tuple[Method, dict]:
        _lowrank.check_own_rank(self, spec, rank, "the start of A and B")
        return dataclasses.replace(self, init="kaiming", dtype=trained["b"].dtype), trained


def start_delta(frozen: Any, delta: Any) -> Any:
    """`frozen` with the present A and B of every Delta-LoRA adapter as its start: from here on the base
    follows.

    >>> import jax.numpy as jnp, lora_jax
    >>> method = lora_jax.DeltaLoRA(rank=2, delayed=True)
    >>> frozen, delta = lora_jax.lorafy({"kernel": jnp.ones((8, 4))}, "kernel", method=method)
    >>> sorted(lora_jax.methods.start_delta(frozen, delta)["kernel"].arrays)
    ['start_a', 'start_b']

    For `DeltaLoRA(delayed=True)`, before the first update that W shall follow. Adapters that follow already
    are left alone. The start is in the result alone, not in `delta`: save both.

    Raises:
      ValueError: there is no Delta-LoRA adapter whose base does not follow yet.
    """
    started = []

    def begun(leaf: Any, other: Any) -> Any:
        if (
            not isinstance(other, Adapter)
            or not isinstance(other.spec.method, DeltaLoRA)
            or isinstance(leaf, Fixed)
        ):
            return leaf
        started.append(other.spec.path)
        held = {name: array if is_shape(array) else jnp.copy(array) for name, array in other.arrays.items()}
        return Fixed(leaf, {f"start_{name}": array for name, array in held.items()}, other.spec)

    result = paired(begun, frozen, delta, resolve=False)
    if not started:
        raise ValueError(
            "`delta` holds no Delta-LoRA adapter that waits: `start_delta` is for "
            "`DeltaLoRA(delayed=True)`, and once."
        )
    return result
