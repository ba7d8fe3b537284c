"""Shapes to adapt, and the adapters of a delta."""

import jax

from lora_jax import LoRA


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


RANK_2 = LoRA(rank=2)


def is_adapter(leaf):
    return hasattr(leaf, "spec")


def adapters(delta):
    """Every adapter of a delta by the path of its leaf."""
    return {leaf.spec.path: leaf for leaf in jax.tree.leaves(delta, is_leaf=is_adapter) if is_adapter(leaf)}


QV = (True, False, True)
