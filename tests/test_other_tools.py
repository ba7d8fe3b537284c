"""What other libraries do with a `delta`, a `frozen` and an optimiser's state: save them, load them, step."""

import pickle
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization

import lora_jax
from lora_jax import DoRA, Full, LoRA, LoRAFA, VeRA


pytestmark = pytest.mark.usefixtures("relaxed_promotion")

SHAPES = {
    "layers": [{"kernel": (8, 6)}, {"kernel": (6, 8)}],
    "stack": (3, 8, 6),
    "bias": (6,),
    "head": (6, 4),
}
# What stands in a tree beside plain arrays: whole leaves and absent ones, an array that leaves share, and
# what a method keeps in `frozen`.
TARGETS = {
    "lora": {"layers/.*": LoRA(rank=2), "stack": LoRA(rank=2, dtype=jnp.bfloat16), "bias": Full()},
    "dora": {"layers/.*": DoRA(rank=2)},
    "vera": {"layers/.*": VeRA(rank=2)},
    "lorafa": {"layers/.*": LoRAFA(rank=2), "head": Full()},
}
TX = optax.adamw(1e-2)


def numbers(seed, like):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), leaf.dtype), like)


def params():
    is_shape = lambda node: isinstance(node, tuple)
    return numbers(
        0, jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), SHAPES, is_leaf=is_shape)
    )


def lorafied(name):
    axes = {"stack": "layer in out"} if name == "lora" else None
    return lora_jax.lorafy(params(), TARGETS[name], axes=axes, key=jax.random.key(1))


def saved_trees(name):
    """The trees that somebody saves, with numbers as after training, and what is loaded into."""
    frozen, delta = lorafied(name)
    packed = lora_jax.quantize(frozen, "int8", delta=delta)
    trees = {"delta": delta, "optimiser": TX.init(delta), "frozen": frozen, "packed": packed}
    trees["combined"] = lora_jax.combine(frozen, delta)
    changed = lambda leaf: (
        numbers(leaf.size, leaf)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        else leaf + jnp.ones((), leaf.dtype)
    )
    return {
        kind: (jax.tree.map(changed, tree), jax.tree.map(jnp.zeros_like, tree))
        for kind, tree in trees.items()
    }


def flax_bytes(directory, tree, into):
    return serialization.from_bytes(into, serialization.to_bytes(tree))


def flax_state(directory, tree, into):
    return serialization.from_state_dict(into, serialization.to_state_dict(tree))


def orbax(directory, tree, into):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "orbax", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(directory / "orbax", jax.eval_shape(lambda: into))


def equinox(directory, tree, into):
    eqx.tree_serialise_leaves(directory / "tree.eqx", tree)
    return eqx.tree_deserialise_leaves(directory / "tree.eqx", into)


def pickled(directory, tree, into):
    return pickle.loads(pickle.dumps(tree))


def npz(directory, tree, into):
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), jax.tree.leaves(tree))
    np.savez(directory / "tree.npz", *wide)
    found = np.load(directory / "tree.npz")
    leaves = [
        found[name].astype(leaf.dtype) for name, leaf in zip(found.files, jax.tree.leaves(into), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(into), leaves)


TOOLS = [flax_bytes, flax_state, orbax, equinox, pickled, npz]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
@pytest.mark.parametrize("name", TARGETS)
def test_a_tool_gives_back_what_it_saved(tmp_path, name, tool):
    for kind, (tree, into) in saved_trees(name).items():
        (tmp_path / kind).mkdir()
        found = tool(tmp_path / kind, tree, into)
        assert jax.tree.structure(found) == jax.tree.structure(tree), kind
        for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
            assert one.dtype == two.dtype, kind
            np.testing.assert_array_equal(
                np.asarray(one, np.float32), np.asarray(two, np.float32), err_msg=kind
            )


def test_a_state_dict_is_plain(tmp_path):
    """Names that a reader understands, and arrays: other tools store nothing else."""
    _, delta = lorafied("lora")
    state = serialization.to_state_dict(delta)
    assert list(state["layers"]) == ["0", "1"] and set(state["layers"]["0"]["kernel"]) == {"a", "b"}
    assert state["head"] is None and state["bias"] is delta["bias"]
    assert flax.traverse_util.flatten_dict(state, sep="/")["layers/1/kernel/a"].shape == (6, 2)


@pytest.mark.parametrize(
    "state, message",
    [
        (
            {"a": np.ones((8, 3)), "b": np.ones((3, 6))},
            r"'a' of 'layers/0/kernel' has shape \(8, 3\) .*same rank",
        ),
        ({"a": np.ones((8, 2))}, r"the state of 'layers/0/kernel' has \['a'\], and Adapter has \['a', 'b'\]"),
    ],
)
def test_a_state_of_another_rank_is_refused(state, message):
    """It would be scaled by the rank of the adapter that it is loaded into."""
    adapter = lorafied("lora").delta["layers"][0]["kernel"]
    with pytest.raises(ValueError, match=message):
        serialization.from_state_dict(adapter, state)


def of_arrays():
    values = {"first": jnp.ones((4, 4)), "second": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
    return values, lambda values, x: jnp.tanh(x @ values["first"]) @ values["second"] + values["bias"]


def of_nnx():
    graph, state = nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    return nnx.as_pure(state), lambda state, x: nnx.merge(graph, state)(x)


@pytest.mark.parametrize("model", [of_arrays, of_nnx])
def test_an_optimizer_of_nnx_steps_as_optax_does(model):
    values, fn = model()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
    frozen, delta = lora_jax.lorafy(values, {"(first|second|kernel)": LoRA(rank=2), "bias": Full()})
    forward = lora_jax.adapt(fn)
    gradient = jax.grad(lambda delta: (forward(lora_jax.combine(frozen, delta), x) ** 2).mean())
    expected, state = delta, TX.init(delta)
    changing = jax.tree.map(jnp.copy, delta)
    optimizer = nnx.Optimizer(changing, TX, wrt=...)
    for _ in range(3):
        updates, state = TX.update(gradient(expected), state, expected)
        expected = optax.apply_updates(expected, updates)
        optimizer.update(changing, gradient(changing))
    assert jax.tree.structure(changing) == jax.tree.structure(delta)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, atol=1e-6), changing, expected)
    moved = jax.tree.map(lambda one, two: bool(jnp.any(one != two)), changing, delta)
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize(
    "order", ["import lora_jax, flax.nnx", "import flax.nnx, lora_jax", "import lora_jax"]
)
def test_flax_may_come_before_or_after(order):
    """Also after `lorafy`, as in the cells of a notebook."""
    code = f"""
{order}
import jax, jax.numpy as jnp
delta = lora_jax.lorafy({{"w": jnp.ones((4, 4))}}, "w", method=lora_jax.LoRA(rank=2)).delta
import flax.serialization, flax.nnx, optax
assert flax.serialization.msgpack_restore(flax.serialization.to_bytes(delta))["w"]["a"].shape == (4, 2)
flax.nnx.Optimizer(delta, optax.sgd(1.0), wrt=...).update(delta, jax.tree.map(jnp.ones_like, delta))
assert (delta["w"].arrays["b"] == -1).all()
"""
    words = [sys.executable, "-c", code]
    found = subprocess.run(
        words, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
