"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., ICLR 2022, arXiv 2106.09685), and its
rank-stabilised scale (rsLoRA, Kalajdzievski, arXiv 2312.03732)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._lowrank.factored import Canonical, Term
from .._tree.method import Method, Spec
from .._tree.nodes import Adapter
from . import _lowrank


@dataclasses.dataclass(frozen=True)
class LoRA(_lowrank.LowRank):
    r"""`W' = W + s·A·B` with `s = alpha / rank`, or `alpha / sqrt(rank)` with `rs` (paper, section 4.1,
    equation 3).

    >>> import jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((64, 32))}
    >>> frozen, delta = lora_jax.lorafy(params, "kernel", method=lora_jax.LoRA(rank=4, alpha=32))
    >>> {name: array.shape for name, array in delta["kernel"].arrays.items()}
    {'a': (64, 4), 'b': (4, 32)}

    A starts random and B at zero, so training starts from the base exactly. The scale multiplies `x·A`, the
    narrowest array on the way.

    Args:
      rank: r, at most min(in, out) of the weight. For several in or out axes, their products.
      alpha: the scale's numerator; tuning it is like tuning the learning rate of A and B together (section
        4.1).
      dropout: rate in [0, 1), on the input of the low-rank path only; active where `combine` is given a key.
        Rows that are looked up (embeddings) are not dropped.
      rs: rank-stabilised scale, so that the size of the update does not shrink as the rank grows.
      init: of A: `"gaussian"`, N(0, 1/in), as the paper says; `"kaiming"`, U(±1/sqrt(in)), as its code does.
        Stacked axes do not count into `in`: every layer has an independent A.
      dtype: of A and B. None means float32, or float64 for a float64 weight.
      blocks: which of the equal slices of the only out axis to adapt, each with an A and a B of its own:
        `(True, False, True)` adapts query and value in GPT-2's fused c_attn, as the paper does.

    Shapes, for a weight (in, out): `a` (in, rank), `b` (rank, out); layer axes come first; with `blocks`,
    then the number of adapted blocks, and `out` is one block's.

    Raises:
      ValueError: `rank`, `alpha`, `dropout`, `init` or `blocks` out of range; (from `lorafy`) a rank above
        min(in, out), or `blocks` that do not divide the only out axis.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    rs: bool = False
    init: str = "gaussian"
    dtype: Any = None
    blocks: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks is not None:
            if isinstance(self.blocks, str) or not isinstance(self.blocks, Sequence):
                raise TypeError(
                    f"`blocks` is {self.blocks!r}; pass one truth value a block, for example `(True, False, "
                    "True)`."
                )
            object.__setattr__(self, "blocks", tuple(bool(block) for block in self.blocks))
            if not any(self.blocks):
                raise ValueError(
                    f"`blocks` is {self.blocks!r}: it adapts nothing. Set at least one of them to True."
                )

    @property
    def sided(self) -> bool:
        return self.blocks is not None

    def check(self, spec: Spec) -> None:
        if self.blocks is not None:
            if len(spec.sizes("out")) != 1:
                raise ValueError(
                    f"`blocks` needs exactly one out axis, and {spec.path!r} has the axes "
                    f"{' '.join(spec.axes)!r}. "
                    "Adapt it without `blocks`, or give its axes."
                )
            (axis,), (size,) = spec.axis_indices("out"), spec.sizes("out")
            if size % len(self.blocks):
                raise ValueError(
                    f"`blocks` has {len(self.blocks)} entries, which do not divide the out axis of "
                    f"{spec.path!r}, of size {size}."
                )
            shape = (*spec.shape[:axis], size // len(self.blocks), *spec.shape[axis + 1 :])
            spec = dataclasses.replace(spec, shape=shape)
        super().check(spec)

    def _shapes(self, spec: Spec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        layers, outs = spec.sizes("layer"), spec.sizes("out")
        if self.blocks is not None:
            layers, outs = (*layers, sum(self.blocks)), (outs[0] // len(self.blocks),)
        return (*layers, *spec.sizes("in"), self.rank), (*layers, self.rank, *outs)

    def split(self, weight: jax.Array, spec: Spec, key: jax.Array) -> tuple[Any, Any]:
        dtype = _lowrank.dtype_of(self, weight)
        a_shape, b_shape = self._shapes(spec)
        a = _lowrank.random_a(key, a_shape, dtype, spec, self.init)
        return weight, Adapter({"a": a, "b": jnp.zeros(b_shape, dtype)}, spec)

    def array_axes(self, spec: Spec) -> dict[str, tuple[int | None, ...]]:
        layers = (*spec.axis_indices("layer"), *([None] if self.blocks else []))
        # One block of a sharded out axis is not that axis: B keeps its blocks whole.
        outs = (None,) if self.blocks else spec.axis_indices("out")
        return {"a": (*layers, *spec.axis_indices("in"), None), "b": (*layers, None, *outs)}

    def canonical(
        self, weight: Any, fixed: dict, trained: dict, spec: Spec, key: jax.Array | None
    ) -> Canonical:
        a, b = trained["a"], trained["b"]
        if self.blocks is None:
            return Canonical((Term(a, b, scale=self.scale),), dropout=self.dropout)
        axis, size = len(spec.sizes("layer")), spec.sizes("out")[0] // len(self.blocks)
        starts = [index * size for index, block in enumerate(self.blocks) if block]
        pick = jax.lax.index_in_dim
        terms = (
            Term(
                pick(a, index, axis, keepdims=False),
                pick(b, index, axis, keepdims=False),
                window=(start, start + size),
                scale=self.scale,
            )
            for index, start in enumerate(starts)
        )
        return Canonical(tuple(terms), dropout=self.dropout)

    def at_rank(self, trained: dict, spec: Spec, rank: int) -> tuple[Method, dict]:
        # Options that mattered to the start alone get one value, so that adapters that differ in them stack.
        dtype = trained["b"].dtype
        method = dataclasses.replace(self, rank=rank, alpha=rank, rs=False, init="gaussian", dtype=dtype)
        return method, _lowrank.scaled_and_padded(self, trained, spec, rank)
