"""Masks and labels for training one combined tree, as `combine` returns it, with optax."""

from typing import Any

import jax
import optax

from .._tree.nodes import Adapted, Adapter, is_node, Trained


def labels(tree: Any) -> Any:
    """`"trainable"` or `"frozen"` for each array of a combined tree: for `optax.multi_transform`.

    >>> import jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    >>> tree = lora_jax.combine(*lora_jax.lorafy(params, "kernel", method=lora_jax.LoRA(rank=1)))
    >>> lora_jax.optim.labels(tree)["bias"]
    'frozen'
    """
    return _mapped(tree, "trainable", "frozen")


def trainable_mask(tree: Any) -> Any:
    """True for each array of a combined tree that trains, False for the others: for `optax.masked`.

    >>> import jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    >>> tree = lora_jax.combine(*lora_jax.lorafy(params, "kernel", method=lora_jax.LoRA(rank=1)))
    >>> lora_jax.optim.trainable_mask(tree)["bias"]
    False

    Mind that `optax.masked` passes the raw gradient of the others through, which `optax.apply_updates` would
    then add to the frozen weights; `only_trainable` does not.
    """
    return _mapped(tree, True, False)


def _mapped(tree: Any, trained: Any, frozen: Any) -> Any:
    def node(leaf: Any) -> Any:
        if isinstance(leaf, Trained):
            return Trained(trained)
        if isinstance(leaf, Adapted):
            arrays = jax.tree.map(lambda _: trained, leaf.adapter.arrays)
            rest = jax.tree.map(lambda _: frozen, (leaf.frozen, leaf.key))
            return Adapted(rest[0], Adapter(arrays, leaf.adapter.spec), rest[1])
        if isinstance(leaf, Adapter):
            raise TypeError(
                "`tree` is a delta; pass the combined tree, `combine(frozen, delta)`. All of a delta "
                "trains: use `tx` as it is."
            )
        return None if leaf is None else frozen

    return jax.tree.map(node, tree, is_leaf=is_node)


def only_trainable(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` for the trainable arrays of a combined tree; zero updates and no state for the frozen ones.

    >>> import jax, jax.numpy as jnp, lora_jax, optax
    >>> params = {"kernel": jnp.ones((64, 64))}
    >>> tree = lora_jax.combine(*lora_jax.lorafy(params, "kernel", method=lora_jax.LoRA(rank=1)))
    >>> state = lora_jax.optim.only_trainable(optax.adam(1e-3)).init(tree)
    >>> sum(leaf.size for leaf in jax.tree.leaves(state))  # a counter, and two moments for A and B
    257
    """
    return optax.multi_transform({"trainable": tx, "frozen": optax.set_to_zero()}, labels)
