"""DyLoRA: Parameter-Efficient Tuning using Dynamic Search-Free Low-Rank Adaptation (Valipour et al., EACL
2023, arXiv 2210.07558)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._lowrank.factored import Canonical, Term
from .._tree.method import Method, Spec
from .._tree.nodes import Adapter, is_node
from . import _lowrank
from .lora import LoRA


@dataclasses.dataclass(frozen=True)
class DyLoRA(_lowrank.LowRank):
    r"""`W' = W + (alpha/b)·A[:, :b]·B[:b]` with b drawn anew for every step, so that the first ranks learn to
    do without the others (paper, algorithm 1), and any b serves after training: `truncate`.

    >>> import jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((64, 32))}
    >>> frozen, delta = lora_jax.lorafy(params, "kernel", method=lora_jax.DyLoRA(rank=8))
    >>> lora_jax.methods.truncate(delta, 2)["kernel"].arrays["b"].shape
    (2, 32)

    b is uniform on 1 … rank and the same for all leaves and layers of a step. It is drawn from the key that
    `combine` is given; without one, b is the rank. A is masked, not sliced, so b costs no compilation.

    Args:
      rank: the largest.
      alpha, dropout, init, dtype: as in `LoRA`.
      train: `"last"`, only the b-th column of A and row of B get a gradient, which is how the authors train;
        `"all"`, the first b do. An optimiser with momentum or weight decay moves the others all the same, as
        it does in their code.

    Shapes, for a weight (in, out): `a` (in, rank), `b` (rank, out); layer axes come first.

    Raises:
      ValueError: an option out of range; (from `lorafy`) a rank above min(in, out).
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    init: str = "gaussian"
    dtype: Any = None
    train: str = "last"

    random = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train not in ("last", "all"):
            raise ValueError(
                f"`train` is {self.train!r}; pass 'last' (only the b-th rank of a step gets a gradient) or "
                "'all' (the first b)."
            )

    def split(self, weight: jax.Array, spec: Spec, key: jax.Array) -> tuple[Any, Any]:
        return weight, Adapter(_lowrank.start(self, weight, spec, key), spec)

    def array_axes(self, spec: Spec) -> dict[str, tuple[int | None, ...]]:
        axes = _lowrank.axes_of(spec)
        return {"a": axes["a"], "b": axes["b"]}

    def canonical(
        self, weight: Any, fixed: dict, trained: dict, spec: Spec, key: jax.Array | None
    ) -> Canonical:
        a, b = trained["a"], trained["b"]
        if key is None:
            return Canonical((Term(a, b, scale=self.scale),), dropout=self.dropout)
        # Not folded with the path: one b for the whole model.
        last = jax.random.randint(key, (), 0, self.rank)
        ranks = jnp.arange(self.rank)
        if self.train == "last":
            row = (ranks == last)[:, *[None] * len(spec.sizes("out"))]
            a = jnp.where(jnp.broadcast_to(ranks == last, a.shape), a, lax.stop_gradient(a))
            b = jnp.where(jnp.broadcast_to(row, b.shape), b, lax.stop_gradient(b))
        kept = jnp.where(ranks <= last, self.alpha / (last + 1).astype(a.dtype), jnp.zeros((), a.dtype))
        inner = jnp.broadcast_to(kept, (*spec.sizes("layer"), self.rank))
        return Canonical((Term(a, b, inner=inner),), dropout=self.dropout)

    def at_rank(self, trained: dict, spec: Spec, rank: int) -> tuple[Method, dict]:
        # Its scale depends on b, and the ranks that padding adds would be drawn too.
        _lowrank.check_own_rank(self, spec, rank, "the number of ranks to draw from")
        return dataclasses.replace(self, init="gaussian", dtype=trained["b"].dtype), trained


def truncate(delta: Any, rank: int) -> Any:
    """The first `rank` ranks of every DyLoRA adapter, as plain LoRA adapters of scale alpha / rank: what was
    trained for it.

    >>> import jax.numpy as jnp, lora_jax
    >>> method = lora_jax.DyLoRA(rank=8)
    >>> delta = lora_jax.lorafy({"kernel": jnp.ones((64, 32))}, "kernel", method=method).delta
    >>> lora_jax.methods.truncate(delta, 2)["kernel"].arrays["b"].shape
    (2, 32)

    Exact: merged or not, the result computes what DyLoRA did in a step that drew this rank. Other leaves are
    unchanged.

    Raises:
      ValueError: `rank` is below 1 or above an adapter's; no DyLoRA adapter in `delta`.
    """
    nodes = [node for node in jax.tree.leaves(delta, is_leaf=is_node) if _dynamic(node)]
    if not nodes:
        raise ValueError(
            "`delta` holds no DyLoRA adapter; only those are trained to be truncated. See "
            "`lora_jax.arithmetic.compress` for others."
        )
    smallest = min(nodes, key=lambda node: node.spec.method.rank)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= smallest.spec.method.rank:
        raise ValueError(
            f"`rank` is {rank!r}; {smallest.spec.path!r} can be truncated to 1 … {smallest.spec.method.rank}."
        )

    def first(node: Any) -> Any:
        if not _dynamic(node):
            return node
        old, axis = node.spec.method, len(node.spec.sizes("layer"))
        method = LoRA(rank=rank, alpha=old.alpha, dropout=old.dropout, init=old.init, dtype=old.dtype)
        arrays = {
            "a": node.arrays["a"][..., :rank],
            "b": lax.slice_in_dim(node.arrays["b"], 0, rank, axis=axis),
        }
        return Adapter(arrays, dataclasses.replace(node.spec, method=method))

    return jax.tree.map(first, delta, is_leaf=is_node)


def _dynamic(node: Any) -> bool:
    return isinstance(node, Adapter) and isinstance(node.spec.method, DyLoRA)
