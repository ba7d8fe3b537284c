"""LoRA+ and LoRA-FA's corrected gradient against the rule written out in NumPy, and what all update rules
promise.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from update_trees import adalora_of, adapted, jitted, leaves, numbers

import lora_jax
from lora_jax import AdaLoRA, DeltaLoRA, DoRA, DyLoRA, LoRA, LoRAFA, PiSSA, VeRA
from lora_jax._tree.nodes import Fixed
from lora_jax.optim import adalora, lorafa, loraplus, only_trainable, ranks


# --- what all three promise ---------------------------------------------------------------------------------

# Around an optimiser, with a method that it is for and the arrays that its state has beside the optimiser's.
RULES = {
    "loraplus": (DoRA(rank=2), lambda tx, frozen, delta: loraplus(tx, 16), []),
    "lorafa": (
        LoRAFA(rank=2),
        lambda tx, frozen, delta: optax.chain(lorafa(frozen, delta), tx),
        [(2, 2), (3, 2, 2)],
    ),
    "adalora": (
        AdaLoRA(rank=4),
        lambda tx, frozen, delta: adalora_of(tx),
        [(), *2 * [(6, 4), (4, 2, 3), (4,), (3, 6, 4), (3, 4, 5), (3, 4)]],
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_state_only_for_what_trains(rule):
    method, wrap, own = RULES[rule]
    frozen, delta = adapted(method)
    tx = optax.sgd(0.1, momentum=0.9)
    state = jax.eval_shape(wrap(tx, frozen, delta).init, delta)
    shapes = lambda tree: sorted(leaf.shape for leaf in jax.tree.leaves(tree))
    assert shapes(state) == sorted(shapes(tx.init(delta)) + own)


@pytest.mark.parametrize("rule", RULES)
def test_one_combined_tree(rule):
    """Within `only_trainable`, the same steps and the same state; the frozen leaves stay, whatever their
    gradient.
    """
    method, wrap, _ = RULES[rule]
    frozen, delta = adapted(method)
    tree = lora_jax.combine(frozen, delta)
    tx = wrap(optax.sgd(0.1, momentum=0.9), frozen, delta)
    plain, masked, state, combined = (
        jitted(tx),
        jitted(only_trainable(tx)),
        tx.init(delta),
        only_trainable(tx).init(tree),
    )
    for seed in range(2, 6):
        gradient = numbers(delta, seed)
        delta, state, updates = plain(gradient, state, delta)
        tree, combined, found = masked(lora_jax.combine(numbers(frozen, 9), gradient), combined, tree)
        still, moved = lora_jax.partition(found)
        jax.tree.map(np.testing.assert_array_equal, moved, updates)
        assert not any(map(np.any, jax.tree.leaves(still)))
    for ours, theirs in zip(jax.tree.leaves(combined), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("rule", RULES)
def test_optax_finds_what_is_like_the_parameters(rule):
    """`optax.tree_map_params`, by which the state is put on a mesh: moments and averages are, counters
    and inverses are not.
    """
    method, wrap, own = RULES[rule]
    frozen, delta = adapted(method)
    tx = wrap(optax.sgd(0.1, momentum=0.9), frozen, delta)
    masked = lambda node: isinstance(node, optax.MaskedNode)
    names = lambda leaf, name: leaf if masked(leaf) else name
    state = optax.tree_map_params(
        tx, names, tx.init(delta), delta, transform_non_params=lambda _: "other", is_leaf=masked
    )
    found = jax.tree.leaves(state)
    assert found.count("other") == (len(own) if rule == "lorafa" else rule == "adalora")
    assert all(leaf == "other" or leaf.dtype == jnp.float32 for leaf in found)


@pytest.mark.parametrize("rule", RULES)
def test_compiles_once(rule):
    method, wrap, _ = RULES[rule]
    frozen, delta = adapted(method)
    tx = wrap(optax.sgd(0.1), frozen, delta)
    step, state = jitted(tx), jax.jit(tx.init)(delta)
    for _ in range(25):  # through all of AdaLoRA's phases
        delta, state, _ = step(delta, state, delta)
    assert step.traced == 1


def test_extra_arguments_reach_the_optimiser():
    _, delta = adapted(AdaLoRA(rank=4))

    def update(updates, state, params=None, *, factor):
        return jax.tree.map(lambda array: factor * array, updates), state

    tx = loraplus(adalora_of(optax.GradientTransformationExtraArgs(optax.sgd(1.0).init, update)), 2)
    updates, _ = jax.jit(tx.update)(numbers(delta, 2), tx.init(delta), delta, factor=3.0)
    np.testing.assert_allclose(
        leaves(updates)["head/bias"], 6 * leaves(numbers(delta, 2))["head/bias"], rtol=1e-6
    )


# --- LoRA+ --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, faster",
    [
        (LoRA(rank=2), "b"),
        (DoRA(rank=2), "bm"),
        (VeRA(rank=2), "bd"),
        (LoRAFA(rank=2), "b"),
        (DyLoRA(rank=2), "b"),
        (DeltaLoRA(rank=2), "b"),
        (PiSSA(rank=2), "b"),
        (AdaLoRA(rank=2), "b"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)
def test_loraplus_multiplies_the_update_of_its_group(method, faster):
    """With weight decay, and layer axes that hide which arrays are vectors."""
    _, delta = adapted(method)
    gradient, tx = numbers(delta, 2), optax.chain(optax.add_decayed_weights(0.3), optax.sgd(0.1))
    once = lambda tx: jax.jit(lambda: tx.update(gradient, tx.init(delta), delta)[0])()
    plain, found = once(tx), once(loraplus(tx, 16))
    group = {f"{path}/{name}" for path in ("layers", "heads") for name in faster} | {"plain/b", "head/bias"}
    assert group < leaves(found).keys()
    for path, update in leaves(found).items():
        np.testing.assert_array_equal(
            update, leaves(plain)[path] * (16 if path in group else 1), err_msg=path
        )


def test_an_optimiser_of_its_own_for_embeddings():
    """As the docstring has it: labels for whole adapters, of which each optimiser then sees its own only."""
    params = {"wte": jnp.ones((8, 4)), "h": jnp.ones((4, 4))}
    delta = numbers(lora_jax.lorafy(params, ".*", method=LoRA(rank=1)).delta)
    tx = optax.multi_transform(
        {"embedding": optax.sgd(0.5), "other": loraplus(optax.sgd(1.0), 16)},
        {"wte": "embedding", "h": "other"},
    )
    updates, _ = tx.update(delta, tx.init(delta), delta)
    expected = {"wte/a": -0.5, "wte/b": -0.5, "h/a": -1.0, "h/b": -16.0}
    for path, update in leaves(updates).items():
        np.testing.assert_array_equal(update, expected[path] * leaves(delta)[path])


# --- LoRA-FA ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_lorafa_is_its_equation(dtype, x64):
    """`(AᵀA + 1e-8)⁺ g / s²`, matrix by matrix in float64; bfloat16 adapters are corrected in float32."""
    method = LoRAFA(rank=2, alpha=6, dtype=None if dtype == "float64" else "bfloat16")
    frozen, delta = adapted(method, other=LoRAFA(rank=3, rs=True), dtype=dtype)
    frozen = {
        name: Fixed(leaf.weight, numbers(leaf.arrays, 5), leaf.spec) if isinstance(leaf, Fixed) else leaf
        for name, leaf in frozen.items()
    }
    tx, gradient = lorafa(frozen, delta), numbers(delta, 2)
    state = jax.jit(tx.init)(delta)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {dtype}
    updates, _ = jax.jit(tx.update)(gradient, state)
    wide = lambda array: np.asarray(array, np.float64)
    for path, matrices, scale in (("layers", 3, 3.0), ("heads", 1, 3.0), ("plain", 1, 16 / 3**0.5)):
        a, g = wide(frozen[path].arrays["a"]), wide(gradient[path].arrays["b"])
        rank = a.shape[-1]
        pairs = zip(a.reshape(matrices, -1, rank), g.reshape(matrices, rank, -1), strict=True)
        expected = [np.linalg.pinv(a.T @ a + 1e-8 * np.eye(rank)) @ g / scale**2 for a, g in pairs]
        found = updates[path].arrays["b"]
        assert found.dtype == gradient[path].arrays["b"].dtype
        rounding = {"bfloat16": 2**-8, "float32": 1e-5, "float64": 1e-12}[found.dtype.name]
        np.testing.assert_allclose(
            wide(found).reshape(matrices, rank, -1), expected, rtol=rounding, atol=rounding
        )
    jax.tree.map(np.testing.assert_array_equal, updates["head"], gradient["head"])


def test_lorafa_moves_the_product_as_the_weight_would_move(x64):
    """Why it is there: s·A·ΔB is the projection of W's own gradient on what A spans."""
    x, y = (
        jnp.asarray(np.random.default_rng(seed).normal(size=(9, size))) for seed, size in ((0, 6), (1, 4))
    )
    loss = lambda params: jnp.mean((jnp.tanh(x @ params["w"]) - y) ** 2)
    frozen, delta = lora_jax.lorafy(
        numbers({"w": jax.ShapeDtypeStruct((6, 4), "float64")}), "w", method=LoRAFA(rank=2, alpha=6)
    )
    delta = numbers(delta, 3)
    dense = np.asarray(jax.grad(loss)(lora_jax.merge(frozen, delta))["w"])
    gradient = jax.grad(lambda delta: lora_jax.adapt(loss)(lora_jax.combine(frozen, delta)))(delta)
    tx = lorafa(frozen, delta)
    a, b = np.asarray(frozen["w"].arrays["a"]), tx.update(gradient, tx.init(delta))[0]["w"].arrays["b"]
    basis, _ = np.linalg.qr(a)
    np.testing.assert_allclose(3 * a @ b, basis @ (basis.T @ dense), rtol=1e-6)  # the ridge's size


# --- errors -------------------------------------------------------------------------------------------------

_, LORA = lora_jax.lorafy({"w": jax.ShapeDtypeStruct((8, 8), "float32")}, "w", method=LoRA(rank=2))
_, ADALORA = lora_jax.lorafy({"w": jax.ShapeDtypeStruct((8, 8), "float32")}, "w", method=AdaLoRA(rank=4))
SGD = optax.sgd(0.1)


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (lambda: loraplus(SGD, "16"), TypeError, r"`ratio` is '16'; pass a number"),
        (lambda: loraplus(SGD, True), TypeError, r"`ratio` is True; pass a number"),
        (lambda: loraplus(SGD, 0), ValueError, r"`ratio` is 0; it must be positive and finite"),
        (lambda: loraplus(SGD, float("inf")), ValueError, r"`ratio` is inf; it must be positive and finite"),
        (
            lambda: lorafa({"w": jnp.ones((8, 8))}, LORA),
            ValueError,
            r"`delta` holds no LoRA-FA adapter; pass the two trees of `lorafy\(",
        ),
        (
            lambda: adalora(SGD, total_steps=1.5, target_rank=2),
            TypeError,
            r"`total_steps` is 1.5; pass an integer",
        ),
        (
            lambda: adalora(SGD, total_steps=9, target_rank=True),
            TypeError,
            r"`target_rank` is True; pass an integer",
        ),
        (
            lambda: adalora(SGD, total_steps=9, target_rank=0),
            ValueError,
            r"`target_rank` is 0; it must be at least 1",
        ),
        (
            lambda: adalora_of(SGD, initial_steps=-1),
            ValueError,
            r"`initial_steps` is -1; it must be at least 0",
        ),
        (lambda: adalora_of(SGD, every=0), ValueError, r"`every` is 0; it must be at least 1"),
        (lambda: adalora_of(SGD, beta1=1.0), ValueError, r"`beta1` is 1.0; it must be between 0 and 1"),
        (lambda: adalora_of(SGD, beta2=0), ValueError, r"`beta2` is 0; it must be between 0 and 1"),
        (
            lambda: adalora_of(SGD, initial_steps=12, final_steps=8),
            ValueError,
            r"`initial_steps` \(12\) and `final_steps` \(8\) leave none of the `total_steps` \(20\)",
        ),
        (
            lambda: adalora_of(SGD).init(LORA),
            ValueError,
            r"`params` holds no AdaLoRA adapter; pass the delta of `lorafy\(",
        ),
        (
            lambda: adalora_of(SGD, target_rank=5).init(ADALORA),
            ValueError,
            r"`target_rank` is 5, above the average rank at the start, 4:",
        ),
        (lambda: adalora_of(SGD).update(ADALORA, None), ValueError, r"`params` is None; importance is"),
        (lambda: ranks(LORA), ValueError, r"`delta` holds no AdaLoRA adapter"),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_errors_of_lorafa():
    w = {"w": jnp.ones((8, 8)), "v": jnp.ones((8, 8))}
    frozen, delta = lora_jax.lorafy(w, ".*", method=LoRAFA(rank=2))
    other_frozen, other = lora_jax.lorafy(w, "w", method=LoRAFA(rank=2))
    tx = lorafa(other_frozen, other)
    with pytest.raises(
        ValueError,
        match="`updates` holds a LoRA-FA adapter at 'v', where the `delta` that `lorafa` was given has none",
    ):
        tx.update(delta, tx.init(delta))
    with pytest.raises(ValueError, match="the LoRA-FA adapter of 'w' has the `alpha` 0"):
        lorafa(*lora_jax.lorafy(w, "w", method=LoRAFA(rank=2, alpha=0)))
    with pytest.raises(ValueError, match="`frozen` and `delta` do not"):
        lorafa({"w": frozen["w"]}, delta)
