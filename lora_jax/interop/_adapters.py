"""The adapter of one module, as PyTorch's libraries have it: A is (r, in) and B is (out, r).

`_exports.py` makes such adapters of our trees, and `_imports.py` our trees of them. `peft` and `loralib` know
the names in files. An adapter of a fused projection that acts on some of its blocks only is a LoRA with
`blocks`.
"""

import collections
import dataclasses
import itertools
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from .._lowrank.labels import scaled_by
from ..methods import AdaLoRA, DoRA, LoRA, PiSSA, VeRA
from ._families import Family
from ._modules import Module


# The methods that files have. Exports turn every other one into the LoRA that computes the same.
FileMethod = AdaLoRA | DoRA | LoRA | PiSSA | VeRA


class Part(NamedTuple):
    """The adapter of one module. Its arrays have our names, and the axes of our arrays (without layers) in
    opposite order: a (r, in), b (out, r).
    """

    module: Module
    method: FileMethod
    arrays: dict[str, np.ndarray]


def plain_number(value: float) -> float | int:
    """The integer that a number is but for the rounding of a quotient and a product, if there is one."""
    near = round(value)
    return near if near and math.isclose(value, near, rel_tol=1e-12) else value


def alpha_of(part: Part) -> float:
    """The alpha of an adapter that is LoRA, whose scale is alpha / r, without the rounding of a quotient and
    a product.
    """
    method = part.method
    assert isinstance(method, LoRA), "`as_lora` makes one of every other method"
    return plain_number(method.scale * method.rank if method.rs else method.alpha)


def common_alpha(parts: list[Part]) -> float:
    """One alpha for a file that has one for all: the most frequent. No B is a multiple of zero."""
    counts = collections.Counter(map(alpha_of, parts))
    return max(counts, key=lambda value: (value != 0, counts[value]))


def b_for(part: Part, b: np.ndarray, alpha: float) -> np.ndarray:
    """B, which takes what `alpha` lacks of the adapter's own alpha."""
    return b if alpha_of(part) == alpha else np.asarray(scaled_by(jnp.asarray(b), alpha_of(part) / alpha))


def with_blocks(parts: list[Part], family: Family) -> list[Part]:
    """Adapters of fused projections as LoRA of `blocks`, where B is zero outside of one block for each group
    of ranks.

    Only exact zeros count. Where all of a group is zero its block is unknown, and the adapters stay as they
    are.
    """
    groups: dict[str, list[Part]] = {}
    for part in parts:
        groups.setdefault(part.module.matrix.path, []).append(part)
    result: dict[str, Part] = {}
    for own in groups.values():
        count = family.projections_in(own[0].module.name)
        found = {
            _blocks(part.arrays["b"], count) if count > 1 and type(part.method) is LoRA else None
            for part in own
        }
        blocks = found.pop() if len(found) == 1 else None
        result.update((part.module.name, part if blocks is None else _blocked(part, blocks)) for part in own)
    return [result[part.module.name] for part in parts]


def _blocks(b: np.ndarray, count: int) -> tuple[bool, ...] | None:
    outs, rank = b.shape
    for blocks in sorted(itertools.product((True, False), repeat=count), key=sum):
        chosen = sum(blocks)
        if chosen and rank % chosen == 0 and outs % count == 0:
            there = (b.reshape(count, outs // count, chosen, rank // chosen) != 0).any((1, 3))
            if (there == np.eye(count, dtype=bool)[:, np.flatnonzero(blocks)]).all():
                return blocks
    return None


def _blocked(part: Part, blocks: tuple[bool, ...]) -> Part:
    assert isinstance(part.method, LoRA), "only LoRA has blocks"
    chosen, (rank, ins), (outs, _) = sum(blocks), part.arrays["a"].shape, part.arrays["b"].shape
    r, d = rank // chosen, outs // len(blocks)
    a = part.arrays["a"].reshape(chosen, r, ins)
    b = part.arrays["b"].reshape(len(blocks), d, chosen, r)
    b = np.stack([b[block, :, index] for index, block in enumerate(np.flatnonzero(blocks))])
    scale = part.method.scale * r
    method = dataclasses.replace(part.method, rank=r, alpha=plain_number(scale), rs=False, blocks=blocks)
    # As our arrays are, reversed: (blocks, in, r) and (blocks, r, out).
    return Part(part.module, method, {"a": a.transpose(1, 2, 0), "b": b.transpose(1, 2, 0)})
