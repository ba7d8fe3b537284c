"""What every baseline is: a value that says which arrays it adds, and how a module's call changes."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax

from ..methods import Full


@dataclasses.dataclass(frozen=True)
class New:
    """An array that `draw(key, dtype)` makes, or so many of them, one a layer, on a first axis."""

    path: str
    draw: Callable[[jax.Array, Any], jax.Array]
    layers: int | None = None


class Baseline(abc.ABC):
    """Subclasses are frozen dataclasses."""

    leaf: ClassVar[str]  # the pattern of what is added

    @property
    def targets(self) -> dict[str, Any]:
        """What trains, as `lorafy` takes it: everything that is added."""
        return {self.leaf: Full()}

    @abc.abstractmethod
    def added(self, model: Any, params: Any) -> list[New]:
        """The arrays that a model gets, beside the parameters `params`."""

    @abc.abstractmethod
    def interceptor(self, model: Any, input_ids: Any) -> Callable:
        """Flax's, for one call of `model.apply`: `(next_fun, args, kwargs, context) -> result`."""


def own(module: Any, name: str) -> Any:
    """The arrays of a baseline beside a module's parameters, or None."""
    return module.get_variable("params", name) if module.has_variable("params", name) else None
