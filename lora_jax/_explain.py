"""`explain`: what `adapt` would do with each adapted leaf, read off the function from shapes alone."""

from collections.abc import Callable
from typing import Any

import jax

from ._interpret.function import observe
from ._interpret.reach import reaching
from ._interpret.recorder import sides_exchanged, Use
from ._packed.packed import Packed
from ._paths import is_array, named_leaves
from ._table import table
from ._tree.canonical import weight_in
from ._tree.nodes import Adapted, is_node, Trained, weight_of


class Explanation:
    """What `explain` found: `uses`, one for each operation that consumes an adapted weight. Prints as a
    table.
    """

    def __init__(self, uses: list[Use], unused: list[str], exchanged: list[str], left_out: list[str]):
        self.uses = uses
        self.unused = unused
        self.exchanged = exchanged
        self.left_out = left_out

    @property
    def formed(self) -> list[Use]:
        """The uses at which the weight would be formed."""
        return [use for use in self.uses if use.how == "formed"]

    @property
    def contradictory(self) -> list[str]:
        """Leaves whose in and out axes differ between two of their uses, as those of a tied embedding do."""
        sides: dict[str, set] = {}
        for use in self.uses:
            if use.how == "low-rank":
                sides.setdefault(use.path, set()).add((use.summed, use.free))
            if use.how == "lookup" and use.summed:
                sides.setdefault(use.path, set()).add((use.summed, ()))
        return [
            path for path, uses in sides.items() if any(set(a[0]) & set(b[1]) for a in uses for b in uses)
        ]

    def __str__(self) -> str:
        header = ("leaf", "operation", "how", "FLOPs plain", "FLOPs low-rank", "FLOPs formed", "at")
        rows = [
            (use.path, use.operation, use.how, *(f"{count:,}" for count in use.flops), use.source)
            for use in self.uses
        ]
        rows += [(path, "-", "not used", "0", "0", "0", "-") for path in self.unused]
        notes = [f"{path}: in and out axes differ between its uses" for path in self.contradictory]
        notes += [
            f"{path}: contracted along its out axes; it is stored the other way" for path in self.exchanged
        ]
        notes += [f"{path}: a weight of a contraction, and not adapted" for path in self.left_out]
        return "\n".join([table(header, rows, right=(3, 4, 5)), *notes])

    __repr__ = __str__


def explain(fn: Callable, *args: Any, **kwargs: Any) -> Explanation:
    """A table of what `adapt(fn)` does with each adapted leaf, from shapes alone: nothing is computed.

    >>> fn = lambda params, x: x @ params["kernel"]
    >>> print(lora_jax.explain(fn, lora_jax.combine(frozen, delta), x))  # doctest: +SKIP
    leaf    operation    how       FLOPs plain  FLOPs low-rank  FLOPs formed  at
    kernel  dot_general  low-rank           12              22            36  example.py:3 (<lambda>)

    Args:
      fn: the function that `adapt` would take.
      args, kwargs: what the adapted function would take; arrays may be `jax.ShapeDtypeStruct`.

    Returns:
      An `Explanation`: `print` it, or read its `uses`, `formed` (uses that would form the weight; `adapt`
      refuses them by default), `unused` (adapted leaves that `fn` does not consume) and `contradictory`
      leaves.
    """
    uses = observe(fn, args, kwargs, weight_in)
    leaves = jax.tree.leaves((args, kwargs), is_leaf=is_node)
    specs = [leaf.adapter.spec for leaf in leaves if isinstance(leaf, Adapted)]
    sides: dict[str, set[tuple[str, frozenset[int]]]] = {}
    for use in uses:
        sides.setdefault(use.path, set()).add((use.how, frozenset(use.summed)))
    used = {use.path for use in uses}
    return Explanation(
        uses,
        [spec.path for spec in specs if spec.path not in used],
        [spec.path for spec in specs if sides_exchanged(spec, sides.get(spec.path, ()))],
        _left_out(fn, args, kwargs),
    )


def _left_out(fn: Callable, args: tuple, kwargs: dict) -> list[str]:
    """The matrices beside adapted leaves that reach a contraction as weights, and are not adapted."""
    values, containers = jax.tree.flatten((args, kwargs), is_leaf=is_node)
    paths: list[str | None] = []
    for argument in (*args, *(kwargs[name] for name in sorted(kwargs))):
        named = named_leaves(argument, is_leaf=is_node)
        beside = any(isinstance(node, Adapted) for _, node in named)
        paths += [path if beside else None for path, _ in named]

    def call(values: list) -> Any:
        args, kwargs = jax.tree.unflatten(containers, values)
        return fn(*args, **kwargs)

    parameters = [index for index, path in enumerate(paths) if path is not None]
    found = reaching(call, [_plain(value) for value in values], parameters)
    return [path for i, path in enumerate(paths) if path is not None and i in found and is_array(values[i])]


def _plain(leaf: Any) -> Any:
    weight = (
        leaf.weight
        if isinstance(leaf, Adapted)
        else leaf.value
        if isinstance(leaf, Trained)
        else weight_of(leaf)
    )
    return jax.ShapeDtypeStruct(weight.shape, weight.dtype) if isinstance(weight, Packed) else weight
