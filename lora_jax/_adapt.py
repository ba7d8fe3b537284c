"""`adapt`: a function of weights becomes the same function of adapted weights.

`adapt(fn)` traces `fn` once with the plain weights in place and evaluates the trace with factored ones
(`_interpret/`), so `x @ W` becomes `x @ W + (x @ A) @ B` wherever and however `fn` came to it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from ._interpret.function import evaluate, flat_leaves
from ._interpret.interpreter import Interpreter
from ._interpret.recorder import Recorder, sides_exchanged
from ._tree.canonical import weight_in
from ._tree.method import Spec
from ._tree.nodes import Adapted, Adapter, is_node, Trained, weight_of


_POLICIES = ("error", "warn", "allow")


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
        the dtype of the activations; but float32 beside float16, which soon overflows. Of matrix products and
        lookups; convolutions, `ragged_dot` and leaves that train themselves (`Full`) are as JAX has them.

    Raises:
      ValueError: (when called) an operation would form an adapted weight and `materialize` is `"error"`; it
        names the operation, the parameter's path and the line. `fn` uses a weight with in and out exchanged,
        and the sides matter to its method.
      TypeError: (when called) an argument is a `delta` alone.
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
    leaves, treedef = flat_leaves(args, kwargs, is_node)
    alone = next((leaf.spec.path for leaf in leaves if isinstance(leaf, Adapter)), None)
    if alone is not None:
        raise TypeError(
            f"an argument of the adapted function is a `delta` alone: it holds the adapter of {alone!r} and "
            "no "
            "weight. Pass `combine(frozen, delta)`."
        )
    weights = [weight_in(leaf) for leaf in leaves]
    plain = [leaf.value if isinstance(leaf, Trained) else weight_of(leaf) for leaf in leaves]
    found = [weight for weight in weights if weight is not None]
    result = evaluate(fn, plain, treedef, [weight is not None for weight in weights], found, interpreter)
    for leaf in leaves:
        if isinstance(leaf, Adapted):
            _check_sides(leaf.adapter.spec, interpreter.recorder)
    return result


def _check_sides(spec: Spec, recorder: Recorder) -> None:
    """Raises `ValueError` where a method's sides matter, and every use of the weight has them exchanged."""
    if spec.method.sided and sides_exchanged(spec, recorder.sides.get(spec.path, ())):
        given = " ".join(spec.axes)
        exchanged = " ".join({"in": "out", "out": "in"}.get(word, word) for word in spec.axes)
        raise ValueError(
            f"`axes` of {spec.path!r} are {given!r}, and `fn` contracts the out axes. For {spec.method.name} "
            "the sides matter: it would adapt the inputs as if they were outputs. The weight is stored the "
            f"other way: pass `axes={{{spec.path!r}: {exchanged!r}}}` to `lorafy`, or `fn=` and `args=`."
        )
