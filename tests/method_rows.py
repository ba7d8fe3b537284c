"""The methods as a table: a row each, with its equation written out as the paper has it, and the model that
`test_methods.py` tries them on. A new method is a new row, and inherits every column."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import lora_jax
from lora_jax import AdaLoRA, DeltaLoRA, DoRA, DyLoRA, Full, LoRA, LoRAFA, PiSSA, VeRA
from lora_jax._tree.nodes import Adapter, Fixed, is_node, Shared


# --- the model ----------------------------------------------------------------------------------------------

# Every way of using a weight that a language model has. All sizes are even, so that they can be sharded, and
# no activation, and no A or B of any row, has as many elements as a weight or a layer of one.
VOCABULARY, WIDTH, HIDDEN, LAYERS, HEADS, HEAD, OUT = 18, 8, 20, 3, 2, 10, 14
AXES = {
    "table": "in out",
    "qkv": "in out",
    "layers/up": "layer in out",
    "layers/down": "layer in out",
    "heads": "in out out",
    "out": "out in",
}
SHAPES = {
    "table": (VOCABULARY, WIDTH),
    "qkv": (WIDTH, 3 * WIDTH),
    "layers": {"up": (LAYERS, WIDTH, HIDDEN), "down": (LAYERS, HIDDEN, WIDTH), "bias": (LAYERS, HIDDEN)},
    "heads": (WIDTH, HEADS, HEAD),
    "out": (OUT, HEAD),
    "bias": (OUT,),
}
WEIGHT_SIZES = {
    VOCABULARY * WIDTH,
    WIDTH * 3 * WIDTH,
    LAYERS * WIDTH * HIDDEN,
    WIDTH * HIDDEN,
    WIDTH * HEADS * HEAD,
    HEAD * OUT,
}
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (4, 3)).astype(np.int32)


def layer(weights, x):
    """A step of the loop over the stacked layers."""
    h = jnp.tanh(x @ weights["up"] + jnp.broadcast_to(weights["bias"], (*x.shape[:-1], HIDDEN)))
    return x + h @ weights["down"]


def model(params, tokens, shift=None):
    """Tokens (..., time) to (..., time, OUT). `shift` is added to the embedding, to have an input with a
    derivative.
    """
    x = params["table"][tokens]
    x = x if shift is None else x + jnp.broadcast_to(shift, x.shape)
    q, k, v = jnp.split(x @ params["qkv"], 3, axis=-1)
    x = x + jnp.tanh(q) * k + v
    x = lax.scan(lambda x, weights: (layer(weights, x), None), x, params["layers"])[0]
    heads = jnp.einsum("...d,dhk->...hk", x, params["heads"])
    y = jnp.tanh(heads).sum(axis=-2) @ params["out"].T
    return y + jnp.broadcast_to(params["bias"], y.shape)


def parameters(dtype):
    rng = np.random.default_rng(1)
    of = lambda shape: jnp.asarray(rng.normal(size=shape) / math.sqrt(10), dtype)
    return jax.tree.map(of, SHAPES, is_leaf=lambda node: isinstance(node, tuple))


# --- the table ----------------------------------------------------------------------------------------------

# What the arrays of a method are: A, B or a vector along the rank or the output, all with layers in front, or
# something else that an equation takes as it is.
AB = {"a": "a", "b": "b"}
START = {"start_a": "a", "start_b": "b"}
constant = lax.stop_gradient


@dataclasses.dataclass(frozen=True)
class Row:
    """A method, W' of one matrix by its equation, and the names and kinds of what trains and of what is fixed
    beside W.

    `qkv`: another row for that leaf. `begin`: what happens to `frozen` before W' is what the equation says.
    `like`: the row whose canonical form it has, but for its numbers: of such two, the costliest columns need
    one.
    """

    name: str
    method: Any
    equation: Callable
    trains: dict[str, str]
    fixed: dict[str, str] = dataclasses.field(default_factory=dict)
    qkv: "Row | None" = None
    begin: Callable = lambda frozen, delta: frozen
    learning_rate: float = 0.02
    like: str | None = None

    @property
    def targets(self):
        """For `lorafy`: every weight, or for `Full` every leaf."""
        own = {"qkv": self.qkv.method} if self.qkv else {}
        return {**own, ".*" if self.method == Full() else "|".join(AXES): self.method}

    def of(self, path):
        return self.qkv if self.qkv and path == "qkv" else self


def _lora(scale):
    return lambda w, a, b: w + scale * a @ b


def _blocks(w, a, b):
    q, k, v = jnp.split(w, 3, axis=1)
    return jnp.concatenate([q + 1.5 * a[0] @ b[0], k, v + 1.5 * a[1] @ b[1]], axis=1)


def _dora(w, a, b, m, square):
    direction = w + 1.5 * a @ b
    return direction * (m / constant(jnp.linalg.norm(direction, axis=0)))[None]


def _vera(w, b, d, shared_a, shared_b):
    shared_a, shared_b = shared_a[: w.shape[0]], shared_b[:, : w.shape[1]]
    return w + (shared_a * d[None]) @ (shared_b * b[None])


def _delta(w, a, b, start_a, start_b):
    return w + 1.5 * a @ b + constant(0.5 * 1.5 * (a @ b - start_a @ start_b))


def _pissa(w, a, b, start_a, start_b):
    return w + 1.5 * (a @ b - start_a @ start_b)


_AB = LoRA(rank=2, alpha=3)
ROWS = [
    Row("LoRA", _AB, _lora(1.5), AB),
    Row("rsLoRA", LoRA(rank=2, alpha=3, rs=True), _lora(3 / math.sqrt(2)), AB, like="LoRA"),
    Row(
        "LoRA of blocks",
        _AB,
        _lora(1.5),
        AB,
        qkv=Row(
            "",
            LoRA(rank=2, alpha=3, blocks=(True, False, True)),
            _blocks,
            {"a": "a of blocks", "b": "b of blocks"},
        ),
    ),
    Row("DoRA", DoRA(rank=2, alpha=3), _dora, {**AB, "m": "out"}, {"square": "out"}),
    Row(
        "VeRA",
        VeRA(rank=5),
        _vera,
        {"b": "out", "d": "rank"},
        {"shared_a": "shared", "shared_b": "shared"},
        learning_rate=0.1,
    ),
    Row(
        "LoRA-FA", LoRAFA(rank=2, alpha=3), lambda w, a, b: w + 1.5 * constant(a) @ b, {"b": "b"}, {"a": "a"}
    ),
    Row("DyLoRA", DyLoRA(rank=2, alpha=3), _lora(1.5), AB),
    Row("DyLoRA, all", DyLoRA(rank=2, alpha=3, train="all"), _lora(1.5), AB, like="DyLoRA"),
    Row("Delta-LoRA", DeltaLoRA(rank=2, alpha=3, ratio=0.5), _delta, AB, START),
    Row(
        "Delta-LoRA, delayed",
        DeltaLoRA(rank=2, alpha=3, ratio=0.5, delayed=True),
        _delta,
        AB,
        START,
        begin=lora_jax.methods.start_delta,
        like="Delta-LoRA",
    ),
    Row(
        "AdaLoRA",
        AdaLoRA(rank=2, alpha=3),
        lambda w, a, b, e: w + 3 / (2 + 1e-5) * (a * e[None]) @ b,
        {**AB, "e": "rank"},
        learning_rate=0.1,
    ),
    Row("PiSSA", PiSSA(rank=2, alpha=3), _pissa, AB, START),
    Row("PiSSA, iterations", PiSSA(rank=2, alpha=3, iterations=4), _pissa, AB, START, like="PiSSA"),
    Row("Full", Full(), None, {}),
]
BY_NAME = {row.name: row for row in ROWS}
APART = [row.name for row in ROWS if row.like is None and row.method != Full()]
ADAPTERS = [name for name in BY_NAME if name != "Full"]


def literal(row, frozen, delta):
    """The merged parameters, every matrix by its row's equation."""
    nodes = [node for node in jax.tree.leaves(frozen, is_leaf=is_node) if isinstance(node, Fixed)]

    def found(name, array):
        return (
            next(node.arrays[name] for node in nodes if node.spec.path == array.path)
            if isinstance(array, Shared)
            else array
        )

    def leaf(weight, adapter):
        if not isinstance(adapter, Adapter):
            return weight if adapter is None else adapter
        fixed = weight.arrays if isinstance(weight, Fixed) else {}
        arrays = adapter.arrays | {name: found(name, array) for name, array in fixed.items()}
        return by_matrix(
            row.of(adapter.spec.path), weight.weight if fixed else weight, adapter.spec.axes, arrays
        )

    return jax.tree.map(leaf, frozen, delta, is_leaf=is_node)


def by_matrix(row, weight, axes, arrays):
    layers, ins, outs = (
        [axis for axis, word in enumerate(axes) if word == wanted] for wanted in ("layer", "in", "out")
    )
    order = (*layers, *ins, *outs)
    count, rows, columns = (math.prod(weight.shape[axis] for axis in group) for group in (layers, ins, outs))
    turned = lax.transpose(weight, order)
    kinds = row.trains | row.fixed
    shapes = {"a": (count, rows, -1), "b": (count, -1, columns), "rank": (count, -1), "out": (count, columns)}
    along = {name: 0 if kinds[name] in shapes else None for name in arrays}
    matrices = {name: array.reshape(shapes.get(kinds[name], array.shape)) for name, array in arrays.items()}
    result = jax.vmap(lambda w, arrays: row.equation(w, **arrays), (0, along))(
        turned.reshape(count, rows, columns), matrices
    )
    return lax.transpose(result.reshape(turned.shape), np.argsort(order))


# LLVM at its quickest, for what is compiled once and run once. Not where equality to the bit is asked for.
quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


# --- cases --------------------------------------------------------------------------------------------------


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "frozen", "start", "delta", "later"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Case:
    params: Any
    frozen: Any
    start: Any  # the delta of `lorafy`
    delta: Any  # the same, moved at random
    later: Any  # `frozen`, if what happens to it happens at some other state


def precision(dtype):
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def moved(delta, size=0.3, seed=2):
    """Another state of training: every array of it, by a random step, in NumPy, which compiles nothing."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda array: jnp.asarray(
            np.asarray(array) + (size * rng.normal(size=array.shape)).astype(array.dtype)
        ),
        delta,
    )


def adapters_of(row, params, seed=3):
    """`frozen` and `delta` for this row, before anything happens to `frozen`."""
    return lora_jax.lorafy(
        params, row.targets, axes=AXES if row.method.needs_axes else None, key=jax.random.key(seed)
    )


@functools.lru_cache(maxsize=None)
def case(name, dtype="float32"):
    row = BY_NAME[name]
    if dtype == "float64":
        return widened_case(name)
    params = parameters(dtype)
    frozen, start = adapters_of(row, params)
    return Case(
        params, row.begin(frozen, start), start, moved(start), row.begin(frozen, moved(start, seed=9))
    )


def widened_case(name):
    """That of float32 in float64, which compiles nothing but what depends on all bits of W."""
    here = case(name)

    def exact(node):
        if not isinstance(node, Fixed) or not isinstance(node.spec.method, DoRA):
            return node
        return Fixed(node.weight, node.spec.method.derived(node.weight, node.spec), node.spec)

    with precision("float64"):
        wide = jax.tree.map(lambda array: jnp.asarray(np.asarray(array, np.float64)), here)
        frozen, later = (jax.tree.map(exact, tree, is_leaf=is_node) for tree in (wide.frozen, wide.later))
        return dataclasses.replace(wide, frozen=frozen, later=later)
