"""Which axes of a weight are in, out and stacked: as the user says, as the function shows, or by default.

Reading them off the function is an evaluation of its trace with every floating leaf marked
(`_interpret/function.py`). Each contraction then tells which stored axes it sums over, which it keeps, and
which it pairs with the data's own axes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax

from ._interpret.function import observe
from ._interpret.reach import reaching
from ._interpret.recorder import Use
from ._lowrank.factored import Axis, Factored, Leaf
from ._paths import is_floating, matches, named_leaves, nearest


WORDS = ("in", "out", "layer")
DEFAULT = ("in", "out")  # of a 2-D weight, as Flax, Haiku and plain `x @ w` store it


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the function does with one leaf."""

    axes: tuple[str, ...] | None  # None where it is never contracted nor looked up
    contracted: bool = False
    looked_up: bool = False
    conflict: str = ""  # "", "sides" (in and out exchanged between uses) or "layers"
    formed: str = ""  # the first operation that has no low-rank rule, and its line

    @property
    def linear(self) -> bool:
        """Contracted, with an in and an out axis, and not also a lookup table."""
        return (
            self.contracted
            and not self.looked_up
            and self.axes is not None
            and {"in", "out"} <= set(self.axes)
        )


@partial(jax.tree_util.register_dataclass, data_fields=["weight"], meta_fields=["path"])
@dataclasses.dataclass(frozen=True)
class _Marked:
    """A leaf to be watched. It is a pytree node, so that tracing from shapes sees the array in it."""

    path: str
    weight: Any


def read(fn: Callable, params: Any, args: tuple) -> dict[str, Reading]:
    """How `fn(params, *args)` uses each floating leaf of `params`, from shapes alone."""
    leaves = named_leaves(params)
    treedef = jax.tree.structure(params)
    marked = [_Marked(path, leaf) if is_floating(leaf) else leaf for path, leaf in leaves]

    def mark(leaf: Any) -> Factored | None:
        if not isinstance(leaf, _Marked):
            return None
        axes = tuple(Axis("?", (index,)) for index in range(leaf.weight.ndim))
        return Factored(leaf.weight, (), None, None, axes, Leaf((leaf.path,)))

    def call(params: list, *args: Any) -> Any:
        return fn(jax.tree.unflatten(treedef, params), *args)

    uses = observe(call, (marked, *args), {}, mark, is_leaf=lambda leaf: isinstance(leaf, _Marked))
    grouped: dict[str, list[Use]] = {path: [] for path, leaf in leaves if is_floating(leaf)}
    for use in uses:
        grouped[use.path].append(use)
    dims = {path: len(leaf.shape) for path, leaf in leaves if is_floating(leaf)}
    return {path: _reading(dims[path], found) for path, found in grouped.items()}


def unfollowed(fn: Callable, params: Any, args: tuple, readings: dict[str, Reading]) -> dict[str, str]:
    """The leaves that look like matrices and reach a contraction of `fn` in a way that `adapt` cannot follow.

    By path, with the first operation that has no low-rank rule. Leaves that are looked up are tables.
    """
    leaves = named_leaves(params)
    treedef, (rest, containers) = jax.tree.structure(params), jax.tree.flatten(args)

    def call(values: list) -> Any:
        own, beside = values[: len(leaves)], values[len(leaves) :]
        return fn(jax.tree.unflatten(treedef, own), *jax.tree.unflatten(containers, beside))

    found = reaching(call, [*(leaf for _, leaf in leaves), *rest], range(len(leaves)))
    reached = [leaves[index][0] for index in sorted(found)]
    known = {
        path
        for path, reading in readings.items()
        if reading.linear or reading.looked_up or reading.contracted
    }
    return {path: readings[path].formed if path in readings else "" for path in reached if path not in known}


def _reading(ndim: int, uses: list[Use]) -> Reading:
    contractions = [use for use in uses if use.how == "low-rank"]
    lookups = [use for use in uses if use.how == "lookup"]
    formed = next((f"`{use.operation}` at {use.source}" for use in uses if use.how == "formed"), "")
    # A lookup decides first: the axis it picks from is the in axis of a table, however else it is used.
    tables = [use for use in lookups if use.summed and not _is_stack(use, contractions)]
    words = [found for use in (*tables, *contractions) if (found := _words(ndim, use)) is not None]
    if not words:
        return Reading(None, bool(contractions), bool(lookups), formed=formed)
    conflict = ""
    for other in words[1:]:
        if other != words[0]:
            same_layers = [word == "layer" for word in other] == [word == "layer" for word in words[0]]
            conflict = "layers" if not same_layers or conflict == "layers" else "sides"
    return Reading(
        words[0],
        bool(contractions),
        any(not _is_stack(use, contractions) for use in lookups),
        conflict,
        formed,
    )


def _is_stack(lookup: Use, contractions: list[Use]) -> bool:
    """Whether what was indexed is a stack of weights, contracted elsewhere without the indexed axis."""
    return any(not set(lookup.summed) & {*use.summed, *use.free} for use in contractions)


def _words(ndim: int, use: Use) -> tuple[str, ...] | None:
    summed, free = set(use.summed), set(use.free)
    if summed & free:
        return None
    words = ["in" if axis in summed else "out" if axis in free else "layer" for axis in range(ndim)]
    return tuple(words)


def parse(axes: Any, path: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The words of an `axes` string, checked against the leaf's shape."""
    if not isinstance(axes, str):
        raise TypeError(f"`axes` for {path!r} is {axes!r}; pass one string of words, for example 'in out'.")
    words = tuple(axes.split())
    unknown = [word for word in words if word not in WORDS]
    if unknown:
        raise ValueError(
            f"`axes` for {path!r} is {axes!r}; {unknown[0]!r} is not one of 'in', 'out', 'layer'."
        )
    if len(words) != len(shape):
        raise ValueError(
            f"`axes` for {path!r} is {axes!r}, {len(words)} words, but the leaf has shape {shape}: one word "
            "an axis."
        )
    if not {"in", "out"} <= set(words):
        raise ValueError(
            f"`axes` for {path!r} is {axes!r}; a weight has at least one 'in' and one 'out' axis."
        )
    return words


def given(axes: Any, leaves: list[tuple[str, Any]], targeted: list[str]) -> dict[str, str]:
    """The user's `axes` for each path: one string for all targeted leaves, or a mapping from pattern to
    string.
    """
    if axes is None:
        return {}
    if isinstance(axes, str):
        return dict.fromkeys(targeted, axes)
    if not isinstance(axes, Mapping):
        raise TypeError(
            f"`axes` is {axes!r}; pass a string such as 'in out', or a mapping from pattern to such a string."
        )
    found: dict[str, str] = {}
    for pattern, words in axes.items():
        paths = [path for path, _ in leaves if matches(pattern, path)]
        if not paths:
            near = ", ".join(map(repr, nearest(pattern, [path for path, _ in leaves])))
            raise ValueError(f"`axes` pattern {pattern!r} matches no leaf. The nearest paths are {near}.")
        for path in paths:
            found.setdefault(path, words)
    return found


def _instead(reading: Reading, shape: tuple[int, ...]) -> str:
    """What `fn` does with a leaf that it never contracts with."""
    if not reading.formed:
        return "`fn` does not use it."
    if len(shape) < 2:
        return f"it goes into {reading.formed}, as a bias or a scale does, and has no low-rank form."
    return (
        f"it goes into {reading.formed}, of which there is no low-rank form; what is contracted later is "
        "another array."
    )


def _check_members(path: str, shape: tuple[int, ...], words: tuple[str, ...]) -> None:
    """Raises `ValueError` where leading axes may be heads of one matrix, or members with a matrix each.

    `jax.vmap` over the weights of an ensemble and an einsum over experts contract as a projection to heads
    does.
    """
    leading = words.index("in")
    if leading == 0 or "layer" in words[:leading] or "out" not in words[leading:]:
        return
    rest = " ".join(words[leading:])
    members, heads = (" ".join([*[word] * leading, rest]) for word in ("layer", "out"))
    raise ValueError(
        f"`axes` of {path!r}, of shape {shape}, cannot be read off `fn`: it keeps the first axes, "
        f"{list(range(leading))}, as it keeps the last. If these are members of an ensemble or experts, each "
        f"needs an adapter of its own: pass `axes={{{path!r}: {members!r}}}`. If they are heads of one "
        f"matrix, pass `axes={{{path!r}: {heads!r}}}`."
    )


def resolve(
    path: str, shape: tuple[int, ...], given: dict[str, str], readings: dict[str, Reading] | None, sided: bool
) -> tuple[str, ...]:
    """The axes of one targeted leaf, or an error that says what to pass."""
    reading = None if readings is None else readings[path]
    if reading is not None and reading.axes is None and not reading.contracted and not reading.looked_up:
        raise ValueError(
            f"`targets` names {path!r}, of shape {shape}, but `fn` never contracts with it: "
            f"{_instead(reading, shape)} "
            "Leave it out, or train it itself with `Full()`."
        )
    if path in given:
        return parse(given[path], path, shape)
    if len(shape) < 2:
        raise ValueError(
            f"`targets` names {path!r}, of shape {shape}: fewer than two axes have no low-rank form. "
            f"Leave it out, or train it itself: `targets={{{path!r}: Full(), ...}}`."
        )
    say = (
        f"Pass `axes={{{path!r}: '...'}}` with one of 'in', 'out', 'layer' for each of its {len(shape)} axes"
    )
    if reading is not None:
        words = reading.axes
        if words is None or not {"in", "out"} <= set(words):
            raise ValueError(
                f"The axes of {path!r}, of shape {shape}, cannot be read off `fn`, which does not contract "
                f"with it as with a matrix. {say}."
            )
        if reading.conflict == "layers" or (reading.conflict and sided):
            raise ValueError(
                f"`fn` uses {path!r}, of shape {shape}, in contradictory ways: its axes are "
                f"{' '.join(words)!r} in one use and others in another. {say}."
            )
        _check_members(path, shape, words)
        return words
    if len(shape) == 2:
        return DEFAULT
    raise ValueError(
        f"The axes of {path!r}, of shape {shape}, are unknown. {say}, or `fn=` and `args=` to read them off "
        "the model."
    )
