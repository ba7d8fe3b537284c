"""LoRA on a stacked leaf whose layers share adapters, as LoRA-drop leaves it (`lora_jax.drop`)."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._lowrank.factored import Canonical, Term
from .._tree.method import Method, Spec
from .._tree.nodes import Adapter
from . import _lowrank
from .lora import LoRA


@dataclasses.dataclass(frozen=True)
class Slots(Method):
    """LoRA on a stacked leaf, some of whose layers share an A and a B: layer i has those of slot `slots[i]`.

    What `share` makes of a stacked leaf; `LoRA` itself is the case of a slot for each layer. Shapes: `a`
    (slots, in, rank), `b` (slots, rank, out).
    """

    method: LoRA
    slots: tuple[int, ...]

    proportional = True

    @property
    def rank(self) -> int:
        return self.method.rank

    @property
    def random(self) -> bool:
        return self.method.random

    @property
    def count(self) -> int:
        return max(self.slots) + 1

    def check(self, spec: Spec) -> None:
        self.method.check(spec)
        if math.prod(spec.sizes("layer")) != len(self.slots) or self.method.blocks is not None:
            raise ValueError(
                f"`slots` names {len(self.slots)} layers, and {spec.path!r} has "
                f"{math.prod(spec.sizes('layer'))}; `blocks` have no slots."
            )

    def split(self, weight: jax.Array, spec: Spec, key: jax.Array) -> tuple[Any, Any]:
        sizes, layers = _lowrank.shapes(spec, self.rank), len(spec.sizes("layer"))
        dtype = _lowrank.dtype_of(self.method, weight)
        a = _lowrank.random_a(key, (self.count, *sizes["a"][layers:]), dtype, spec, self.method.init)
        return weight, Adapter({"a": a, "b": jnp.zeros((self.count, *sizes["b"][layers:]), dtype)}, spec)

    def array_axes(self, spec: Spec) -> dict[str, tuple[int | None, ...]]:
        axes, layers = _lowrank.axes_of(spec), len(spec.sizes("layer"))
        return {name: (None, *axes[name][layers:]) for name in "ab"}

    def canonical(
        self, weight: Any, fixed: dict, trained: dict, spec: Spec, key: jax.Array | None
    ) -> Canonical:
        layers = spec.sizes("layer")
        a, b = (
            array[np.array(self.slots)].reshape(*layers, *array.shape[1:])
            for array in (trained["a"], trained["b"])
        )
        return Canonical((Term(a, b, scale=self.method.scale),), dropout=self.method.dropout)

    def at_rank(self, trained: dict, spec: Spec, rank: int) -> tuple[Method, dict]:
        one = dataclasses.replace(
            spec,
            shape=(self.count, *spec.shape[len(spec.sizes("layer")) :]),
            axes=("layer", *spec.axes[len(spec.sizes("layer")) :]),
        )
        method, arrays = self.method.at_rank(trained, one, rank)
        assert isinstance(method, LoRA)
        return dataclasses.replace(self, method=method), arrays
