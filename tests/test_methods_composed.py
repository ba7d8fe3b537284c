"""Every method with what it is composed with: transformations, loops, a mesh, shapes without arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P
from method_columns import close, distinct, equation, FORWARD, loss, rows, weight_of
from method_rows import (
    adapters_of,
    AXES,
    BY_NAME,
    case,
    layer,
    literal,
    model,
    OUT,
    parameters,
    precision,
    quickly,
    TOKENS,
    WIDTH,
)

import lora_jax
from lora_jax._paths import named_leaves
from lora_jax._tree.nodes import Adapter, Fixed, is_node, Shared
from lora_jax.sharding import delta_specs, frozen_specs, partition_specs, shardings


def _step_by_step(function):
    """A loop over the rows of tokens, as a program of its own, of which nothing is kept for the gradient."""

    def looped(w, tokens, shift):
        step = jax.checkpoint(lambda total, row: (total, function(w, row, shift)))
        return lax.scan(step, 0, tokens)[1]

    return jax.jit(looped)


def _gradients(function):
    """One for each row of tokens."""
    value = lambda shift, w, row: jnp.sum(function(w, row, shift) ** 2)
    return lambda w, tokens, shift: jax.vmap(jax.grad(value), (None, None, 0))(shift, w, tokens)


# All five in two programs, because compiling is what takes the time; `test_transform.py` has each alone.
TRANSFORMATIONS = {"jit, scan, checkpoint": _step_by_step, "vmap, grad": _gradients}


@functools.lru_cache(maxsize=None)
def of_plain_weights():
    """The results of all forms on W', and the gradient of their sum: one program for all rows."""

    @quickly
    def both(params, tokens, shift, weights):
        results = lambda params: (model(params, tokens, shift), _gradients(model)(params, tokens, shift))
        found, backward = jax.vjp(results, params)
        return found, backward(weights)[0]

    return both


@distinct
def test_composes_with_transformations(name, x64):
    """Each transformation, inside of the adapted function and around it: values, and the gradient of
    their sum.
    """
    here, (by_equation, pulled_back) = case(name, "float64"), equation(name)
    rng = np.random.default_rng(6)
    tokens, shift = jnp.asarray(TOKENS), jnp.asarray(rng.normal(size=WIDTH))
    shapes = ((*TOKENS.shape, OUT), (len(TOKENS), WIDTH))
    # Other weights inside than around, so that neither can stand in for the other.
    inside, around = (tuple(jnp.asarray(rng.normal(size=shape)) for shape in shapes) for _ in range(2))

    @quickly
    def of_adapted(frozen, delta, tokens, shift, inside, around):
        def results(delta):
            tree = lora_jax.combine(frozen, delta)
            kinds = TRANSFORMATIONS.values()
            return [
                tuple(form(tree, tokens, shift) for form in forms)
                for forms in (
                    [lora_jax.adapt(kind(model)) for kind in kinds],
                    [kind(FORWARD) for kind in kinds],
                )
            ]

        found, backward = jax.vjp(results, delta)
        return found, backward([inside, around])[0]

    found, gradient = of_adapted(here.frozen, here.delta, tokens, shift, inside, around)
    total = jax.tree.map(lambda one, two: np.asarray(one) + np.asarray(two), inside, around)
    plain, cotangent = of_plain_weights()(by_equation(here.frozen, here.delta), tokens, shift, total)
    for results in found:
        close(results, plain, 1e-12)
    close(gradient, pulled_back(here.frozen, here.delta, cotangent), 1e-11)


@rows
def test_loops_over_the_layers_of_a_combined_tree(name, x64):
    """A user's own scan, or vmap, over the stacked leaves, around an adapted layer."""
    row, here = BY_NAME[name], case(name, "float64")
    tree = lora_jax.combine(here.frozen, here.delta)
    step = lora_jax.adapt(layer)
    x = jnp.asarray(np.random.default_rng(8).normal(size=(5, WIDTH)))

    @quickly
    def both(tree, plain, x):
        results = []
        for weights, function in ((tree["layers"], step), (plain["layers"], layer)):
            looped = lax.scan(lambda x, weights, function=function: (function(weights, x), None), x, weights)[
                0
            ]
            mapped = jax.vmap(function, (0, None))(weights, x)
            results.append((looped, mapped))
        return results

    fixed = [node for node in jax.tree.leaves(here.frozen, is_leaf=is_node) if isinstance(node, Fixed)]
    if any(isinstance(array, Shared) for node in fixed for array in node.arrays.values()):
        with pytest.raises(
            ValueError, match="shares shared_a with that of 'heads', which is missing: pass the whole tree"
        ):
            both(tree, here.params, x)
        return
    close(*both(tree, literal(row, here.frozen, here.delta), x), 1e-12)


MESH_RULES = (
    ("table", P(None, ("fsdp", "tensor"))),
    ("qkv|up|down|out", P("fsdp", "tensor")),
    ("heads", P("fsdp", None, "tensor")),
)


@distinct
def test_sharded(name):
    """A step of training on eight devices, weights and adapters split alike, is the step on one."""
    row, here = BY_NAME[name], case(name)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    specs = partition_specs(here.params, MESH_RULES)
    frozen = jax.device_put(here.frozen, shardings(mesh, frozen_specs(here.frozen, specs), here.frozen))
    delta = jax.device_put(here.delta, shardings(mesh, delta_specs(here.delta, specs), here.delta))
    batch = jax.device_put(TOKENS, jax.NamedSharding(mesh, P(("data", "fsdp"))))
    for (path, node), kept in zip(
        named_leaves(delta, is_leaf=is_node), jax.tree.leaves(frozen, is_leaf=is_node), strict=True
    ):
        if isinstance(node, Adapter):
            weight, spec, kinds = weight_of(kept), node.spec, row.of(path).trains | row.of(path).fixed
            part = weight.sharding.shard_shape(weight.shape)
            assert part != weight.shape
            layers, ins, outs = (
                [part[axis] for axis in spec.axis_indices(word)] for word in ("layer", "in", "out")
            )
            for label, array in (node.arrays | (kept.arrays if isinstance(kept, Fixed) else {})).items():
                if not isinstance(array, Shared):
                    shapes = {
                        "a": (*layers, *ins, array.shape[-1]),
                        "b": (*layers, array.shape[len(layers)], *outs),
                        "out": (*layers, *outs),
                    }
                    shapes["a of blocks"] = (array.shape[0], *shapes["a"])
                    assert array.sharding.shard_shape(array.shape) == shapes.get(kinds[label], array.shape), (
                        path,
                        label,
                    )

    tx = optax.sgd(1.0)

    @quickly
    def step(frozen, delta, tokens):
        value, gradient = jax.value_and_grad(
            lambda delta: loss(frozen, delta, tokens, jnp.ones((), "float32"))
        )(delta)
        return value, optax.apply_updates(delta, tx.update(gradient, tx.init(delta), delta)[0])

    value, after = step(frozen, delta, batch)
    # Of one device, by the equation, in float64.
    exact, (by_equation, pulled_back) = case(name, "float64"), equation(name)
    with precision("float64"):
        expected, cotangent = loss_of_plain_weights()(by_equation(exact.frozen, exact.delta))
        gradient = pulled_back(exact.frozen, exact.delta, cotangent)
    moved = jax.tree.map(lambda one, two: np.asarray(one, np.float64) - np.asarray(two), here.delta, after)
    close((value, moved), (expected, gradient), 1e-4)


@functools.lru_cache(maxsize=None)
def loss_of_plain_weights():
    return quickly(jax.value_and_grad(lambda params: jnp.mean(jnp.square(model(params, TOKENS) - 1))))


@rows
def test_from_shapes(name):
    row, here = BY_NAME[name], case(name)
    shapes = jax.eval_shape(lambda: parameters("float32"))
    frozen, delta = adapters_of(row, shapes)
    frozen = row.begin(frozen, delta)
    for found, real in ((frozen, here.frozen), (delta, here.start)):
        assert jax.tree.structure(found) == jax.tree.structure(real)
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(found))
        assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(found)] == [
            (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(real)
        ]
    explanation = lora_jax.explain(model, lora_jax.combine(frozen, delta), TOKENS)
    assert not explanation.formed and not explanation.unused and not explanation.contradictory
    assert {use.path for use in explanation.uses} == (set() if name == "Full" else set(AXES))
    merged = lora_jax.merge(frozen, delta)
    assert merged == shapes


@rows
def test_partition_and_summary(name, capsys):
    row, here = BY_NAME[name], case(name)
    for key in (None, jax.random.key(1)):
        back = lora_jax.partition(lora_jax.combine(here.frozen, here.delta, key=key))
        for found, given in zip(back, (here.frozen, here.delta), strict=True):
            assert jax.tree.structure(found) == jax.tree.structure(given)
            assert all(
                one is two for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(given), strict=True)
            )
    print(lora_jax.summary(here.params, here.delta))
    *lines, total = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + (len(jax.tree.leaves(here.params)) if name == "Full" else len(AXES))
    assert all(f"{type(row.method).__name__}(" in line for line in lines[2:])
    trains, of = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (here.delta, here.params))
    assert total.startswith(f"trainable {trains:,} of {of:,} parameters")
