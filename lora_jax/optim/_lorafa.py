"""The corrected gradient of LoRA-FA (Zhang et al., arXiv 2308.03303), as in PEFT's `LoraFAOptimizer`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._lowrank.labels import widened
from .._tree.nodes import Adapter, method_of
from .._tree.pairs import paired
from ..methods.lora_fa import LoRAFA
from ._adapters import adapters, with_adapters


_RIDGE = 1e-8  # PEFT's


class LoRAFAState(NamedTuple):
    """`(AᵀA + 1e-8)⁺ / s²` of every LoRA-FA adapter, by path: (layers…, rank, rank), in float32 or wider.

    >>> import jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((64, 32))}
    >>> frozen, delta = lora_jax.lorafy(params, "kernel", method=lora_jax.LoRAFA(rank=4))
    >>> lora_jax.optim.lorafa(frozen, delta).init(delta).inverses["kernel"].shape
    (4, 4)
    """

    inverses: dict[str, jax.Array]


def lorafa(frozen: Any, delta: Any) -> optax.GradientTransformation:
    """Corrects the gradient of B, to `(AᵀA + 1e-8)⁺ g / s²`: a step along it moves `s·A·B` as nearly as A
    allows to where W's own gradient would.

    >>> import jax.numpy as jnp, lora_jax, optax
    >>> params = {"kernel": jnp.ones((64, 32))}
    >>> frozen, delta = lora_jax.lorafy(params, "kernel", method=lora_jax.LoRAFA(rank=4))
    >>> tx = optax.chain(lora_jax.optim.lorafa(frozen, delta), optax.adamw(1e-3))
    >>> tx.init(delta)[0].inverses["kernel"].shape
    (4, 4)

    A never changes, so neither does the inverse: it is computed once, in `init`, and kept in the state. What
    does not belong to a LoRA-FA adapter passes through. Takes the gradient of the `delta`, or, within
    `only_trainable`, of the combined tree.

    PEFT computes the product in bfloat16 where the machine can; here it is in float32, or float64 for float64
    adapters. The Adam there has its epsilon, 1e-6, beside the uncorrected root, and decays the weight after
    the update; chain whichever you like.

    Args:
      frozen, delta: the two trees of `lorafy`.

    Raises:
      ValueError: `delta` holds no LoRA-FA adapter, or one whose alpha is 0; the trees do not belong together;
        (from `update`) the gradient of an adapter that was not in `delta`.
    """
    ours = adapters(delta, LoRAFA)
    if not ours:
        raise ValueError(
            "`delta` holds no LoRA-FA adapter; pass the two trees of `lorafy(..., method=LoRAFA(...))`, or "
            "leave `lorafa` out."
        )
    for path, adapter in ours.items():
        if method_of(adapter, LoRAFA).scale == 0:
            raise ValueError(
                f"the LoRA-FA adapter of {path!r} has the `alpha` 0, with which nothing trains: pass another."
            )
    beside = adapters(paired(_with_a, frozen, delta), LoRAFA)

    def init(params: Any) -> LoRAFAState:
        return LoRAFAState({path: _inverse(adapter) for path, adapter in beside.items()})

    def update(updates: Any, state: LoRAFAState, params: Any = None) -> tuple[Any, LoRAFAState]:
        gradients = adapters(updates, LoRAFA)
        unknown = gradients.keys() - state.inverses.keys()
        if unknown:
            raise ValueError(
                f"`updates` holds a LoRA-FA adapter at {min(unknown)!r}, where the `delta` that `lorafa` "
                "was given has none: give it the trees that are trained."
            )
        corrected = {
            path: Adapter({"b": _corrected(node.arrays["b"], state.inverses[path])}, node.spec)
            for path, node in gradients.items()
        }
        return with_adapters(updates, corrected), state

    return optax.GradientTransformation(init, update)


def _with_a(frozen: Any, delta: Any) -> Any:
    return (
        Adapter(frozen.arrays, delta.spec)
        if isinstance(delta, Adapter) and isinstance(delta.spec.method, LoRAFA)
        else None
    )


def _inverse(adapter: Adapter) -> jax.Array:
    a, spec = adapter.arrays["a"], adapter.spec
    rank, wide = a.shape[-1], widened(a.dtype)
    a = a.astype(wide).reshape(*spec.sizes("layer"), -1, rank)
    gram = jnp.matmul(jnp.matrix_transpose(a), a, precision="highest")
    ridge = jnp.broadcast_to(_RIDGE * jnp.eye(rank, dtype=wide), gram.shape)
    # The threshold of PyTorch's pinv, a tenth of JAX's.
    return (
        jnp.linalg.pinv(gram + ridge, rtol=rank * float(jnp.finfo(wide).eps), hermitian=True)
        / method_of(adapter, LoRAFA).scale ** 2
    )


def _corrected(gradient: jax.Array, inverse: jax.Array) -> jax.Array:
    rows = gradient.astype(inverse.dtype).reshape(*inverse.shape[:-1], -1)
    return jnp.matmul(inverse, rows, precision="highest").reshape(gradient.shape).astype(gradient.dtype)
