"""The only place that names and matches parameters.

A leaf's path is the names on the way to it, joined by `/`: `h/0/attn/c_attn/kernel`. Targets are matched
against these paths, adapters draw their random keys from them, and every error names leaves by them.
"""

import difflib
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree_util


ALL_LINEAR = "all-linear"


def component(entry: Any) -> str:
    """The name of one step of a JAX key path: a dict key, an index, or an attribute."""
    for attribute in ("key", "idx", "name"):  # DictKey and FlattenedIndexKey, SequenceKey, GetAttrKey
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, Any]]:
    """`(path, leaf)` of every leaf, in the order of `jax.tree.leaves`.

    >>> named_leaves({"h": [{"kernel": 1.0}]})
    [('h/0/kernel', 1.0)]
    """
    flat, _ = tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    wrappers = _variable_paths(tree)
    return [("/".join(_components(path, wrappers)), leaf) for path, leaf in flat]


def _components(path: tuple, wrappers: set[tuple]) -> Iterable[str]:
    for depth, entry in enumerate(path):
        if path[:depth] not in wrappers:
            yield component(entry)


def _variable_paths(tree: Any) -> set[tuple]:
    """Key paths of Flax NNX variables, whose own `value` is a wrapper's name and not a parameter's.

    Recognised by the class's name, so that the core need not import Flax.
    """

    def is_variable(node: Any) -> bool:
        return any(
            base.__name__ == "Variable" and base.__module__.startswith("flax.nnx")
            for base in type(node).__mro__
        )

    flat, _ = tree_util.tree_flatten_with_path(tree, is_leaf=is_variable)
    return {path for path, node in flat if is_variable(node)}


def path_seed(path: str) -> np.uint32:
    """A number that depends on the path alone: the same on every machine, whatever else is adapted."""
    return np.uint32(zlib.crc32(path.encode()))


def is_array(leaf: Any) -> bool:
    """Whether a leaf has a shape and a dtype: JAX and NumPy arrays, tracers, `jax.ShapeDtypeStruct`."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def is_floating(leaf: Any) -> bool:
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def matches(pattern: str, path: str) -> bool:
    """Whether `pattern`, a regular expression, matches the whole path or its last whole components.

    >>> matches("attn/c_attn/kernel", "h/0/attn/c_attn/kernel"), matches("c_attn", "h/0/attn/c_attn/kernel")
    (True, False)
    """
    try:
        return re.fullmatch(f"(?:.*/)?(?:{pattern})", path, re.DOTALL) is not None
    except re.error as error:
        raise ValueError(f"`targets` pattern {pattern!r} is not a regular expression: {error}.") from error


def nearest(name: str, candidates: Iterable[str], count: int = 5) -> list[str]:
    """The candidates that resemble `name` most, for error messages.

    Paths are compared by their endings too, because a pattern usually names only the end of a path.
    """
    candidates = list(dict.fromkeys(candidates))

    def likeness(candidate: str) -> float:
        ending = "/".join(candidate.split("/")[-(name.count("/") + 1) :])
        return max(difflib.SequenceMatcher(None, name, text).ratio() for text in (candidate, ending))

    return sorted(candidates, key=likeness, reverse=True)[:count]


def resolve_targets(
    leaves: list[tuple[str, Any]],
    targets: Any,
    method: Any,
    linear_paths: Callable[[Collection[str]], list[str]],
) -> dict[str, Any]:
    """The method of every targeted path; None of one that is left out on purpose.

    `linear_paths` is called only where "all-linear" is asked for, because it traces the user's function. It
    is given the paths that were taken already.
    """
    floating = [path for path, leaf in leaves if is_floating(leaf)]
    chosen: dict[str, Any] = {}
    for pattern, pattern_method in _pairs(targets, method):
        if callable(pattern):
            found = [path for path, leaf in leaves if pattern(path, leaf) and is_floating(leaf)]
        elif pattern == ALL_LINEAR:
            found = linear_paths(chosen)
        else:
            among = [path for path, _ in leaves] if pattern_method is None else floating
            found = [path for path in among if matches(pattern, path)]
        if not found:
            raise ValueError(_nothing_matched(pattern, leaves))
        free = [path for path in found if path not in chosen]
        if not free:
            raise ValueError(
                f"`targets` pattern {pattern!r} matches only leaves that earlier patterns already took: "
                f"{_listed(found)}. Remove it, or move it before the pattern that shadows it."
            )
        chosen.update((path, pattern_method) for path in free)
    _unambiguous(chosen, [path for path, _ in leaves])
    if all(pattern_method is None for pattern_method in chosen.values()):
        raise ValueError(
            f"`targets` is empty ({targets!r}): nothing would be trained. Name leaves, for example "
            f"{_listed(floating[:3])}."
        )
    return chosen


def _unambiguous(chosen: Iterable[str], paths: list[str]) -> None:
    shared = [path for path in chosen if paths.count(path) > 1]
    if shared:
        raise ValueError(
            f"`targets` names {shared[0]!r}, which is the path of {paths.count(shared[0])} leaves of "
            "`params`: a key that contains '/' "
            "reads like two nested ones. Adapters are told apart by their paths, so rename one of these keys."
        )


def _pairs(targets: Any, method: Any) -> list[tuple[Any, Any]]:
    if isinstance(targets, Mapping):
        wrong = [pattern for pattern in targets if not (isinstance(pattern, str) or callable(pattern))]
        if wrong:
            raise TypeError(
                f"`targets` has the key {wrong[0]!r}; the keys of a mapping of targets are patterns "
                "(strings)."
            )
        return list(targets.items())
    if isinstance(targets, str) or callable(targets):
        return [(targets, method)]
    if isinstance(targets, Iterable):
        patterns = list(targets)
        wrong = [pattern for pattern in patterns if not isinstance(pattern, str)]
        if wrong:
            raise TypeError(f"`targets` holds {wrong[0]!r}; a sequence of targets holds patterns (strings).")
        return [(pattern, method) for pattern in patterns]
    raise TypeError(
        f"`targets` is {targets!r}; pass a pattern, a sequence of patterns, a mapping from pattern to "
        "method, "
        f"a predicate (path, leaf) -> bool, or {ALL_LINEAR!r}."
    )


def _nothing_matched(pattern: Any, leaves: list[tuple[str, Any]]) -> str:
    paths = [path for path, _ in leaves]
    if callable(pattern):
        return (
            f"`targets` predicate {pattern!r} chose no floating-point leaf among {len(paths)}: "
            f"{_listed(paths[:5])}."
        )
    if pattern == ALL_LINEAR:
        return (
            "`targets` is 'all-linear', but `fn` contracts with no floating-point leaf of `params`. Does "
            "`fn` use `params`, its first argument?"
        )
    passed_over = [(path, leaf) for path, leaf in leaves if matches(pattern, path)]
    if passed_over:
        found = [f"{path} ({getattr(leaf, 'dtype', type(leaf).__name__)})" for path, leaf in passed_over[:5]]
        return (
            f"`targets` pattern {pattern!r} matches only leaves that are not floating point: "
            f"{_listed(found)}. "
            "Only floating-point leaves can be adapted; cast them first or choose others."
        )
    if not paths:
        return f"`targets` is {pattern!r}, but `params` has no leaves."
    return (
        f"`targets` pattern {pattern!r} matches no leaf. A pattern is a regular expression for the whole "
        "path or for its "
        f"last whole components. The nearest paths are {_listed(nearest(str(pattern), paths))}."
    )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:8])
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)
