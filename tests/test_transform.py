"""The function transform: every JAX transformation, inside of the adapted function and around it, for every
way of using a weight, against the merged weights in float64."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formation import formed
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P

import lora_jax
from lora_jax import LoRA


BATCH = 4  # of independent inputs, for the transformations that map or loop over them


@dataclasses.dataclass(frozen=True)
class Usage:
    """One way of using a weight. No activation has as many elements as the weight, or as one layer of it."""

    shape: tuple[int, ...]
    axes: str
    x_shape: tuple[int, ...]
    fn: Any
    blocks: tuple[bool, ...] | None = None


def _embedding(w, x):
    return jnp.tanh(w[jnp.array([[3, 1], [0, 10]])] * x)


def _conv(w, x):
    return jnp.tanh(
        lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    )


def _split_qkv(w, x):
    q, k, v = jnp.split(w, 3, axis=1)
    return jnp.tanh(x @ q) * (x @ k) + x @ v


def _indexed_stack(w, x):
    for layer in (2, 0):
        x = jnp.tanh(x @ w[jnp.asarray(layer) + jnp.asarray(x[0, 0] > 1e9, int)])  # a traced index
    return x


USAGES = {
    "dot": Usage((5, 7), "in out", (3, 5), lambda w, x: jnp.tanh(x @ w)),
    "heads": Usage((5, 2, 4), "in out out", (3, 5), lambda w, x: jnp.tanh(jnp.einsum("td,dhk->htk", x, w))),
    "embedding": Usage((11, 5), "in out", (2, 2, 5), _embedding),
    "conv": Usage((3, 3, 2, 4), "in in in out", (1, 5, 4, 2), _conv),
    "split-qkv": Usage((5, 21), "in out", (2, 5), _split_qkv, (True, False, True)),
    "indexed stack": Usage((3, 5, 5), "layer in out", (2, 5), _indexed_stack),
}


def _with_inputs(use):
    """The inputs that a looping or mapping transformation consumes, made from one input."""
    return lambda w, x: use(w, jnp.stack([x * (1 + step) for step in range(BATCH)]))


def _mesh():
    return jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))


def _loop(w, x, use):
    """A while loop over a number of steps that is not known when it is traced: it has no reverse
    derivative.
    """
    out = jnp.zeros_like(use(w, x))
    _, _, _, total = lax.while_loop(
        lambda state: state[0] < 3,
        lambda state: (state[0] + 1, state[1], state[2], state[3] + use(state[1], state[2])),
        (0, w, x, out),
    )
    return total


def _custom_jvp(use):
    function = jax.custom_jvp(use)
    function.defjvp(lambda primals, tangents: jax.jvp(use, primals, tangents))
    return function


def _custom_vjp(use):
    function = jax.custom_vjp(use)
    function.defvjp(
        lambda w, x: (use(w, x), (w, x)), lambda saved, cotangent: jax.vjp(use, *saved)[1](cotangent)
    )
    return function


# Each takes a function (weights, x) and returns one, with the transformation around it. `weights` is an array
# when the transformation is inside of the adapted function, and an adapted tree when it is outside.
TRANSFORMATIONS = {
    "jit": lambda use: jax.jit(use),
    "grad": lambda use: lambda w, x: jax.grad(lambda x: jnp.sum(use(w, x) ** 2))(x),
    "vmap": lambda use: _with_inputs(jax.vmap(use, in_axes=(None, 0))),
    "scan": lambda use: _with_inputs(
        lambda w, xs: lax.scan(lambda total, x: (total + 1, use(w, x)), 0.0, xs)[1]
    ),
    "while": lambda use: lambda w, x: _loop(w, x, use),
    "cond": lambda use: lambda w, x: lax.cond(jnp.sum(x) > 0, use, lambda w, x: use(w, 2 * x), w, x),
    "checkpoint": lambda use: jax.checkpoint(use, policy=jax.checkpoint_policies.nothing_saveable),
    "custom_jvp": _custom_jvp,
    "custom_vjp": _custom_vjp,
    "shard_map": lambda use: _with_inputs(
        jax.shard_map(
            lambda w, xs: jax.vmap(use, in_axes=(None, 0))(w, xs),
            mesh=_mesh(),
            in_specs=(P(), P("data")),
            out_specs=P("data"),
        )
    ),
}
# Inside of the adapted function, every transformation meets every usage. Around it, JAX transforms a program
# without weights to form: two usages each, so that every one has its turn.
CELLS = [(name, "inside", usage) for name in TRANSFORMATIONS for usage in USAGES] + [
    (name, "outside", list(USAGES)[(2 * number + turn) % len(USAGES)])
    for number, name in enumerate(TRANSFORMATIONS)
    for turn in (0, 1)
]


def _trained(tree):
    return tree["w"].adapter.arrays


def _rejoined(tree, arrays):
    adapter = dataclasses.replace(tree["w"].adapter, arrays=arrays)
    return {"w": dataclasses.replace(tree["w"], adapter=adapter)}


@pytest.mark.parametrize(
    "name, side, usage", CELLS, ids=[f"{name}-{side}-{usage}" for name, side, usage in CELLS]
)
def test_composes(name, side, usage, x64):
    case, transformation = USAGES[usage], TRANSFORMATIONS[name]
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=case.shape))}
    x = jnp.asarray(rng.normal(size=case.x_shape)) * 0.5
    frozen, delta = lora_jax.lorafy(
        params, "w", method=LoRA(rank=2, alpha=3, blocks=case.blocks), axes=case.axes
    )
    delta = jax.tree.map(lambda array: jnp.asarray(rng.normal(size=array.shape)), delta)

    def plain(params, x):
        return case.fn(params["w"], x)

    def around_plain(params, x):
        return transformation(lambda w, x: case.fn(w, x))(params["w"], x)

    if side == "inside":
        reference, adapted = around_plain, lora_jax.adapt(around_plain)
    else:
        reference = transformation(plain)
        adapted = transformation(lora_jax.adapt(plain))
        if name in ("custom_jvp", "custom_vjp"):
            # Around the function, the author's rule takes its derivative with respect to every operand: the
            # adapter is one, the base is not.
            forward = lora_jax.adapt(plain)
            adapted = lambda tree, x: transformation(lambda a, x: forward(_rejoined(tree, a), x))(
                _trained(tree), x
            )

    def of_merged(delta, x):
        return reference(lora_jax.merge(frozen, delta), x)

    def of_adapted(delta, x):
        return adapted(lora_jax.combine(frozen, delta), x)

    forms = side == "inside" and name in (
        "custom_jvp",
        "custom_vjp",
    )  # an author's derivative is never inlined
    if forms:
        with pytest.raises(ValueError, match=rf"`{name}_call`.*'w'.*test_transform.py"):
            of_adapted(delta, x)
        adapted = lora_jax.adapt(around_plain, materialize="allow")

    def with_derivative(fn, delta, x):
        if name == "while":  # JAX has no reverse derivative of it: the forward one
            return jax.jvp(fn, (delta, x), jax.tree.map(jnp.ones_like, (delta, x)))
        squared = lambda delta, x: (jnp.sum(fn(delta, x) ** 2), fn(delta, x))
        gradient, value = jax.grad(squared, (0, 1), has_aux=True)(delta, x)
        return value, gradient

    both = jax.jit(
        lambda delta, x: (with_derivative(of_adapted, delta, x), with_derivative(of_merged, delta, x))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), *both(delta, x))

    if forms:
        return

    def jaxpr_of(of_trees):
        return jax.make_jaxpr(
            lambda frozen, delta, x: with_derivative(lambda d, x: of_trees(frozen, d, x), delta, x)
        )(frozen, delta, x)

    jaxpr = jaxpr_of(lambda frozen, delta, x: adapted(lora_jax.combine(frozen, delta), x))
    sizes = {params["w"].size, params["w"].size // (case.shape[0] if "layer" in case.axes else 1)}
    for size in sizes:
        assert not formed(jaxpr, [0], size), formed(jaxpr, [0], size)
    if usage == "dot":
        control = jaxpr_of(lambda frozen, delta, x: reference(lora_jax.merge(frozen, delta), x))
        assert formed(control, [0], params["w"].size), (
            "the walk does not see that the merged form computes the weight"
        )


# --- what JAX was told of a loop or a call ------------------------------------------------------------------


def _with_options(params, x):
    """Loops and calls with every option that changes neither values nor shapes, or that changes them."""
    backward = lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, params["stack"], reverse=True, unroll=2)
    remembered = jax.checkpoint(
        lambda w: jnp.tanh(x @ w),
        policy=jax.checkpoint_policies.dots_saveable,
        prevent_cse=False,
    )(params["w"])
    named = jax.jit(lambda w, unused: x @ w, keep_unused=True)
    mapped = jax.shard_map(
        lambda x, w: x @ w,
        mesh=jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2),
        in_specs=(P("data"), P()),
        out_specs=P("data"),
        axis_names={"data"},
        check_vma=False,
    )
    return backward, remembered, named(params["w"], x), mapped(x, params["w"])


def _options(jaxpr):
    """Of every loop and call: all parameters but those that describe the operands."""
    kept = ("reverse", "unroll", "length", "policy", "prevent_cse", "name")
    kept += ("keep_unused", "check_vma", "manual_axes", "newly_manual_axes")
    names = ("scan", "checkpoint", "remat", "remat2", "jit", "pjit", "shard_map")
    return [
        (eqn.primitive.name, {name: eqn.params[name] for name in kept if name in eqn.params})
        for eqn in jaxpr.eqns
        if eqn.primitive.name in names
    ]


def test_loops_and_calls_keep_their_options(x64):
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.normal(size=size)) for name, size in (("stack", (4, 6, 6)), ("w", (6, 6)))
    }
    frozen, delta = lora_jax.lorafy(params, ".*", method=LoRA(rank=2), axes={"stack": "layer in out"})
    delta = jax.tree.map(lambda array: jnp.asarray(rng.normal(size=array.shape)), delta)
    x, tree = jnp.asarray(rng.normal(size=(2, 6))), lora_jax.combine(frozen, delta)
    plain = _options(jax.make_jaxpr(_with_options)(params, x).jaxpr)
    assert [name for name, _ in plain].count("scan") == 1 and len(plain) == 4
    assert _options(jax.make_jaxpr(lora_jax.adapt(_with_options))(tree, x).jaxpr) == plain
    found = jax.jit(lora_jax.adapt(_with_options))(tree, x)
    expected = jax.jit(lambda delta: _with_options(lora_jax.merge(frozen, delta), x))(delta)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), found, expected)


def test_what_is_added_has_the_name_of_its_scope():
    """By which a profile says where the time goes."""
    frozen, delta = lora_jax.lorafy({"w": jnp.ones((4, 4))}, "w", method=LoRA(rank=2))

    def fn(params, x):
        with jax.named_scope("attention"):
            return x @ params["w"]

    lowered = jax.jit(lora_jax.adapt(fn)).lower(lora_jax.combine(frozen, delta), jnp.ones((2, 4)))
    products = re.findall(r'dot\(.*op_name="([^"]*)"', lowered.as_text("hlo", debug_info=True))
    assert len(products) == 3 and all("/attention/" in name for name in products), products
