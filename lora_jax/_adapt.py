"""`adapt` and `explain`: a function of weights becomes the same function of adapted weights.

`adapt(fn)` traces `fn` once with the plain weights in place and evaluates the trace with factored ones
(`_interpret.py`), so `x @ W` becomes `x @ W + (x @ A) @ B` wherever and however `fn` came to it.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._factored import Axis, Factored, Leaf, PLAIN
from ._interpret import Interpreter, trace, Use
from ._method import DependsOnWeight, Grouped
from ._nodes import Adapted, Fixed, is_node, resolved, Trained
from ._packed import Lazy, Packed
from ._paths import is_array


_POLICIES = ("error", "warn", "allow")


def path_seed(path: str) -> np.uint32:
    """A number that depends on the path alone: the same on every machine, whatever else is adapted."""
    return np.uint32(zlib.crc32(path.encode()))


def factored(node: Adapted) -> Factored:
    """The canonical form of an adapted leaf, with its dropout key folded with its path and split per
    layer.
    """
    spec, weight = node.adapter.spec, node.weight
    sliced = len(spec.shape) - weight.ndim
    if sliced > 0 and set(spec.axes[:sliced]) == {"layer"}:
        # A loop of the user's own, over the combined tree, has cut these off.
        spec = dataclasses.replace(spec, shape=spec.shape[sliced:], axes=spec.axes[sliced:])
    if tuple(weight.shape) != spec.shape and isinstance(spec.method, DependsOnWeight | Grouped):
        raise ValueError(
            f"the {type(spec.method).__name__} adapter of {spec.path!r} needs the whole weight, of shape "
            f"{spec.shape}, and has a part of it, {tuple(weight.shape)}: "
            "a `shard_map` that splits weights belongs inside of the adapted function, "
            "`adapt(shard_map(fn))`."
        )
    terms, magnitude, dropout = spec.method.canonical(weight, node.fixed, node.adapter.arrays, spec, node.key)
    key = None
    if node.key is not None and dropout > 0.0:
        key = jax.random.fold_in(node.key, path_seed(spec.path))
        if spec.sizes("layer"):
            key = jax.random.split(key, spec.sizes("layer"))
    windows = any(term.window is not None for term in terms)
    return Factored(
        weight=Lazy.of(weight) if isinstance(weight, Packed) else weight,
        terms=terms,
        magnitude=magnitude,
        key=key,
        axes=tuple(Axis(word, (index,)) for index, word in enumerate(spec.axes)),
        leaf=Leaf((spec.path,), dropout),
        windowed=spec.axis_indices("out")[0] if windows else None,
    )


def _weight(leaf: Any) -> Factored | None:
    """What the interpreter follows: adapted leaves, and packed ones, which are unpacked where they are
    used.
    """
    if isinstance(leaf, Adapted):
        return factored(leaf)
    if isinstance(leaf, Packed):
        axes = tuple(Axis(PLAIN, (index,)) for index in range(leaf.ndim))
        return Factored(Lazy.of(leaf), (), None, None, axes, Leaf(("a packed leaf",)))
    return None


def _leaves(args: tuple, kwargs: dict, is_leaf: Callable) -> tuple[list, Any]:
    """The flat arguments, with the arrays that adapters of one argument share in place."""
    flat, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_leaf)
    leaves: list[Any] = []
    for argument in (*args, *(kwargs[name] for name in sorted(kwargs))):
        leaves += resolved(jax.tree.leaves(argument, is_leaf=is_leaf))
    assert len(leaves) == len(flat)
    return leaves, treedef


def adapt(fn: Callable, *, materialize: str = "error", reduce: Any = None) -> Callable:
    """`fn`, able to take adapted pytrees (as `combine` returns) in place of plain ones in any argument.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((3, 2))}
    >>> frozen, delta = lora_jax.lorafy(params, "kernel", method=lora_jax.LoRA(rank=1))
    >>> forward = lora_jax.adapt(lambda params, x: x @ params["kernel"])
    >>> forward(lora_jax.combine(frozen, delta), jnp.ones((1, 3)))
    Array([[3., 3.]], dtype=float32)

    Only adapted leaves are abstracted; every other argument enters by closure, so Python scalars stay static
    and outputs that are no arrays pass through. An eager call traces `fn` every time: wrap the result, or the
    loss around it, in `jax.jit`. It composes with `jit grad vmap scan while cond checkpoint custom_jvp
    custom_vjp shard_map`, inside of `fn` and around it. The derivative with respect to a frozen weight is the
    true one, dL/dW'.

    Args:
      fn: any JAX function. Its code does not change, and need not know of LoRA.
      materialize: what to do at an operation without a low-rank rule, a `custom_vjp` that takes the weight
        for example: `"error"`, `"warn"`, or `"allow"`, which form `W + A·B` there and nowhere else.
      reduce: the dtype in which the gradients of A and B come out of the products, and so are summed over
        examples, and by XLA over devices, where it is wider than the activations: `jnp.float32` beside
        bfloat16. It costs no FLOP more, and spares A and B in float32 a gradient rounded to bfloat16. There
        is no forward-mode derivative then, as of any function with a `custom_vjp`. None: as JAX does it, in
        the dtype of the activations. Of matrix products and lookups; convolutions, `ragged_dot` and leaves
        that train themselves (`Full`) are as JAX has them.

    Raises:
      ValueError: (when called) an operation would form an adapted weight and `materialize` is `"error"`. It
        names the operation, the parameter's path and the line.
    """
    if materialize not in _POLICIES:
        raise ValueError(f"`materialize` is {materialize!r}; pass one of {', '.join(map(repr, _POLICIES))}.")
    reduce = None if reduce is None else jnp.dtype(reduce)
    if reduce is not None and not jnp.issubdtype(reduce, jnp.floating):
        raise ValueError(
            f"`reduce` is {reduce.name!r}; gradients are summed in a floating-point dtype: pass "
            "`jnp.float32`, or leave it out."
        )
    if not callable(fn):
        raise TypeError(
            f"`fn` is {fn!r}, which cannot be called; pass the function, for example `adapt(model.apply)`."
        )

    @functools.wraps(fn)
    def adapted(*args: Any, **kwargs: Any) -> Any:
        return _call(fn, args, kwargs, Interpreter(materialize, reduce=reduce))

    return adapted


def _call(fn: Callable, args: tuple, kwargs: dict, interpreter: Interpreter) -> Any:
    leaves, treedef = _leaves(args, kwargs, is_node)
    weights = [_weight(leaf) for leaf in leaves]
    plain = [
        leaf.value if isinstance(leaf, Trained) else leaf.weight if isinstance(leaf, Fixed) else leaf
        for leaf in leaves
    ]
    found = [weight for weight in weights if weight is not None]
    return evaluate(fn, plain, treedef, [weight is not None for weight in weights], found, interpreter)


def evaluate(
    fn: Callable,
    leaves: list,
    treedef: Any,
    abstracted: list[bool],
    weights: list[Factored],
    interpreter: Interpreter,
) -> Any:
    """`fn` on the tree of `leaves`, with the abstracted ones given as factored weights."""
    if not weights:
        args, kwargs = jax.tree.unflatten(treedef, leaves)
        return fn(*args, **kwargs)
    static: dict[str, Any] = {}

    def of_weights(*weights: jax.Array) -> list[jax.Array]:
        remaining = iter(weights)
        args, kwargs = jax.tree.unflatten(
            treedef,
            [next(remaining) if flag else leaf for flag, leaf in zip(abstracted, leaves, strict=True)],
        )
        outputs, static["treedef"] = jax.tree.flatten(fn(*args, **kwargs))
        static["outputs"] = [
            None if isinstance(output, jax.Array | np.ndarray) else output for output in outputs
        ]
        return [output for output in outputs if isinstance(output, jax.Array | np.ndarray)]

    jaxpr = trace(
        of_weights,
        *(
            jax.ShapeDtypeStruct(w.shape, w.dtype) if isinstance(w.weight, Lazy) else w.weight
            for w in weights
        ),
    )
    arrays = iter(interpreter.returned(interpreter.evaluate(jaxpr, weights)))
    outputs = [next(arrays) if output is None else output for output in static["outputs"]]
    return jax.tree.unflatten(static["treedef"], outputs)


def observe(
    fn: Callable,
    args: tuple,
    kwargs: dict,
    mark: Callable[[Any], Factored | None],
    is_leaf: Callable = is_node,
) -> list[Use]:
    """The uses of weights in `fn`, traced from shapes alone. `mark` says which leaves are weights."""
    leaves, treedef = _leaves(args, kwargs, is_leaf)
    interpreter = Interpreter("allow", observe=True)

    def abstractly(arrays: list) -> None:
        remaining = iter(arrays)
        values = [next(remaining) if flag else leaf for flag, leaf in zip(has_arrays, leaves, strict=True)]
        weights = [mark(value) for value in values]
        plain = [value.value if isinstance(value, Trained) else value for value in values]
        found = [weight for weight in weights if weight is not None]
        evaluate(fn, plain, treedef, [weight is not None for weight in weights], found, interpreter)

    # Python scalars stay what they are; whatever holds arrays or shapes is traced as a shape.
    has_arrays = [any(is_array(part) for part in jax.tree.leaves(leaf)) for leaf in leaves]
    jax.eval_shape(abstractly, [leaf for flag, leaf in zip(has_arrays, leaves, strict=True) if flag])
    return list((interpreter.uses or {}).values())


class Explanation:
    """What `explain` found: `uses`, one for each operation that consumes an adapted weight. Prints as a
    table.
    """

    def __init__(self, uses: list[Use], unused: list[str]):
        self.uses = uses
        self.unused = unused

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
        widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
        right = (3, 4, 5)
        lines = [
            "  ".join(
                cell.rjust(width) if column in right else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (header, *rows)
        ]
        notes = [f"{path}: in and out axes differ between its uses" for path in self.contradictory]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *notes])

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
    uses = observe(fn, args, kwargs, _weight)
    leaves = jax.tree.leaves((args, kwargs), is_leaf=is_node)
    adapted = [leaf.adapter.spec.path for leaf in leaves if isinstance(leaf, Adapted)]
    used = {use.path for use in uses}
    return Explanation(uses, [path for path in adapted if path not in used])
