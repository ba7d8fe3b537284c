"""The loop over the equations of a jaxpr, and what happens where a weight would have to be formed."""

import contextlib
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex

from .._lowrank.factored import Factored, NotAView
from .._lowrank.pending import Pending
from .calls import CALLS
from .equation import bind, described, postponed
from .recorder import Recorder
from .uses import forming_flops, lookup_flops, USES
from .views import VIEWS


class MaterializeError(ValueError):
    """An operation would have to form an adapted weight.

    >>> import jax.numpy as jnp, lora_jax
    >>> frozen, delta = lora_jax.lorafy({"kernel": jnp.ones((4, 4))}, "kernel", method=lora_jax.LoRA(rank=1))
    >>> forward = lora_jax.adapt(lambda params: jnp.sort(params["kernel"]))
    >>> try:
    ...     forward(lora_jax.combine(frozen, delta))
    ... except lora_jax.MaterializeError as error:
    ...     print("kernel" in str(error))
    True
    """


class Interpreter:
    """One evaluation of a function.

    `materialize` says whether a weight may be formed, `reduce` in which dtype gradients are summed.
    """

    def __init__(self, materialize: str = "error", recorder: Recorder | None = None, reduce: Any = None):
        self.materialize = materialize
        self.reduce = reduce
        self.recorder = Recorder() if recorder is None else recorder
        self._jitted: dict[tuple, tuple[Any, Callable]] = {}

    # --- the loop over equations ----------------------------------------------------------------------------

    def evaluate(self, jaxpr: Any, arguments: Sequence[Any]) -> list[Any]:
        """The outputs of a jaxpr, open or closed, on arrays and factored weights."""
        consts, jaxpr = getattr(jaxpr, "consts", ()), getattr(jaxpr, "jaxpr", jaxpr)
        env: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))
        narrow: dict[Any, Any] = {}  # variable -> the array that it is a broadcast of, with axes of size 1

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, jex.Literal) else env[atom]

        # A use draws its dropout from its number, which must not depend on where arrays lie. JAX leaves
        # constraints of sharding out for one device, so they are not counted.
        counted = (eqn.primitive.name != "sharding_constraint" for eqn in jaxpr.eqns)
        numbered = zip(itertools.accumulate(counted, initial=0), jaxpr.eqns)
        for name_stack, equations in itertools.groupby(
            numbered, key=lambda pair: str(pair[1].source_info.name_stack)
        ):
            with jax.named_scope(name_stack) if name_stack else contextlib.nullcontext():
                for number, eqn in equations:
                    values = [read(atom) for atom in eqn.invars]
                    if any(isinstance(value, Pending) for value in values):
                        outputs = postponed(eqn, values)
                        if outputs is not None:
                            env.update(zip(eqn.outvars, outputs, strict=True))
                            continue
                        sums = {
                            atom: value.value()
                            for atom, value in zip(eqn.invars, values, strict=True)
                            if isinstance(value, Pending)
                        }
                        env.update(sums)
                        values = [read(atom) for atom in eqn.invars]
                    if not any(isinstance(value, Factored) for value in values):
                        outputs = bind(eqn, values)
                        if eqn.primitive.name == "broadcast_in_dim":
                            narrow[eqn.outvars[0]] = (values[0], eqn.params["broadcast_dimensions"])
                    else:
                        broadcast = [
                            None if isinstance(atom, jex.Literal) else narrow.get(atom) for atom in eqn.invars
                        ]
                        outputs = self._apply(eqn, number, values, broadcast)
                    env.update(zip(eqn.outvars, outputs, strict=True))
        outputs = [read(atom) for atom in jaxpr.outvars]
        return [value.value() if isinstance(value, Pending) else value for value in outputs]

    def _apply(self, eqn: Any, number: int, values: list[Any], broadcast: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        with eqn.ctx.manager:
            try:
                if name in CALLS:
                    values = [
                        value.folded(number) if isinstance(value, Factored) else value for value in values
                    ]
                    with self.recorder.inside(number, eqn):
                        return CALLS[name](self, eqn, values)
                if name in VIEWS:
                    outputs = VIEWS[name](eqn, values, broadcast)
                    return [self._settled(eqn, number, output) for output in outputs]
                if name in USES:
                    # Of two weights in one product, the right one is the weight, by convention.
                    if name == "dot_general" and isinstance(values[1], Factored):
                        values = [self.formed(eqn, values[0], -2 - number), values[1]]
                    used = USES[name](eqn, number, values, self.recorder, self.reduce)
                    return [self._settled(eqn, number, used)]
            except NotAView:
                pass
        return bind(eqn, [self.formed(eqn, value, number) for value in values])

    def _settled(self, eqn: Any, number: int, value: Any) -> Any:
        """A view with no in or no out axis left is the result of a lookup: an activation, and as small as
        one.
        """
        if not isinstance(value, Factored):
            return value
        tags = {axis.tag for axis in value.axes}
        if "?" in tags or value.looked_up:
            rest = [
                axis for axis, size in zip(value.axes, value.shape, strict=True) if axis.origin and size > 1
            ]
            if len(rest) > 1:
                return value
            self.recorder.record(
                eqn,
                number,
                value,
                "lookup",
                value.looked_up,
                [stored for axis in rest for stored in axis.origin],
            )
            return value.weight
        if {"in", "out"} <= tags or value.is_plain:
            return value
        self.recorder.record(
            eqn, number, value, "lookup", (), (), flops=lookup_flops(value, value.weight.size)
        )
        return value.dense()

    # --- forming weights ------------------------------------------------------------------------------------

    def formed(self, eqn: Any, value: Any, number: int = -1) -> Any:
        """The weight itself, if that is allowed."""
        if not isinstance(value, Factored):
            return value
        if value.is_plain:
            return value.dense()
        rest = [stored for axis in value.axes for stored in axis.origin]
        how = "lookup" if value.looked_up else "formed"
        self.recorder.record(
            eqn,
            number,
            value,
            how,
            value.looked_up,
            rest,
            flops=(0, forming_flops(value), forming_flops(value)),
        )
        where = (
            f"{described(eqn)}, which has no low-rank rule, with the adapted weight",
            f" at {self.recorder.line(eqn)}",
        )
        return self._dense(value, *where)

    def returned(self, outputs: Sequence[Any]) -> list[Any]:
        """The outputs of the function; a weight among them has to be formed."""
        return [self._returned(output) if isinstance(output, Factored) else output for output in outputs]

    def _returned(self, value: Factored) -> Any:
        if value.is_plain:
            return value.dense()
        self.recorder.record_returned(value, forming_flops(value))
        return self._dense(value, "`fn` returning the adapted weight", "")

    def _dense(self, value: Factored, operation: str, where: str) -> Any:
        if self.materialize == "allow":
            return value.dense()
        paths = " and ".join(map(repr, value.leaf.paths))
        message = (
            f"`adapt` met {operation} {paths} (as {value.dtype}{list(value.shape)}){where}. The weight "
            "W + A·B would have to be formed there. Pass `materialize='allow'` (or 'warn') to `adapt` to "
            f"form it, or leave {paths} out of `targets`."
        )
        if self.materialize == "error":
            raise MaterializeError(message)
        warnings.warn(message, stacklevel=2)
        return value.dense()

    def all_formed(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        return [self.formed(eqn, value, -2 - position) for position, value in enumerate(values)]

    def jitted(self, closed: Any, options: dict, name: str) -> Callable:
        """The jitted evaluation of an inner jaxpr: one for each jaxpr and its options, so that a repeated
        call is traced once.
        """
        hashable = (
            (option, tuple(value) if isinstance(value, list) else value) for option, value in options.items()
        )
        key = (id(closed), name, *hashable)
        if not self.recorder.watches and key in self._jitted:
            return self._jitted[key][1]

        def call(*operands: Any) -> list[Any]:
            return self.evaluate(closed, operands)

        call.__name__ = call.__qualname__ = name
        function = jax.jit(call, **options)
        self._jitted[key] = (closed, function)  # keeps the jaxpr alive, so that no other gets its id
        return function
