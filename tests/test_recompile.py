"""What must not happen: a second compilation across steps, keys and adapters, and a cast that nobody
asked for.
"""

import dataclasses

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax import Full, LoRA


PARAMS = {"w": jnp.ones((8, 8)), "head": jnp.ones((8, 8)), "b": jnp.ones(8)}
TX = optax.sgd(1e-3, momentum=0.9)


def trained(**method):
    return lora_jax.lorafy(
        PARAMS, {"w": LoRA(**{"rank": 2, "dropout": 0.1, **method}), "b": Full()}, key=jax.random.key(1)
    )


@pytest.fixture
def step():
    """A jitted training step that counts how often it is traced."""
    forward = lora_jax.adapt(lambda params, x: jnp.tanh(x @ params["w"]) @ params["head"] + params["b"][None])

    @jax.jit
    def step(delta, state, frozen, x, key):
        step.traced += 1
        gradient = jax.grad(lambda delta: jnp.sum(forward(lora_jax.combine(frozen, delta, key=key), x)))(
            delta
        )
        updates, state = TX.update(gradient, state)
        return optax.apply_updates(delta, updates), state

    step.traced = 0
    return step


def test_one_compilation(step):
    x = jnp.ones((2, 8))
    for start in range(2):  # two adapters, drawn and stored apart
        frozen, delta = trained()
        delta = jax.tree.map(lambda array: array + start, delta)
        state = TX.init(delta)
        for seed in range(3):
            delta, state = step(delta, state, frozen, x, jax.random.key(seed))
    # Another base of the same shapes, and adapters that came from a stack or through the host.
    frozen = jax.tree.map(lambda array: 2 * array, frozen)
    delta = jax.tree.map(lambda array: jnp.asarray(np.asarray(array)), delta)
    step(delta, TX.init(delta), frozen, x, jax.random.key(9))
    # `[...]` and `...` name the same: what is equal compiles once.
    frozen, delta = lora_jax.lorafy(
        PARAMS, {lambda path, leaf: path == "w": LoRA(rank=2, dropout=0.1, alpha=16.0), "^b$": Full()}
    )
    step(delta, TX.init(delta), frozen, x, jax.random.key(9))
    assert step.traced == 1
    # The scale is static: another one is another program. (And so the counter counts.)
    frozen, delta = trained(alpha=3)
    step(delta, TX.init(delta), frozen, x, jax.random.key(9))
    assert step.traced == 2


@pytest.mark.parametrize(
    "one, other",
    [
        (LoRA(rank=4), LoRA(rank=4, alpha=16.0)),
        (LoRA(blocks=[True, False]), LoRA(blocks=(1, 0))),
        (LoRA(dtype="bfloat16"), LoRA(dtype=jnp.bfloat16)),
        (Full(), Full()),
    ],
)
def test_static_metadata_is_hashable(one, other):
    assert one == other and hash(one) == hash(other)
    assert LoRA(rank=2) != LoRA(rank=3)
    shape = {"w": jax.ShapeDtypeStruct((8, 8), "float32")}
    deltas = [
        lora_jax.lorafy(
            shape, {"w": method if isinstance(method, Full) else dataclasses.replace(method, rank=1)}
        ).delta
        for method in (one, other)
    ]
    structures = [jax.tree.structure(delta) for delta in deltas]
    assert structures[0] == structures[1] and hash(structures[0]) == hash(structures[1])


def test_scale_and_rank_are_no_leaves():
    _, delta = trained()
    assert [leaf.shape for leaf in jax.tree.leaves(delta)] == [(8,), (8, 2), (2, 8)]


def equations(jaxpr):
    """Every equation that computes something, at any depth."""
    for eqn in jaxpr.eqns:
        inner = [
            value
            for entry in eqn.params.values()
            for value in (entry if isinstance(entry, tuple | list) else [entry])
        ]
        inner = [
            getattr(value, "jaxpr", value)
            for value in inner
            if isinstance(value, jex.Jaxpr | jex.ClosedJaxpr)
        ]
        for sub in inner:
            yield from equations(sub)
        if not inner:
            yield eqn


@pytest.mark.parametrize(
    "base, factors, expected",
    [
        ("bfloat16", None, "float32"),
        ("float16", None, "float32"),
        ("float32", "bfloat16", "bfloat16"),
        ("float32", None, "float32"),
        ("float64", None, "float64"),
        ("float64", "float32", "float32"),
    ],
)
@pytest.mark.parametrize("axes", ["in out", "out in"])
def test_dtypes(base, factors, expected, axes, x64):
    """Activations and products in the dtype of the model, gradients in that of A and B, nothing of the
    weight's size cast.
    """
    params = {"w": jnp.ones((7, 5), base), "table": jnp.ones((7, 5), base)}
    x = jnp.ones((2, 7 if axes == "in out" else 5), base)
    frozen, delta = lora_jax.lorafy(
        params, ".*", method=LoRA(rank=2, dtype=factors, dropout=0.1), axes={"w": axes, "table": "in out"}
    )
    forward = lora_jax.adapt(
        lambda params, x: (
            x @ (params["w"] if axes == "in out" else params["w"].T),
            params["table"][jnp.array([0, 3])],
        )
    )

    def loss(delta, x):
        outputs = forward(lora_jax.combine(frozen, delta, key=jax.random.key(0)), x)
        assert [output.dtype.name for output in outputs] == [base] * 2
        return sum(jnp.sum(output.astype("float64")) for output in outputs)

    differentiate = jax.grad(loss, (0, 1))
    by_delta, by_x = jax.eval_shape(differentiate, delta, x)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(by_delta)} == {expected} and by_x.dtype == base
    found = list(equations(jax.make_jaxpr(differentiate)(delta, x).jaxpr))
    assert not [eqn for eqn in found for var in eqn.outvars if var.aval.size == 35 and var.aval.dtype != base]
    operands = {
        atom.aval.dtype.name for eqn in found if eqn.primitive.name == "dot_general" for atom in eqn.invars
    }
    assert operands == {base}
