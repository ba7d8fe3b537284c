"""Training the leaf itself: heads, biases (BitFit, Ben Zaken et al., ACL 2022), or everything (full
fine-tuning).
"""

import dataclasses
from typing import Any

import jax

from .._lowrank.factored import Canonical
from .._tree.method import Method, Spec


@dataclasses.dataclass(frozen=True)
class Full(Method):
    """Trains the leaf itself: it moves from `frozen`, which keeps None, to `delta`.

    >>> import jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}
    >>> lora_jax.lorafy(params, {"bias": lora_jax.Full()}).delta  # BitFit
    {'bias': Array([0., 0.], dtype=float32), 'kernel': None}

    Takes leaves of any shape and keeps their dtype. `{".*": Full()}` is full fine-tuning.
    """

    needs_axes = False

    def split(self, weight: jax.Array, spec: Spec, key: jax.Array) -> tuple[Any, Any]:
        return None, weight

    def array_axes(self, spec: Spec) -> dict[str, tuple[int | None, ...]]:
        return {}

    def canonical(
        self, weight: Any, fixed: dict, trained: dict, spec: Spec, key: jax.Array | None
    ) -> Canonical:
        return Canonical(terms=())

    def at_rank(self, trained: dict, spec: Spec, rank: int) -> tuple[Method, dict]:
        return self, trained
