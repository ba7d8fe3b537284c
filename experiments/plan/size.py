"""Bytes of trees of shapes: of all of it, and of the part that one device holds.

The second is exact, because every axis that is split divides; whatever has no place in the mesh is on each
device.
"""

import math
from typing import Any

import jax


def whole(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def per_device(tree: Any) -> int:
    """`tree` is one of arrays, or of shapes, with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def kept_activations(*, layers: int, examples: int, tokens: int, width: int, itemsize: int) -> int:
    """What a scan of layers under `checkpoint` keeps of the forward pass for the backward pass: the input of
    each layer.

    A compiler may keep less: split over `tensor` too, for example.
    """
    return layers * examples * tokens * width * itemsize
