"""The fingerprint of a base: 16 hexadecimal digits for each frozen tensor, as files hold it.

Each tensor has its own digits, so that an error can name the first that differs, and so that a head that
came later, or that trains, does not count. Stacked layers have the same digits as layers one by one. Left
out: packed tensors, whose values are not the base's any more, and trees of shapes.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from .._packed.packed import Packed
from .._paths import is_array, is_shape, named_leaves
from .._tree.nodes import is_node, weight_of
from ._families import Family
from ._tensors import tensors_of


def fingerprint(model: nn.Module, family: Family, frozen: Any) -> dict[str, str]:
    """The digits of each tensor by its name. They change with its shape, its dtype and any of its values."""
    leaves = {path: weight_of(leaf) for path, leaf in named_leaves(frozen, is_leaf=is_node)}
    digits = {}
    for tensor in tensors_of(model, family):
        leaf = leaves.get(tensor.path)
        if is_array(leaf) and not is_shape(leaf) and not isinstance(leaf, Packed):
            digits[tensor.name] = _digits(tensor.to_theirs(leaf))
    return digits


def _digits(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:16]


def check_base(source: Any, facts: Mapping[str, Any], model: nn.Module, family: Family, frozen: Any) -> None:
    """Raises `ValueError` where a tensor of the base is not the one beside which the adapter in `source`
    was saved. `facts`: what its file carries, which need not have a fingerprint.
    """
    saved: Mapping[str, str] = facts.get("base", {})
    if not saved:
        return
    found = fingerprint(model, family, frozen)
    different = [name for name in found if name in saved and saved[name] != found[name]]
    if different:
        more = f" and {len(different) - 1} more tensors" if len(different) > 1 else ""
        raise ValueError(
            f"{source} was saved beside another base: {different[0]!r}{more} of `params` have other values, "
            "or another dtype, than there. Load the base that it was trained on, or pass `check_base=False` "
            "to put it onto this one all the same."
        )
