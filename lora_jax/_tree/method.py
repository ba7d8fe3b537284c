"""What a method of adaptation is to the core: the interface behind `LoRA`, `Full` and the others.

The core never asks which method it has. A method says how a leaf is split into what stays and what trains,
and what the canonical form of the pair is; the function transform, the merge, sharding and checkpoints need
no more.
"""

import abc
import dataclasses
from typing import Any

import jax

from .._lowrank.factored import Canonical


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is known of one adapted leaf before any array exists: static and hashable.

    `axes` has one word for each axis of the weight: `in`, `out` or `layer` (stacked). `group` is what a
    `Grouped` method noted of the leaves that share arrays with this one.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    method: "Method"
    group: Any = None

    def axis_indices(self, word: str) -> tuple[int, ...]:
        return tuple(index for index, axis in enumerate(self.axes) if axis == word)

    def sizes(self, word: str) -> tuple[int, ...]:
        return tuple(self.shape[index] for index in self.axis_indices(word))


class Method(abc.ABC):
    """A way to adapt one leaf: a frozen dataclass, passed as a value."""

    @property
    @abc.abstractmethod
    def needs_axes(self) -> bool:
        """Whether the weight's axes must be known; a method that trains the leaf itself does not care."""

    @property
    @abc.abstractmethod
    def sided(self) -> bool:
        """Whether exchanging the in and the out axes gives a different method, not just another name for
        it.
        """

    @property
    @abc.abstractmethod
    def random(self) -> bool:
        """Whether the training forward pass draws random numbers, and so wants a key from `combine`."""

    @abc.abstractmethod
    def check(self, spec: Spec) -> None:
        """Raise `ValueError` if a leaf of this shape and these axes cannot be adapted."""

    @abc.abstractmethod
    def split(self, weight: jax.Array, spec: Spec, key: jax.Array) -> tuple[Any, Any]:
        """The leaf of `frozen` and the leaf of `delta` for this weight: the start of training."""

    @abc.abstractmethod
    def array_axes(self, spec: Spec) -> dict[str, tuple[int | None, ...]]:
        """For each array of the method, trained or fixed, the weight axis that each of its axes runs along;
        None for rank and block axes."""

    @abc.abstractmethod
    def canonical(
        self, weight: Any, fixed: dict, trained: dict, spec: Spec, key: jax.Array | None
    ) -> Canonical:
        """The adapter as `W' = (W + A·B) ⊙ m`. `weight` may be packed: read it by
        `_packed.layer_by_layer` or not at all.
        """

    @abc.abstractmethod
    def at_rank(self, trained: dict, spec: Spec, rank: int) -> tuple["Method", dict]:
        """The same adapter at a rank as large or larger and with its scale folded in, so that adapters of
        different rank stack; `ValueError` if another rank is impossible because of what is fixed."""


class Grouped(Method):
    """A method some of whose leaves share arrays."""

    @abc.abstractmethod
    def grouped(self, specs: tuple[Spec, ...]) -> tuple[Spec, ...]:
        """The same specs with `group` filled in, given those of all leaves with this very method."""


class Late(Method):
    """A method whose arrays in `frozen` may come later."""

    @property
    @abc.abstractmethod
    def waits(self) -> bool:
        """Whether they may still be missing."""


class DependsOnWeight(Method):
    """A method that keeps something which follows from the weight, and must be made again when that is
    quantised.
    """

    @abc.abstractmethod
    def derived(self, weight: Any, spec: Spec) -> dict[str, jax.Array]:
        """Those fixed arrays, for this weight."""
