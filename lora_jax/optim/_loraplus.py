"""LoRA+: Efficient Low Rank Adaptation of Large Models (Hayou et al., ICML 2024, arXiv 2402.12354)."""

import dataclasses
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._tree.nodes import Adapted, Adapter, is_node, Trained


# By name, because layer axes hide that they are one vector a layer. `e` is a column in the reference, and so
# not among them.
_FASTER = frozenset({"b", "m", "d"})


def loraplus(tx: optax.GradientTransformation, ratio: float) -> optax.GradientTransformationExtraArgs:
    """`tx` with a learning rate for B that is `ratio` times that of A.

    >>> import jax, jax.numpy as jnp, lora_jax, optax
    >>> delta = lora_jax.lorafy({"kernel": jnp.ones((8, 8))}, "kernel", method=lora_jax.LoRA(rank=1)).delta
    >>> tx = lora_jax.optim.loraplus(optax.sgd(1.0), 16)
    >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, delta), tx.init(delta), delta)
    >>> {name: float(array.max()) for name, array in updates["kernel"].arrays.items()}
    {'a': -1.0, 'b': -16.0}

    Every optimiser ends by multiplying with its learning rate, so this multiplies the last update, a weight
    decay in it included: `tx` must be the whole optimiser. No state is added. It takes a `delta`, or, within
    `only_trainable`, a combined tree.

    The groups are those of the authors' code. Faster: B, the vectors of VeRA and DoRA, and leaves that train
    themselves and have one axis, such as biases. As they are: A, AdaLoRA's e, and all other leaves that train
    themselves, such as the matrix of a classifier. A stack of biases cannot be told from a matrix, and counts
    as one.

    That code also gives adapters of embeddings a learning rate of their own, 1e-6 whatever the others'. There
    is no argument for it: a leaf here is no embedding, only used as one (or as a head too, when it is tied),
    and an absolute rate is an optimiser of its own. Where it is wanted, say which leaves:

    ```python
    optimisers = {"embedding": optax.adamw(1e-6), "other": loraplus(optax.adamw(1e-4), 16)}
    optax.multi_transform(optimisers, {"wte": "embedding", "h": "other"})
    ```

    Args:
      tx: any optimiser.
      ratio: the paper's λ, at least 1, and the larger the harder the task; the authors take 10 to 80 with
        Adam, and half of the learning rate that LoRA would have.

    Raises:
      TypeError: `ratio` is no number.
      ValueError: `ratio` is not positive and finite.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, numbers.Real):
        raise TypeError(
            f"`ratio` is {ratio!r}; pass a number, for example `loraplus(optax.adamw(1e-4), 16)`."
        )
    if not (math.isfinite(ratio) and ratio > 0):
        raise ValueError(
            f"`ratio` is {ratio!r}; it must be positive and finite: it is B's learning rate divided by A's, "
            "for example 16."
        )
    tx = optax.with_extra_args_support(tx)

    def faster(update: jax.Array) -> jax.Array:
        return update * jnp.asarray(ratio, update.dtype)

    def scaled(node: Any) -> Any:
        if isinstance(node, Adapted):
            return dataclasses.replace(node, adapter=scaled(node.adapter))
        if isinstance(node, Adapter):
            # `tree.map`, because `optax.masked` leaves nodes without leaves in place of arrays.
            return Adapter(
                {
                    name: jax.tree.map(faster, array) if name in _FASTER else array
                    for name, array in node.arrays.items()
                },
                node.spec,
            )
        if isinstance(node, Trained):
            return Trained(jax.tree.map(scaled, node.value))
        return faster(node) if getattr(node, "ndim", None) == 1 else node

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, state = tx.update(updates, state, params, **extra)
        return jax.tree.map(scaled, updates, is_leaf=is_node), state

    return optax.GradientTransformationExtraArgs(tx.init, update)
