"""`lorafy` splits a pytree into what stays and what trains; `combine` puts the two side by side for an
adapted function, and `partition` takes them apart again."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import _axes, _paths
from ._packed.packed import is_packed
from ._paths import path_seed
from ._tree.method import grouped, Method, Spec
from ._tree.nodes import Adapted, Adapter, Fixed, is_node, Trained
from ._tree.pairs import paired
from .methods.lora import LoRA


class Lorafied(NamedTuple):
    """The two trees of `lorafy`, both with the containers of `params`.

    >>> import jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    >>> found = lora_jax.lorafy(params, "kernel", method=lora_jax.LoRA(rank=1))
    >>> found.frozen["bias"].shape, found.delta["bias"]
    ((4,), None)
    """

    frozen: Any
    delta: Any


def lorafy(
    params: Any,
    targets: Any,
    *,
    method: Method = LoRA(),
    key: jax.Array | None = None,
    axes: Any = None,
    fn: Callable | None = None,
    args: tuple = (),
) -> Lorafied:
    """Splits `params` into a frozen tree and a small one, `delta`, that trains.

    >>> import jax.numpy as jnp, lora_jax
    >>> params = {"attn": {"kernel": jnp.ones((8, 8)), "bias": jnp.zeros(8)}}
    >>> frozen, delta = lora_jax.lorafy(params, ["attn/kernel"], method=lora_jax.LoRA(rank=2))
    >>> lora_jax.count(delta)
    32

    Nothing is copied and `params` is not changed. With LoRA, `frozen` equals `params` leaf for leaf and the
    adapted function starts out equal to the plain one.

    Args:
      params: any pytree of arrays, or of `jax.ShapeDtypeStruct` (then the result is one of shapes): nested
        dicts, `FrozenDict`, `nnx.State`, Equinox and Penzai modules, dataclasses, lists. Other leaves are
        passed over. Leaves may be packed already, as `quant.from_bitsandbytes` returns them.
      targets: which leaves to adapt. A pattern: a regular expression that matches the whole path, or its last
        whole components: `attn/c_attn/kernel` matches `h/0/attn/c_attn/kernel`, `c_attn` alone does not. A
        sequence of patterns. A mapping from pattern to method, where the first match wins. A predicate
        `(path, leaf) -> bool`. `"all-linear"`, with `fn`: every floating leaf that `fn` contracts with,
        except those that it (also) looks rows up in. A mapping's None leaves out: `{"head": None,
        "all-linear": LoRA()}`.
      method: for targets that do not name their own: `LoRA()`, `Full()`, ...
      key: for the initialisation; `jax.random.key(0)` if None. Each adapter's own key is derived from its
        path, so adding a target changes no other adapter.
      axes: one word for each axis of a weight, `in`, `out` or `layer` (stacked): `"in out"` (the default of
        2-D weights), `"out in"` (Equinox, PyTorch), `"layer in out"`, `"in out out"` (heads), `"in in in
        out"` (HWIO convolution). A string, or a mapping from pattern to string.
      fn, args: a function called as `fn(params, *args)`. The axes that `axes` does not give are read off how
        it uses each weight, from shapes alone; `args` may hold `jax.ShapeDtypeStruct`.

    Returns:
      `Lorafied(frozen, delta)`. `delta` holds exactly what trains, at the targeted leaves, and None
      elsewhere: give it to `jax.grad` and to `tx.init`. A and B are float32, or float64 for float64 weights.

    Raises:
      ValueError: leaves that `"all-linear"` would pass over, although they reach a contraction; a pattern
        that matches nothing (with the nearest paths), only leaves that are not floating point, or only leaves
        that earlier patterns took; axes that cannot be known; a leaf that `fn` never contracts with; a rank
        above min(in, out).
      TypeError: an argument of the wrong kind.
    """
    leaves = _paths.named_leaves(params, is_leaf=is_packed)
    nodes = jax.tree.leaves(params, is_leaf=is_node)
    if any(isinstance(leaf, Adapter | Adapted | Fixed | Trained) for leaf in nodes):
        raise TypeError(
            "`params` already holds adapters. Pass the plain parameters (`frozen`, or `merge(frozen, "
            "delta)`)."
        )
    key = jax.random.key(0) if key is None else _random_key(key)
    if fn is None and args:
        raise ValueError(
            "`args` is given without `fn`; pass both, to read the axes off how `fn(params, *args)` uses "
            "each weight."
        )
    if not isinstance(args, tuple | list):
        raise TypeError(f"`args` is a {type(args).__name__}; pass a tuple, `args=(x,)` for `fn(params, x)`.")
    readings: dict[str, _axes.Reading] | None = None
    shaped = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_packed(leaf) else leaf
    shapes = jax.tree.map(shaped, params, is_leaf=is_packed)
    if fn is not None:
        try:
            readings = _axes.read(fn, shapes, tuple(args))
        except TypeError as error:
            if args:
                raise
            raise TypeError(
                f"`fn` is given without `args`, and `fn(params)` failed: {error}. Pass what `fn` takes "
                "beside the parameters, arrays or shapes: `args=(x,)` for `fn(params, x)`."
            ) from error

    def linear_paths(taken: Collection[str]) -> list[str]:
        if readings is None or fn is None:
            raise ValueError(
                "`targets` is 'all-linear', which needs `fn=` and `args=`: which leaves are linear is read "
                "off how `fn(params, *args)` uses them."
            )
        lost = _axes.unfollowed(fn, shapes, tuple(args), readings)
        _check_unfollowed({path: where for path, where in lost.items() if path not in taken})
        return [path for path, _ in leaves if path in readings and readings[path].linear]

    chosen_methods = _paths.resolve_targets(leaves, targets, method, linear_paths)
    methods = {path: chosen for path, chosen in chosen_methods.items() if chosen is not None}
    for path, chosen in methods.items():
        if not isinstance(chosen, Method):
            raise TypeError(
                f"The method for {path!r} is {chosen!r}; pass a method as a value, for example "
                "`LoRA(rank=8)` or `Full()`."
            )
    by_path = dict(leaves)
    given = _axes.given(axes, leaves, [path for path, chosen in methods.items() if chosen.needs_axes])
    specs = grouped(_spec(path, by_path[path], chosen, given, readings) for path, chosen in methods.items())
    pairs = [_split(leaf, specs.get(path), key) for path, leaf in leaves]
    treedef: Any = jax.tree.structure(params, is_leaf=is_packed)
    return Lorafied(*(jax.tree.unflatten(treedef, side) for side in zip(*pairs, strict=True)))


def _check_unfollowed(lost: dict[str, str]) -> None:
    """Raises `ValueError` for leaves that "all-linear" would pass over without a word."""
    if not lost:
        return
    listed = ", ".join(
        f"{path!r}" + (f" ({where})" if where else "") for path, where in list(lost.items())[:8]
    )
    more = f" and {len(lost) - 8} more" if len(lost) > 8 else ""
    first = next(iter(lost))
    raise ValueError(
        "`targets` is 'all-linear', and these leaves reach a contraction in `fn` in a way that `adapt` "
        f"cannot follow: {listed}{more}. They would stay frozen. Leave them out on purpose, "
        f"`targets={{{first!r}: None, 'all-linear': LoRA(...)}}`, or train them themselves with `Full()` "
        "for None."
    )


def _spec(path: str, leaf: Any, method: Method, given: dict, readings: dict | None) -> Spec:
    shape = tuple(leaf.shape)
    axes = _axes.resolve(path, shape, given, readings, method.sided) if method.needs_axes else ()
    spec = Spec(path, shape, axes, method)
    method.check(spec)
    return spec


def _split(leaf: Any, spec: Spec | None, key: jax.Array) -> tuple[Any, Any]:
    if spec is None:
        return leaf, None
    own = jax.random.fold_in(key, path_seed(spec.path))
    if not any(map(_paths.is_shape, jax.tree.leaves(leaf))):
        return spec.method.split(leaf, spec, own)
    frozen, delta = jax.eval_shape(lambda weight, own: spec.method.split(weight, spec, own), leaf, own)
    # The caller's own shape may carry a sharding.
    if isinstance(frozen, Fixed):
        frozen = dataclasses.replace(frozen, weight=leaf)
    return leaf if _paths.is_shape(frozen) else frozen, leaf if _paths.is_shape(delta) else delta


def _random_key(key: Any) -> jax.Array:
    """The key, new-style; `PRNGKey`s are accepted."""
    if not _paths.is_array(key):
        raise TypeError(f"`key` is {key!r}; pass a random key, for example `jax.random.key(0)`.")
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


def combine(frozen: Any, delta: Any, *, key: jax.Array | None = None) -> Any:
    """The adapted pytree that adapted functions take in place of `params`.

    >>> import jax.numpy as jnp, lora_jax
    >>> frozen, delta = lora_jax.lorafy({"kernel": jnp.ones((4, 4))}, "kernel", method=lora_jax.LoRA(rank=1))
    >>> type(lora_jax.combine(frozen, delta)["kernel"]).__name__
    'Adapted'

    Args:
      frozen, delta: the two trees of `lorafy`, or later states of them.
      key: turns on what is random in training, dropout for example; a new one for every step. It is folded
        with each leaf's path, with the use, and per layer of stacked leaves. Uses are numbered as `fn` is
        traced, so that the same key gives other masks where a layer is wrapped in `jit` or `checkpoint`.
        Without a key the result is deterministic.

    Raises:
      ValueError: the two trees do not belong together.
    """
    return paired(_joined, frozen, delta, None if key is None else _random_key(key), resolve=False)


def partition(tree: Any) -> Lorafied:
    """The two trees of a combined one: undoes `combine`.

    >>> import jax.numpy as jnp, lora_jax
    >>> frozen, delta = lora_jax.lorafy({"kernel": jnp.ones((4, 4))}, "kernel", method=lora_jax.LoRA(rank=1))
    >>> tree = lora_jax.combine(frozen, delta)
    >>> lora_jax.partition(tree).delta["kernel"] is delta["kernel"]
    True

    For loops that hold the model as one tree (`lora_jax.optim`): to merge, save or count what they trained,
    and for a new dropout key in every step, `combine(*partition(tree), key=key)` inside the loss. A key of
    the tree's own is left out. Leaves without an adapter are frozen.

    Raises:
      TypeError: `tree` is one half only, a `delta`.
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_node)
    parts = [_parts(leaf) for leaf in leaves]
    return Lorafied(
        jax.tree.unflatten(treedef, [frozen for frozen, _ in parts]),
        jax.tree.unflatten(treedef, [delta for _, delta in parts]),
    )


def _parts(leaf: Any) -> tuple[Any, Any]:
    if isinstance(leaf, Adapter):
        raise TypeError("`tree` is a delta; pass the combined tree, as `combine(frozen, delta)` returns it.")
    if isinstance(leaf, Adapted):
        return leaf.frozen, leaf.adapter
    return (None, leaf.value) if isinstance(leaf, Trained) else (leaf, None)


def _joined(frozen: Any, delta: Any, key: jax.Array | None) -> Any:
    if delta is None:
        return frozen
    if not isinstance(delta, Adapter):
        return Trained(delta)
    return Adapted(frozen, delta, key if delta.spec.method.random else None)
