"""Training as users write it with optax: `tx.init(delta)`, or masks on one combined tree.

The tests that run Adam ask for JAX's default promotion: its bias correction raises a float to an integer
step.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax import Full, LoRA
from lora_jax.optim import labels, only_trainable, trainable_mask


XOR_X = jnp.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
XOR_Y = jnp.array([[0.0], [1.0], [1.0], [0.0]])
TARGETS = {"kernel": LoRA(rank=2, alpha=4), "out/bias": Full()}


def network():
    rng = np.random.default_rng(0)
    normal = lambda *sizes: jnp.asarray(rng.normal(size=sizes), "float32")
    return {
        "hidden": {"kernel": normal(2, 16), "bias": normal(16)},
        "out": {"kernel": normal(16, 2), "bias": jnp.zeros(1)},
    }


def model(params, x):
    h = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    return (h @ params["out"]["kernel"]).sum(axis=1, keepdims=True) + params["out"]["bias"][None]


FORWARD = lora_jax.adapt(model)


def loss(tree):
    return jnp.mean((FORWARD(tree, XOR_X) - XOR_Y) ** 2)


def size(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def trained(tree):
    """The arrays of a combined tree that train, in the order of those of the delta."""
    mask = jax.tree.leaves(trainable_mask(tree))
    return [leaf for leaf, trains in zip(jax.tree.leaves(tree), mask, strict=True) if trains]


def frozen_of(tree):
    mask = jax.tree.leaves(trainable_mask(tree))
    return [leaf for leaf, trains in zip(jax.tree.leaves(tree), mask, strict=True) if not trains]


@pytest.mark.parametrize("tx", [optax.adam(1e-3), optax.adamw(1e-3, weight_decay=0.1)], ids=["adam", "adamw"])
@pytest.mark.parametrize("targets", ["kernel", TARGETS])
def test_state_is_twice_the_adapters_and_a_counter(tx, targets):
    frozen, delta = lora_jax.lorafy(network(), targets, method=LoRA(rank=2))
    assert size(tx.init(delta)) == 2 * size(delta) + 4
    assert size(only_trainable(tx).init(lora_jax.combine(frozen, delta))) == 2 * size(delta) + 4
    expected = 2 * (2 + 16) * 2 + (0 if targets == "kernel" else 1)
    assert lora_jax.count(delta) == expected == size(delta) / 4


def test_training_the_delta(relaxed_promotion):
    """A whole training loop: only what should moves, and the network learns XOR."""
    params = network()
    frozen, delta = lora_jax.lorafy(params, TARGETS)
    before = jax.tree.map(np.array, frozen)
    tx = optax.adamw(0.05, weight_decay=1e-4)

    @jax.jit
    def step(delta, state, frozen):
        value, gradient = jax.value_and_grad(lambda delta: loss(lora_jax.combine(frozen, delta)))(delta)
        updates, state = tx.update(gradient, state, delta)
        return optax.apply_updates(delta, updates), state, value, gradient

    state, gradients = tx.init(delta), []
    for _ in range(150):
        delta, state, value, gradient = step(delta, state, frozen)
        gradients.append(gradient)
    assert value < 1e-4
    # B starts at zero: it gets a gradient at the first step, and A, whose gradient passes through B, at the
    # second.
    for layer in ("hidden", "out"):
        first, second = (gradient[layer]["kernel"].arrays for gradient in gradients[:2])
        assert np.any(first["b"]) and not np.any(first["a"]) and np.any(second["a"])
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    assert frozen["hidden"]["kernel"] is params["hidden"]["kernel"]
    np.testing.assert_allclose(model(lora_jax.merge(frozen, delta), XOR_X), XOR_Y, atol=0.03)


def run(tx, tree, steps):
    @jax.jit
    def step(tree, state):
        gradient = jax.grad(loss)(tree)
        updates, state = tx.update(gradient, state, tree)
        return optax.apply_updates(tree, updates), state

    state = tx.init(tree)
    for _ in range(steps):
        tree, state = step(tree, state)
    return tree


def test_training_one_combined_tree(relaxed_promotion):
    """The mask form, with a weight decay that would move whatever it sees: the same adapters, the same
    base.
    """
    frozen, delta = lora_jax.lorafy(network(), TARGETS)
    tree, tx = lora_jax.combine(frozen, delta), optax.adamw(0.05, weight_decay=0.5)
    after = run(only_trainable(tx), tree, 10)
    assert jax.tree.structure(after) == jax.tree.structure(tree)
    for a, b in zip(frozen_of(after), frozen_of(tree), strict=True):
        np.testing.assert_array_equal(a, b)

    @jax.jit
    def step(delta, state):
        gradient = jax.grad(lambda delta: loss(lora_jax.combine(frozen, delta)))(delta)
        updates, state = tx.update(gradient, state, delta)
        return optax.apply_updates(delta, updates), state

    state = tx.init(delta)
    for _ in range(10):
        delta, state = step(delta, state)
    assert len(trained(after)) == 5
    for a, b, start in zip(trained(after), jax.tree.leaves(delta), trained(tree), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        assert np.abs(a - start).max() > 1e-2


def test_dropout_in_the_mask_form(relaxed_promotion):
    """A key for every step, given to the loss: the gradient is that of the delta alone under the same key."""
    frozen, delta = lora_jax.lorafy(network(), {"kernel": LoRA(rank=2, dropout=0.5), "out/bias": Full()})
    delta = jax.tree.map(lambda array: array + 0.1, delta)
    tree, key = lora_jax.combine(frozen, delta), jax.random.key(3)
    ours = jax.grad(lambda tree: loss(lora_jax.combine(*lora_jax.partition(tree), key=key)))(tree)
    expected = jax.grad(lambda delta: loss(lora_jax.combine(frozen, delta, key=key)))(delta)
    jax.tree.map(np.testing.assert_array_equal, lora_jax.partition(ours).delta, expected)
    other = jax.grad(lambda delta: loss(lora_jax.combine(frozen, delta)))(delta)
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(expected), strict=True))


@pytest.mark.parametrize(
    "wrap",
    [lambda tx: tx, lambda tx: optax.masked(tx, trainable_mask)],
    ids=["bare", "masked"],
)
def test_what_moves_the_base(wrap, relaxed_promotion):
    """Why `only_trainable` is there: the decay moves it, and `optax.masked` alone passes its gradient
    through.
    """
    tree = lora_jax.combine(*lora_jax.lorafy(network(), TARGETS))
    after = run(wrap(optax.adamw(0.05, weight_decay=0.5)), tree, 1)
    assert all(np.any(a != b) for a, b in zip(frozen_of(after), frozen_of(tree), strict=True))


def test_labels_and_mask():
    frozen, delta = lora_jax.lorafy(
        {**network(), "absent": None}, {"hidden/kernel": LoRA(rank=2, dropout=0.1), "out/bias": Full()}
    )
    tree = lora_jax.combine(frozen, delta, key=jax.random.key(0))
    named = {
        jax.tree_util.keystr(path): label
        for path, label in jax.tree_util.tree_flatten_with_path(labels(tree))[0]
    }
    assert named == {
        "['hidden']['bias']": "frozen",
        "['hidden']['kernel'].frozen": "frozen",
        "['hidden']['kernel'].adapter['a']": "trainable",
        "['hidden']['kernel'].adapter['b']": "trainable",
        "['hidden']['kernel'].key": "frozen",
        "['out']['bias'].value": "trainable",
        "['out']['kernel']": "frozen",
    }
    assert (
        jax.tree.structure(labels(tree))
        == jax.tree.structure(trainable_mask(tree))
        == jax.tree.structure(tree)
    )
    assert jax.tree.map(lambda label: label == "trainable", labels(tree)) == trainable_mask(tree)


def test_state_only_where_something_trains():
    tree = lora_jax.combine(*lora_jax.lorafy(network(), "hidden/kernel", method=LoRA(rank=2)))
    paths = [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_flatten_with_path(only_trainable(optax.adam(1.0)).init(tree))[0]
    ]
    assert len(paths) == 5 and sum(path.endswith("count") for path in paths) == 1
    assert (
        sorted(path[-len(".adapter['a']") :] for path in paths if "adapter" in path)
        == [".adapter['a']"] * 2 + [".adapter['b']"] * 2
    )


def test_masks_are_for_combined_trees():
    delta = lora_jax.lorafy(network(), "kernel", method=LoRA(rank=2)).delta
    for function in (labels, trainable_mask, only_trainable(optax.adam(1.0)).init):
        with pytest.raises(TypeError, match="`tree` is a delta; pass the combined tree"):
            function(delta)
