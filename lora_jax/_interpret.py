"""Evaluates a jaxpr in which some values are factored weights. All contact with jaxprs is in this file.

An equation without factored operands is bound as it is. One that views or uses a factored weight follows its rule in
`_VIEWS` or `_USES`; one that holds an inner jaxpr is emitted again through JAX's public API, over a closure that
evaluates the inner jaxpr. For anything else the weight would have to be formed: `materialize` decides.

JAX promises nothing about jaxprs, and what this file reads of them differs between versions: only attributes that
jax 0.10 to 0.12 share are used, or both spellings where they differ.
"""

import contextlib
import dataclasses
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from . import _contract, _views
from ._contract import Pending
from ._factored import Factored, NotAView


class MaterializeError(ValueError):
    """An operation would have to form an adapted weight."""


class Use(NamedTuple):
    """One operation that consumed a weight, as `explain` and the reading of axes see it: one each for joined weights.

    `how` is `low-rank`, `lookup` or `formed`; `summed`, `free` and `batch` are axes of the stored weight; FLOPs are
    those of the operation on the plain weight, in low-rank form, and with the weight formed first; of joined weights the
    first counts them for all.
    """

    path: str
    operation: str
    how: str
    summed: tuple[int, ...]
    free: tuple[int, ...]
    batch: tuple[int, ...]
    flops: tuple[int, int, int]
    source: str


class Interpreter:
    """One evaluation of a function: what may be formed, and who watches."""

    def __init__(self, materialize: str = "error", observe: bool = False):
        self.materialize = materialize
        self.uses: dict[tuple, Use] | None = {} if observe else None
        self._jitted: dict[int, tuple[Any, Callable]] = {}
        self._calls: tuple[int, ...] = ()
        self._callers: list[Any] = []
        self._times = 1

    # --- the loop over equations ------------------------------------------------------------------------------------

    def evaluate(self, jaxpr: Any, arguments: Sequence[Any]) -> list[Any]:
        """The outputs of a jaxpr, open or closed, on arrays and factored weights."""
        consts, jaxpr = getattr(jaxpr, "consts", ()), getattr(jaxpr, "jaxpr", jaxpr)
        env: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))
        narrow: dict[Any, Any] = {}  # variable -> the array that it is a broadcast of, with axes of size 1

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, jex.Literal) else env[atom]

        numbered = enumerate(jaxpr.eqns)
        for name_stack, equations in itertools.groupby(numbered, key=lambda pair: str(pair[1].source_info.name_stack)):
            with jax.named_scope(name_stack) if name_stack else contextlib.nullcontext():
                for number, eqn in equations:
                    values = [read(atom) for atom in eqn.invars]
                    if any(isinstance(value, Pending) for value in values):
                        outputs = _postponed(eqn, values)
                        if outputs is not None:
                            env.update(zip(eqn.outvars, outputs, strict=True))
                            continue
                        sums = {atom: value.value() for atom, value in zip(eqn.invars, values, strict=True) if isinstance(value, Pending)}
                        env.update(sums)
                        values = [read(atom) for atom in eqn.invars]
                    if not any(isinstance(value, Factored) for value in values):
                        outputs = _bind(eqn, values)
                        if eqn.primitive.name == "broadcast_in_dim":
                            narrow[eqn.outvars[0]] = (values[0], eqn.params["broadcast_dimensions"])
                    else:
                        broadcast = [None if isinstance(atom, jex.Literal) else narrow.get(atom) for atom in eqn.invars]
                        outputs = self._apply(eqn, number, values, broadcast)
                    env.update(zip(eqn.outvars, outputs, strict=True))
        outputs = [read(atom) for atom in jaxpr.outvars]
        return [value.value() if isinstance(value, Pending) else value for value in outputs]

    def _apply(self, eqn: Any, number: int, values: list[Any], broadcast: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        with eqn.ctx.manager:
            try:
                if name in _CALLS:
                    values = [value.folded(number) if isinstance(value, Factored) else value for value in values]
                    calls, self._calls = self._calls, (*self._calls, number)
                    self._callers.append(eqn)
                    try:
                        return _CALLS[name](self, eqn, values)
                    finally:
                        self._calls = calls
                        self._callers.pop()
                if name in _VIEWS:
                    outputs = _VIEWS[name](eqn, values, broadcast)
                    return [self._settled(eqn, number, output) for output in outputs]
                if name in _USES:
                    return [self._settled(eqn, number, _USES[name](self, eqn, number, values))]
            except NotAView:
                pass
        return _bind(eqn, [self.formed(eqn, value, number) for value in values])

    def _settled(self, eqn: Any, number: int, value: Any) -> Any:
        """A view with no in or no out axis left is the result of a lookup: an activation, and as small as one."""
        if not isinstance(value, Factored):
            return value
        tags = {axis.tag for axis in value.axes}
        if "?" in tags or value.looked_up:
            rest = [axis for axis, size in zip(value.axes, value.shape, strict=True) if axis.origin and size > 1]
            if len(rest) > 1:
                return value
            self.record(eqn, number, value, "lookup", value.looked_up, [stored for axis in rest for stored in axis.origin])
            return value.weight
        if {"in", "out"} <= tags:
            return value
        self.record(eqn, number, value, "lookup", (), (), flops=_lookup_flops(value, value.weight.size))
        return value.dense()

    # --- forming weights ----------------------------------------------------------------------------------------------

    def formed(self, eqn: Any, value: Any, number: int = -1) -> Any:
        """The weight itself, if that is allowed."""
        if not isinstance(value, Factored):
            return value
        rest = [stored for axis in value.axes for stored in axis.origin]
        how = "lookup" if value.looked_up else "formed"
        self.record(eqn, number, value, how, value.looked_up, rest, flops=(0, _forming_flops(value), _forming_flops(value)))
        where = f"{_described(eqn)}, which has no low-rank rule, with the adapted weight", f" at {self.line(eqn)}"
        return self._dense(value, *where)

    def returned(self, outputs: Sequence[Any]) -> list[Any]:
        """The outputs of the function; a weight among them has to be formed."""
        where = "`fn` returning the adapted weight", ""
        return [self._dense(output, *where) if isinstance(output, Factored) else output for output in outputs]

    def _dense(self, value: Factored, operation: str, place: str) -> Any:
        if self.materialize == "allow":
            return value.dense()
        paths = " and ".join(map(repr, value.leaf.paths))
        message = (
            f"`adapt` met {operation} {paths} (as {value.dtype}{list(value.shape)}){place}. The weight "
            f"W + A·B would have to be formed there. Pass `materialize='allow'` (or 'warn') to `adapt` to form it, "
            f"or leave {paths} out of `targets`."
        )
        if self.materialize == "error":
            raise MaterializeError(message)
        warnings.warn(message, stacklevel=2)
        return value.dense()

    def all_formed(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        return [self.formed(eqn, value, -2 - position) for position, value in enumerate(values)]

    def record(
        self, eqn: Any, number: int, value: Factored, how: str, summed: Sequence, free: Sequence, batch: Sequence = (), flops: tuple = (0, 0, 0)
    ) -> None:
        if self.uses is None:
            return
        flops = tuple(self._times * count for count in flops)
        for path in value.leaf.paths:
            use = Use(path, eqn.primitive.name, how, tuple(summed), tuple(free), tuple(batch), flops, self.line(eqn))
            self.uses[(*self._calls, number, path)] = use  # a body that JAX traces twice is one use
            flops = (0, 0, 0)

    def line(self, eqn: Any) -> str:
        """The user's line behind an equation. Inside of a library's jitted function it is the line of the call."""
        lines = map(source, (eqn, *reversed(self._callers)))
        return next((line for line in lines if line), "an unknown line")

    @contextlib.contextmanager
    def repeated(self, times: int) -> Any:
        self._times *= times
        try:
            yield
        finally:
            self._times //= times

    def jitted(self, closed: Any, options: dict, name: str) -> Callable:
        """The jitted evaluation of an inner jaxpr: one for each jaxpr, so that a repeated call is traced once."""
        if self.uses is None and id(closed) in self._jitted:
            return self._jitted[id(closed)][1]

        def call(*operands: Any) -> list[Any]:
            return self.evaluate(closed, operands)

        call.__name__ = call.__qualname__ = name
        function = jax.jit(call, **options)
        self._jitted[id(closed)] = (closed, function)  # the jaxpr is kept: its id must stay its own
        return function


def trace(function: Callable, *arguments: Any) -> Any:
    """The jaxpr of `function`, which takes and returns flat lists of arrays."""
    return jax.make_jaxpr(function)(*arguments)


def _bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    parameters = eqn.primitive.get_bind_params(eqn.params)
    functions, parameters = parameters if isinstance(parameters, tuple) else ((), parameters)
    with eqn.ctx.manager:
        outputs = eqn.primitive.bind(*functions, *values, **parameters)
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def _postponed(eqn: Any, values: Sequence[Any]) -> list[Any] | None:
    """What becomes of a pending sum to which something is added, or which is split; None for any other operation."""
    positions = [position for position, value in enumerate(values) if isinstance(value, Pending)]
    if len(positions) != 1 or any(isinstance(value, Factored) for value in values):
        return None
    pending = values[positions[0]]
    if eqn.primitive.name == "add" and eqn.outvars[0].aval.shape == pending.y.shape:
        plain = [value.y if isinstance(value, Pending) else value for value in values]
        return [dataclasses.replace(pending, y=_bind(eqn, plain)[0])]
    if eqn.primitive.name == "split":
        return pending.cut(_bind(eqn, [pending.y]), eqn.params["axis"])
    return None


def source(eqn: Any) -> str:
    """`file:line (function)` of the innermost frame outside of the libraries, or nothing."""
    frames = getattr(eqn.source_info.traceback, "frames", None) or []
    for frame in frames:
        if "site-packages" not in frame.file_name and "<frozen" not in frame.file_name and "/lora_jax/_" not in frame.file_name:
            return f"{frame.file_name}:{frame.line_num} ({frame.function_name})"
    return ""


def _described(eqn: Any) -> str:
    name = eqn.params.get("name")
    return f"`{eqn.primitive.name}`" + (f" ({name})" if isinstance(name, str) else "")


# --- views: equations whose result is a factored weight again ---------------------------------------------------------


def _view(method: Callable[..., Factored]) -> Callable:
    return lambda eqn, values, broadcast: [method(eqn, *values)]


def _only_weight(eqn: Any, weight: Factored, *others: Any) -> Factored:
    """A cast or a copy of W; the factors are cast where they are used."""
    return weight.map_weight(lambda array: _bind(eqn, [array, *others])[0])


def _cast(eqn: Any, weight: Factored, *others: Any) -> Factored:
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        raise NotAView
    return _only_weight(eqn, weight, *others)


def _every_part(eqn: Any, weight: Factored, *others: Any) -> Factored:
    return weight.map_parts(lambda array: _bind(eqn, [array, *others])[0])


def _barrier(eqn: Any, values: list[Any], broadcast: list[Any]) -> list[Any]:
    """`optimization_barrier` takes and returns any number of values: all the factors go through it together.

    Each W goes through one of its own, because the derivative of a barrier is one of all of its operands: together with
    factors that train, W would get a gradient.
    """
    leaves, treedef = jax.tree.flatten([value.replace(weight=None, key=None) if isinstance(value, Factored) else value for value in values])
    outputs = jax.tree.unflatten(treedef, lax.optimization_barrier(leaves))
    weights = [lax.optimization_barrier(value.weight) if isinstance(value, Factored) else None for value in values]
    return [
        out.replace(weight=weight, key=value.key) if isinstance(value, Factored) else out
        for out, weight, value in zip(outputs, weights, values, strict=True)
    ]


def _multiplied(eqn: Any, values: list[Any], broadcast: list[Any]) -> list[Any]:
    """`mul` and `div` by a scalar or by an array that varies along few axes, and `neg`."""
    positions = [position for position, value in enumerate(values) if isinstance(value, Factored)]
    if len(positions) != 1 or (eqn.primitive.name == "div" and positions != [0]):
        raise NotAView
    weight = values[positions[0]]
    if len(values) == 1:
        return [weight.scaled(lax.neg)]
    other = 1 - positions[0]
    factor, dimensions = broadcast[other] or (values[other], range(jnp.ndim(values[other])))
    if eqn.outvars[0].aval.shape != weight.shape:
        raise NotAView
    sizes = dict(zip(dimensions, jnp.shape(factor), strict=True))
    factor = lax.reshape(jnp.asarray(factor), [sizes.get(index, 1) for index in range(len(weight.shape))])
    array = _bind(eqn, [value.weight if value is weight else value for value in values])[0]
    return [_views.rescaled(weight, array, factor, lax.div if eqn.primitive.name == "div" else lax.mul)]


def _concatenated(eqn: Any, values: list[Any], broadcast: list[Any]) -> list[Any]:
    return [_views.concatenated(values, eqn.params["dimension"])]


def _stacked(eqn: Any, values: list[Any], broadcast: list[Any]) -> list[Any]:
    return [_views.stacked(values, eqn.params["axis"])]


def _padded(eqn: Any, weight: Any, value: Any) -> Factored:
    if not isinstance(weight, Factored) or isinstance(value, Factored):
        raise NotAView
    return _views.padded(weight, _bind(eqn, [weight.weight, value])[0], eqn.params["padding_config"])


def _all_gathered(eqn: Any, weight: Factored) -> Factored:
    """A weight that a `shard_map` gathers from its shards: so are its factors, along the axis if they have it."""
    params = eqn.params
    if not params["tiled"]:
        raise NotAView
    options = {"axis_index_groups": params["axis_index_groups"], "tiled": True}
    gather = lambda part, axis: lax.all_gather(part, params["axis_name"], axis=axis, **options)  # noqa: E731
    return _views.along(weight, _bind(eqn, [weight.weight])[0], params["all_gather_dimension"], gather)


def _resharded(eqn: Any, weight: Factored) -> Factored:
    """W moved to another explicit sharding; the factors to its restriction to their axes."""
    array = _bind(eqn, [weight.weight])[0]
    mesh, spec = eqn.params["dst_sharding"].mesh, eqn.params["dst_sharding"].spec
    weight = weight.unwindowed()
    place = lambda part, spec: jax.sharding.reshard(part, jax.sharding.NamedSharding(mesh, spec))  # noqa: E731
    parts = jax.tree.map(place, weight.replace(key=None), weight.replace(key=None).partition_specs(spec))
    return parts.replace(weight=array, key=weight.key)


def _sharded(eqn: Any, weight: Factored) -> Factored:
    """A sharding constraint on W; the factors follow by propagation."""
    return _only_weight(eqn, weight)


def _broadcast(eqn: Any, weight: Factored, *dynamic: Any) -> Factored:
    if dynamic:
        raise NotAView
    return weight.broadcast(eqn.params["shape"], eqn.params["broadcast_dimensions"])


def _reshaped(eqn: Any, weight: Factored, *dynamic: Any) -> Factored:
    if dynamic or eqn.params.get("dimensions") is not None:
        raise NotAView
    return weight.reshaped(eqn.params["new_sizes"])


def _sliced(eqn: Any, weight: Factored) -> Factored:
    return weight.sliced(eqn.params["start_indices"], eqn.params["limit_indices"], eqn.params["strides"])


def _split(eqn: Any, values: list[Any], broadcast: list[Any]) -> list[Any]:
    (weight,), axis, start, parts = values, eqn.params["axis"], 0, []
    for size in eqn.params["sizes"]:
        starts, stops = [0] * len(weight.shape), list(weight.shape)
        starts[axis], stops[axis] = start, start + size
        parts.append(weight.sliced(starts, stops, None))
        start += size
    return parts


def _dynamic_sliced(eqn: Any, weight: Any, *starts: Any) -> Factored:
    return weight.dynamic_sliced(starts, eqn.params["slice_sizes"])


_VIEWS: dict[str, Callable] = {
    "convert_element_type": _view(_cast),
    "transpose": _view(lambda eqn, weight: weight.transposed(eqn.params["permutation"])),
    "reshape": _view(_reshaped),
    "squeeze": _view(lambda eqn, weight: weight.squeezed(eqn.params["dimensions"])),
    "expand_dims": _view(lambda eqn, weight: weight.broadcast(eqn.outvars[0].aval.shape, eqn.params["dimensions"])),
    "broadcast_in_dim": _view(_broadcast),
    "slice": _view(_sliced),
    "dynamic_slice": _view(_dynamic_sliced),
    "split": _split,
    "rev": _view(lambda eqn, weight: weight.reversed(eqn.params["dimensions"])),
    "mul": _multiplied,
    "div": _multiplied,
    "neg": _multiplied,
    "copy": _view(_only_weight),
    "copy_p": _view(_only_weight),
    "reduce_precision": _view(_only_weight),
    "stop_gradient": _view(_every_part),
    "pvary": _view(_every_part),
    "pcast": _view(_every_part),
    "sharding_constraint": _view(_sharded),
    "reshard": _view(_resharded),
    "all_gather": _view(_all_gathered),
    "concatenate": _concatenated,
    "stack": _stacked,
    "pad": _view(_padded),
    "optimization_barrier": _barrier,
}


# --- uses: equations whose result is an array -------------------------------------------------------------------------


def _dot_general(self: Interpreter, eqn: Any, number: int, values: list[Any]) -> Any:
    left, right = values
    if isinstance(left, Factored) and isinstance(right, Factored):
        left = self.formed(eqn, left, -2 - number)  # the right operand of a product is the weight, by convention
    weight_on_left = isinstance(left, Factored)
    weight, x = (left, right) if weight_on_left else (right, left)
    numbers = eqn.params["dimension_numbers"]
    (own, own_batch) = (numbers[0][0], numbers[1][0]) if weight_on_left else (numbers[0][1], numbers[1][1])
    base = lambda x, w: _bind(eqn, [w, x] if weight_on_left else [x, w])[0]  # noqa: E731
    y = _contract.dot_general(base, x, weight.folded(number), numbers, weight_on_left, eqn.params["precision"])
    self._contraction(eqn, number, weight, own, own_batch)
    return y


def _contraction(self: Interpreter, eqn: Any, number: int, weight: Factored, own: Sequence[int], batch: Sequence[int]) -> None:
    stored = lambda labels: [axis for label in labels for axis in weight.axes[label].origin]  # noqa: E731
    free = [label for label in range(len(weight.axes)) if label not in (*own, *batch)]
    out = eqn.outvars[0].aval.size
    flops = 2 * out
    for label in own:
        flops *= weight.shape[label]
    flops //= eqn.params.get("feature_group_count", 1)
    self.record(eqn, number, weight, "low-rank", stored(own), stored(free), stored(batch), _contraction_flops(weight, flops))


Interpreter._contraction = _contraction


def _contraction_flops(weight: Factored, flops: int) -> tuple[int, int, int]:
    sizes = {tag: 1 for tag in ("in", "out")}
    for axis, size in zip(weight.axes, weight.shape, strict=True):
        if axis.tag in sizes:
            sizes[axis.tag] *= size
    low = flops
    for term in weight.terms:
        rank = term.a.shape[-1]
        covered = {"in": 1.0, "out": 1.0}
        if term.window is not None:
            covered[weight.axes[weight.windowed].tag] = (term.window[1] - term.window[0]) / weight.shape[weight.windowed]
        low += int(covered["in"] * flops * rank / sizes["out"] + covered["out"] * flops * rank / sizes["in"])
    return flops, low, flops + _forming_flops(weight)


def _forming_flops(weight: Factored) -> int:
    return sum(2 * term.a.shape[-1] * weight.weight.size + weight.weight.size for term in weight.terms)


def _lookup_flops(weight: Factored, size: int) -> tuple[int, int, int]:
    return 0, sum((2 * term.a.shape[-1] + 1) * size for term in weight.terms), _forming_flops(weight)


def _convolution(self: Interpreter, eqn: Any, number: int, values: list[Any]) -> Any:
    x, weight = values
    if not isinstance(weight, Factored) or isinstance(x, Factored):
        raise NotAView
    out_axis = eqn.params["dimension_numbers"].rhs_spec[0]
    reading = any(axis.tag == "?" for axis in weight.axes)
    base = lambda x, w: _bind(eqn, [x, w])[0]  # noqa: E731
    y = base(x, weight.weight) if reading else _contract.conv_general_dilated(base, x, weight.folded(number), eqn.params)
    self._contraction(eqn, number, weight, [label for label in range(len(weight.axes)) if label != out_axis], ())
    return y


def _ragged_dot(self: Interpreter, eqn: Any, number: int, values: list[Any]) -> Any:
    x, weight, sizes = values
    if not isinstance(weight, Factored) or isinstance(x, Factored) or isinstance(sizes, Factored):
        raise NotAView
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    own = numbers.dot_dimension_numbers[0][1]
    reading = any(axis.tag == "?" for axis in weight.axes)
    base = lambda x, w: _bind(eqn, [x, w, sizes])[0]  # noqa: E731
    y = base(x, weight.weight) if reading else _contract.ragged_dot(base, x, weight.folded(number), sizes, eqn.params)
    self._contraction(eqn, number, weight, own, numbers.rhs_group_dimensions)
    return y


def _gather(self: Interpreter, eqn: Any, number: int, values: list[Any]) -> Any:
    weight, indices = values
    if not isinstance(weight, Factored) or isinstance(indices, Factored):
        raise NotAView
    out = _contract.gather(lambda w, i: _bind(eqn, [w, i])[0], weight, indices, eqn.params)
    if not isinstance(out, Factored):
        picked = [stored for axis in eqn.params["dimension_numbers"].start_index_map for stored in weight.axes[axis].origin]
        self.record(eqn, number, weight, "lookup", picked, (), flops=_lookup_flops(weight, out.size))
    return out


_USES: dict[str, Callable] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "ragged_dot_general": _ragged_dot,
    "gather": _gather,
}


# --- equations that hold jaxprs ----------------------------------------------------------------------------------------


def _jit(self: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    params = eqn.params
    options: dict[str, Any] = {"keep_unused": params.get("keep_unused", False)}
    shardings = params.get("in_shardings", ())
    if any(isinstance(sharding, jax.sharding.Sharding) for sharding in shardings):
        plain = [isinstance(s, jax.sharding.Sharding) and not isinstance(v, Factored) for s, v in zip(shardings, values, strict=True)]
        options["in_shardings"] = tuple(s if keep else None for s, keep in zip(shardings, plain, strict=True))
    shardings = params.get("out_shardings", ())
    if any(isinstance(sharding, jax.sharding.Sharding) for sharding in shardings):
        options["out_shardings"] = [s if isinstance(s, jax.sharding.Sharding) else None for s in shardings]
    if params.get("inline") is True:
        return self.evaluate(params["jaxpr"], values)
    return self.jitted(params["jaxpr"], options, params.get("name", "jit"))(*values)


def _checkpoint(self: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    options = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
    return jax.checkpoint(lambda *operands: self.evaluate(eqn.params["jaxpr"], operands), **options)(*values)


def _inlined(self: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    return self.evaluate(eqn.params.get("call_jaxpr", eqn.params.get("jaxpr")), values)


def _invariant(jaxpr: Any, carry: Sequence[Any], offset: int) -> list[bool]:
    """Which factored weights a loop hands on unchanged in its carry: constants in fact."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return [isinstance(c, Factored) and jaxpr.outvars[i] is jaxpr.invars[offset + i] for i, c in enumerate(carry)]


def _merged(mask: Sequence[bool], where_true: Sequence[Any], where_false: Sequence[Any]) -> list[Any]:
    true, false = iter(where_true), iter(where_false)
    return [next(true) if flag else next(false) for flag in mask]


def _scan_parts(params: dict, values: list[Any]) -> tuple[list, list, list]:
    if "ft_in" in params:  # jax 0.11 and later
        consts, carry, xs = params["ft_in"].update(values).unpack()
        return list(consts), list(carry), list(xs)
    first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
    return values[:first], values[first:last], values[last:]


def _scan(self: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    params, jaxpr = eqn.params, eqn.params["jaxpr"]
    consts, init, xs = _scan_parts(params, values)
    fixed = _invariant(jaxpr, init, len(consts))
    init = [value if keep else self.formed(eqn, value, -2 - index) for index, (value, keep) in enumerate(zip(init, fixed, strict=True))]
    constant_carry = [value for value, keep in zip(init, fixed, strict=True) if keep]
    moving_carry = [value for value, keep in zip(init, fixed, strict=True) if not keep]
    sliced = [value.unstacked() if isinstance(value, Factored) else (value, None) for value in xs]

    def body(carry: list[Any], step: tuple) -> tuple[list[Any], list[Any]]:
        index, slices = step
        here = [rebuild(part) if rebuild else part for part, (_, rebuild) in zip(slices, sliced, strict=True)]
        shared = [value.folded(index) if isinstance(value, Factored) else value for value in (*consts, *constant_carry)]
        whole = _merged(fixed, shared[len(consts) :], carry)
        outputs = self.evaluate(jaxpr, [*shared[: len(consts)], *whole, *here])
        kept = [value for value, keep in zip(outputs[: len(init)], fixed, strict=True) if not keep]
        outputs = self.all_formed(eqn, [*kept, *outputs[len(init) :]])
        return outputs[: len(kept)], outputs[len(kept) :]

    random = any(isinstance(value, Factored) and value.key is not None for value in (*consts, *constant_carry))
    steps = jnp.arange(params["length"]) if random else None
    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    if "_split_transpose" in params:
        options["_split_transpose"] = params["_split_transpose"]
    with self.repeated(params["length"]):
        moved, ys = lax.scan(body, moving_carry, (steps, [part for part, _ in sliced]), **options)
    return [*_merged(fixed, constant_carry, moved), *ys]


def _while(self: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    params = eqn.params
    first, last = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    cond_consts, body_consts, init = values[:first], values[first:last], values[last:]
    fixed = _invariant(params["body_jaxpr"], init, len(body_consts))
    init = [value if keep else self.formed(eqn, value, -2 - index) for index, (value, keep) in enumerate(zip(init, fixed, strict=True))]
    constant_carry = [value for value, keep in zip(init, fixed, strict=True) if keep]
    moving_carry = [value for value, keep in zip(init, fixed, strict=True) if not keep]

    def keep_going(state: tuple) -> Any:
        return self.all_formed(eqn, self.evaluate(params["cond_jaxpr"], [*cond_consts, *_merged(fixed, constant_carry, state[1])]))[0]

    def body(state: tuple) -> tuple:
        index, carry = state
        shared = [value.folded(index) if isinstance(value, Factored) else value for value in (*body_consts, *constant_carry)]
        whole = _merged(fixed, shared[len(body_consts) :], carry)
        outputs = self.evaluate(params["body_jaxpr"], [*shared[: len(body_consts)], *whole])
        kept = [value for value, keep in zip(outputs, fixed, strict=True) if not keep]
        return (None if index is None else index + 1), self.all_formed(eqn, kept)

    random = any(isinstance(value, Factored) and value.key is not None for value in (*body_consts, *constant_carry))
    _, moved = lax.while_loop(keep_going, body, (jnp.zeros((), jnp.int32) if random else None, moving_carry))
    return _merged(fixed, constant_carry, moved)


def _cond(self: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    index, *operands = values

    def branch(position: int, jaxpr: Any) -> Callable:
        def run(*operands: Any) -> list[Any]:
            calls, self._calls = self._calls, (*self._calls, position)
            try:
                return self.all_formed(eqn, self.evaluate(jaxpr, operands))
            finally:
                self._calls = calls

        return run

    return lax.switch(index, [branch(position, jaxpr) for position, jaxpr in enumerate(eqn.params["branches"])], *operands)


def _shard_map(self: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    params = eqn.params
    specs = []
    for index, (value, spec) in enumerate(zip(values, params["in_specs"], strict=True)):
        if isinstance(value, Factored):
            value = values[index] = value.unwindowed([axis for axis, names in enumerate(spec) if names is not None])
            spec = value.partition_specs(spec)
        specs.append(spec)
    manual = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]
    function = jax.shard_map(
        lambda *operands: self.all_formed(eqn, self.evaluate(params["jaxpr"], operands)),
        mesh=params["mesh"],
        in_specs=tuple(specs),
        out_specs=list(params["out_specs"]),
        check_vma=params["check_vma"],
        axis_names=set(manual),
    )
    return function(*values)


# custom_jvp_call and custom_vjp_call are missing on purpose: inlining them would drop the author's derivative.
_CALLS: dict[str, Callable] = {
    "jit": _jit,
    "pjit": _jit,
    "closed_call": _inlined,
    "core_call": _inlined,
    "checkpoint": _checkpoint,
    "remat": _checkpoint,
    "remat2": _checkpoint,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
