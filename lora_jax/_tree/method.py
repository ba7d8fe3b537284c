"""What a method of adaptation is to the core: the interface behind `LoRA`, `Full` and the others.

The core never asks which method it has. A method says how a leaf is split into what stays and what trains,
and what the canonical form of the two is. The function transform, the merge, sharding and checkpoints need no
more.
"""

import abc
import dataclasses
from collections.abc import Iterable
from typing import Any

import jax

from .._lowrank.factored import Canonical


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is known of one adapted leaf before any array exists: static and hashable.

    `axes` has one word for each axis of the weight: `in`, `out` or `layer` (stacked). `group` is what
    `Method.grouped` noted of the leaves that share arrays with this one.
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


# What PEFT calls our options.
_OF_PEFT = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rs",
    "init_lora_weights": "init",
}
_OF_LORAFY = {"target_modules": "targets", "modules_to_save": "targets", "rank_pattern": "targets"}


class _MethodType(abc.ABCMeta):
    """Answers PEFT's words with ours."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        for word in options.keys() & _OF_PEFT.keys():
            ours = _OF_PEFT[word]
            raise TypeError(f"`{word}` is PEFT's word for `{ours}`: write `{cls.__name__}({ours}=...)`.")
        for word in options.keys() & _OF_LORAFY.keys():
            raise TypeError(
                f"`{word}` is PEFT's, and a method does not know its targets: write `lorafy(params, "
                f"targets={{pattern: {cls.__name__}(...)}})`, with `Full()` for what trains itself."
            )
        return super().__call__(*args, **options)


class Method(metaclass=_MethodType):
    """A way to adapt one leaf: a frozen dataclass, passed as a value.

    The abstract members are what makes a method. The others have the value that most methods need.
    """

    # Whether the weight's axes must be known. A method that trains the leaf itself does not care.
    needs_axes: bool = True
    # Whether the canonical form needs the whole weight, and not the part of it that a device holds.
    needs_whole_weight: bool = False
    # Whether what the adapter adds is proportional to its `b`, so that zeros add nothing.
    proportional: bool = False

    @property
    def name(self) -> str:
        """As errors and tables call it."""
        return type(self).__name__

    @property
    def sided(self) -> bool:
        """Whether exchanging the in and the out axes gives another method, not the same one transposed."""
        return False

    @property
    def random(self) -> bool:
        """Whether the forward pass in training draws random numbers, and so needs a key from `combine`."""
        return False

    @property
    def delayed_start(self) -> bool:
        """Whether the arrays of the method in `frozen` may still be missing."""
        return False

    def check(self, spec: Spec) -> None:
        """Raises `ValueError` if a leaf of this shape and these axes cannot be adapted."""

    def grouped(self, specs: tuple[Spec, ...]) -> tuple[Spec, ...]:
        """The specs of all leaves with this very method, with `group` filled in where leaves share arrays."""
        return specs

    def derived(self, weight: Any, spec: Spec) -> dict[str, jax.Array]:
        """The fixed arrays that follow from the weight. They are made again when the weight is quantised."""
        return {}

    @abc.abstractmethod
    def split(self, weight: Any, spec: Spec, key: jax.Array) -> tuple[Any, Any]:
        """The leaf of `frozen` and the leaf of `delta` for this weight: the start of training."""

    @abc.abstractmethod
    def array_axes(self, spec: Spec) -> dict[str, tuple[int | None, ...]]:
        """For each array of the method, trained or fixed: the weight's axis that each of its axes runs along.

        The rank and the blocks run along no axis of the weight: None.
        """

    @abc.abstractmethod
    def canonical(
        self, weight: Any, fixed: dict, trained: dict, spec: Spec, key: jax.Array | None
    ) -> Canonical:
        """The adapter as `W' = (W + A·B) ⊙ m`.

        `weight` may be packed: read it by `layer_by_layer` or not at all.
        """

    @abc.abstractmethod
    def at_rank(self, trained: dict, spec: Spec, rank: int) -> tuple["Method", dict]:
        """The same adapter at a rank as large or larger, with its scale in B: so that adapters stack.

        Raises `ValueError` if what is fixed allows no other rank.
        """


def grouped(specs: Iterable[Spec]) -> dict[str, Spec]:
    """The specs by path, after each method has seen those of all its leaves together."""
    found = {spec.path: spec for spec in specs}
    for method in dict.fromkeys(spec.method for spec in found.values()):
        own = tuple(spec for spec in found.values() if spec.method == method)
        found.update((spec.path, spec) for spec in method.grouped(own))
    return found
