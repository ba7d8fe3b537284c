"""A function on trees with weights among their leaves: evaluated, or observed from shapes alone."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from .._lowrank.factored import Factored
from .._packed.lazy import Lazy
from .._paths import is_array
from .._tree.nodes import is_node, resolved, Trained
from .equation import trace
from .interpreter import Interpreter
from .recorder import Recorder, Use


def flat_leaves(args: tuple, kwargs: dict, is_leaf: Callable) -> tuple[list, Any]:
    """The flat arguments, with the arrays that adapters of one argument share in place."""
    flat, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_leaf)
    leaves: list[Any] = []
    for argument in (*args, *(kwargs[name] for name in sorted(kwargs))):
        leaves += resolved(jax.tree.leaves(argument, is_leaf=is_leaf))
    assert len(leaves) == len(flat)
    return leaves, treedef


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

    def of_weights(*weights: jax.Array) -> list[Any]:
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
    leaves, treedef = flat_leaves(args, kwargs, is_leaf)
    interpreter = Interpreter("allow", Recorder(watch=True))

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
    return interpreter.recorder.uses
