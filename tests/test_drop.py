"""LoRA-drop: the score against NumPy, the choice against the paper's rule, and what layers that share an
adapter compute.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import lora_jax
from lora_jax import DoRA, Full, LoRA
from lora_jax.drop import importance, share


LAYERS, WIDTH, RANK = 5, 6, 2
SCORES = np.array([5.0, 0.1, 3.0, 0.2, 0.3])  # 0 and 2 have 93 %


def numbers(*sizes, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=sizes) * 0.5)


def randomised(delta, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda array: jnp.asarray(rng.normal(size=array.shape)), delta)


def listed(params, x):
    for index in range(LAYERS):
        x = jnp.tanh(x @ params["h"][str(index)]["kernel"])
    return x


def scanned(params, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])[0]


def of_layers(method=LoRA(rank=RANK, alpha=3)):
    params = {"h": {str(index): {"kernel": numbers(WIDTH, WIDTH, seed=index)} for index in range(LAYERS)}}
    return (params, *lora_jax.lorafy(params, "kernel", method=method))


def of_stack(method=LoRA(rank=RANK, alpha=3)):
    params = {"stack": numbers(LAYERS, WIDTH, WIDTH)}
    return (params, *lora_jax.lorafy(params, "stack", method=method, axes="layer in out"))


def paths(values):
    return {f"h/{index}/kernel": value for index, value in enumerate(values)}


# --- the score ----------------------------------------------------------------------------------------------


def literal(weights, adapters, x):
    """`Σ ‖s·x·A·B‖²` layer by layer."""
    found = []
    for w, (a, b) in zip(weights, adapters, strict=True):
        added = 1.5 * x @ a @ b
        found.append(np.sum(added**2))
        x = np.tanh(x @ w + added)
    return np.array(found)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_importance_is_the_sum_of_squares(checkpoint, x64):
    batches = [(numbers(4, WIDTH, seed=seed),) for seed in (10, 11)]
    params, frozen, delta = of_layers()
    delta = randomised(delta)
    found = importance(jax.checkpoint(listed) if checkpoint else listed, frozen, delta, batches)
    arrays = [delta["h"][str(index)]["kernel"].arrays for index in range(LAYERS)]
    weights = [np.asarray(params["h"][str(index)]["kernel"]) for index in range(LAYERS)]
    expected = sum(
        literal(weights, [(np.asarray(one["a"]), np.asarray(one["b"])) for one in arrays], np.asarray(x))
        for (x,) in batches
    )
    assert list(found) == list(paths(expected))
    np.testing.assert_allclose(list(found.values()), expected, rtol=1e-12)

    params, frozen, delta = of_stack()
    delta = randomised(delta)
    fn = (lambda params, x: jax.checkpoint(scanned)(params, x)) if checkpoint else scanned
    found = importance(fn, frozen, delta, batches)["stack"]
    arrays = delta["stack"].arrays
    adapters = list(zip(np.asarray(arrays["a"]), np.asarray(arrays["b"]), strict=True))
    np.testing.assert_allclose(
        found,
        sum(literal(np.asarray(params["stack"]), adapters, np.asarray(x)) for (x,) in batches),
        rtol=1e-12,
    )


def test_importance_of_every_use(x64):
    """A lookup, a fused weight adapted in blocks, a convolution, a weight used twice and per example, an
    indexed stack.
    """
    params = {
        "table": numbers(7, 6),
        "fused": numbers(6, 9),
        "conv": numbers(2, 3, 4),
        "twice": numbers(4, 4),
        "stack": numbers(2, 4, 4),
    }
    axes = {"conv": "in in out", "stack": "layer in out"}
    targets = {"fused": LoRA(rank=1, alpha=2, blocks=(True, False, True)), ".*": LoRA(rank=1, alpha=2)}
    frozen, delta = lora_jax.lorafy(params, targets, axes=axes)
    delta = randomised(delta)
    ids = jnp.array([[1, 2, 2, 0], [6, 5, 1, 3]])

    def fn(params, ids):
        x = params["table"][ids]
        q, k, v = jnp.split(x @ params["fused"], 3, axis=-1)
        x = lax.conv_general_dilated(
            q * v + k, params["conv"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        )
        x = jax.vmap(lambda x: jnp.tanh(x @ params["twice"]))(x) @ params["twice"]
        return {"logits": x @ params["stack"][1], "count": jnp.array(3)}

    found = importance(fn, frozen, delta, [(ids,)])
    # The literal: what each use of a weight gives more with its adapter than without, everything before it
    # adapted.
    plain, merged = jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, lora_jax.merge(frozen, delta))
    square = lambda added: np.sum(added**2)
    expected = {"table": square((merged["table"] - plain["table"])[ids])}
    x = merged["table"][ids]
    expected["fused"] = square(x @ (merged["fused"] - plain["fused"]))
    q, k, v = np.split(x @ merged["fused"], 3, axis=-1)
    padded = np.pad(q * v + k, ((0, 0), (0, 1), (0, 0)))
    convolved = lambda w: np.einsum("nthi,hio->nto", np.stack([padded[:, :-1], padded[:, 1:]], axis=2), w)
    expected["conv"] = square(convolved(merged["conv"] - plain["conv"]))
    x, update = convolved(merged["conv"]), merged["twice"] - plain["twice"]
    h = np.tanh(x @ merged["twice"])
    expected["twice"] = square(x @ update) + square(h @ update)
    expected["stack"] = np.array([0.0, square(h @ merged["twice"] @ (merged["stack"] - plain["stack"])[1])])
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-10, err_msg=name)


# --- the choice ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "threshold, kept", [(0.5, 1), (0.58, 1), (0.9, 2), (0.93, 2), (0.95, 3), (0.97, 5), (1.0, 5)]
)
def test_the_smallest_set_that_reaches_the_threshold_stays(threshold, kept):
    """One adapter for the rest; a rest of one layer has nothing to share with."""
    _, _, delta = of_layers()
    smaller = share(delta, paths(SCORES), threshold=threshold)
    matrices = kept + (kept < LAYERS)
    assert lora_jax.count(smaller) == matrices * RANK * 2 * WIDTH
    _, _, stacked = of_stack()
    assert (
        lora_jax.count(share(stacked, {"stack": SCORES}, threshold=threshold)) == matrices * RANK * 2 * WIDTH
    )


def test_each_kind_shares_its_own():
    params = {
        str(layer): {name: jnp.ones((4, 4)) for name in ("query", "value")} | {"wide": jnp.ones((4, 8))}
        for layer in range(4)
    }
    frozen, delta = lora_jax.lorafy(params, "query|value|wide", method=LoRA(rank=1))
    scores = {
        f"{layer}/{name}": 1.0 if layer == 0 else 0.01
        for layer in range(4)
        for name in ("query", "value", "wide")
    }
    smaller = share(delta, scores)
    assert lora_jax.count(smaller) == 2 * (8 + 8 + 12)
    owners = [layer for layer in range(4) if "a" in smaller[str(layer)]["wide"].array_axes()]
    assert owners == [0, 1]
    # A key draws the shared start, and one is not like another.
    other = share(delta, scores, key=jax.random.key(7))
    first, second = (tree["1"]["query"].arrays["a"] for tree in (smaller, other))
    assert not np.allclose(first, second) and not np.allclose(first, smaller["1"]["value"].arrays["a"])
    np.testing.assert_array_equal(smaller["0"]["query"].arrays["a"], delta["0"]["query"].arrays["a"])
    assert not np.any(smaller["1"]["query"].arrays["b"])


# --- what shared adapters compute ---------------------------------------------------------------------------


def shared_pair():
    """The same adapters, on layers and on their stack, some of them shared."""
    params, frozen, delta = of_layers()
    smaller = randomised(share(delta, paths(SCORES)))
    arrays = [
        smaller["h"][str(index)]["kernel"].arrays for index in (0, 2, 1)
    ]  # slots: kept ones in order, then the shared one
    _, _, stacked = of_stack()
    stacked = share(stacked, {"stack": SCORES})
    adapter = stacked["stack"]
    adapter = dataclasses.replace(
        adapter, arrays={name: jnp.stack([one[name] for one in arrays]) for name in "ab"}
    )
    stack = jnp.stack([params["h"][str(index)]["kernel"] for index in range(LAYERS)])
    return (frozen, smaller), ({"stack": stack}, {"stack": adapter})


def test_shared_adapters_act_in_each_layer_and_learn_from_all(x64):
    (frozen, delta), (stack, stacked) = shared_pair()
    x = numbers(3, WIDTH, seed=20)
    own = {index: delta["h"][str(index)]["kernel"].arrays for index in (0, 1, 2)}
    product = lambda index: 1.5 * own[index]["a"] @ own[index]["b"]
    expected = {
        str(i): {"kernel": frozen["h"][str(i)]["kernel"] + product(i if i in (0, 2) else 1)}
        for i in range(LAYERS)
    }
    merged = lora_jax.merge(frozen, delta)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), merged, {"h": expected})
    np.testing.assert_allclose(
        lora_jax.merge(stack, stacked)["stack"][3], expected["3"]["kernel"], rtol=1e-12
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), lora_jax.unmerge(merged, delta), frozen
    )

    def gradient(fn, frozen, delta, join):
        return jax.jit(jax.grad(lambda delta: jnp.sum(jnp.sin(fn(join(frozen, delta), x)))))(delta)

    adapted = gradient(lora_jax.adapt(listed), frozen, delta, lora_jax.combine)
    literal = gradient(listed, frozen, delta, lora_jax.merge)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), adapted, literal)
    scan = gradient(lora_jax.adapt(scanned), stack, stacked, lora_jax.combine)["stack"].arrays
    for slot, index in enumerate((0, 2, 1)):
        for name in "ab":
            np.testing.assert_allclose(
                scan[name][slot], adapted["h"][str(index)]["kernel"].arrays[name], rtol=1e-9, atol=1e-11
            )
    assert not lora_jax.explain(listed, lora_jax.combine(frozen, delta), x).formed


def test_one_tree_one_state_and_many_adapters(x64):
    (frozen, delta), (stack, stacked) = shared_pair()
    for base, adapters, fn in ((frozen, delta, listed), (stack, stacked, scanned)):
        assert sum(
            leaf.size for leaf in jax.tree.leaves(optax.sgd(1e-3, 0.9).init(adapters))
        ) == lora_jax.count(adapters)
        tree = lora_jax.combine(base, adapters)
        assert jax.tree.structure(lora_jax.partition(tree).delta) == jax.tree.structure(adapters)
        mask = jax.tree.leaves(lora_jax.optim.trainable_mask(tree))
        assert sum(mask) == len(jax.tree.leaves(adapters))
        x, forward = numbers(3, WIDTH, seed=20), lora_jax.adapt(fn)
        many = lora_jax.stack([adapters, randomised(adapters, 5)])
        each = jax.vmap(lambda delta, x: forward(lora_jax.combine(base, delta), x))(
            lora_jax.take(many, jnp.array([0, 1, 0])), x
        )
        np.testing.assert_allclose(each[0], forward(tree, x)[0], rtol=1e-10)
        np.testing.assert_allclose(
            each[1], fn(lora_jax.merge(base, randomised(adapters, 5)), x)[1], rtol=1e-10
        )
    # Half of a tree cannot say what its adapters are.
    with pytest.raises(
        ValueError,
        match=(
            "adapter of 'h/3/kernel' shares a with that of 'h/1/kernel', which is missing: pass the whole "
            "tree"
        ),
    ):
        lora_jax.adapt(lambda layer, x: x @ layer["kernel"])(lora_jax.combine(frozen, delta)["h"]["3"], x)
    two = lora_jax.adapt(lambda pair, x: listed(pair[0], x) + listed(pair[1], x))
    with pytest.raises(
        ValueError, match="which is there more than once.*each such tree as an argument of its own"
    ):
        two((lora_jax.combine(frozen, delta),) * 2, x)
    apart = lora_jax.adapt(lambda first, second, x: listed(first, x) + listed(second, x))
    np.testing.assert_allclose(
        apart(lora_jax.combine(frozen, delta), lora_jax.combine(frozen, delta), x),
        2 * listed(lora_jax.merge(frozen, delta), x),
    )


def test_score_share_and_train():
    """The three calls, as a user makes them: the smaller delta learns on."""
    params, frozen, delta = of_layers()
    x = numbers(32, WIDTH, seed=30)
    y, forward, tx = jnp.roll(x, 1, axis=1), lora_jax.adapt(listed), optax.sgd(0.05, 0.9)

    @jax.jit
    def step(delta, state):
        loss, gradient = jax.value_and_grad(
            lambda delta: jnp.mean((forward(lora_jax.combine(frozen, delta), x) - y) ** 2)
        )(delta)
        updates, state = tx.update(gradient, state, delta)
        return optax.apply_updates(delta, updates), state, loss

    def trained(delta, steps):
        state = tx.init(delta)
        for _ in range(steps):
            delta, state, loss = step(delta, state)
        return delta, float(loss)

    delta, before = trained(delta, 5)
    smaller = share(delta, importance(listed, frozen, delta, [(x,)]), threshold=0.5)
    assert lora_jax.count(smaller) < lora_jax.count(delta)
    _, after = trained(smaller, 40)
    assert after < 0.8 * before


def test_names_as_flax_gives_them():
    params = {f"Dense_{index}": {"kernel": jnp.ones((4, 4))} for index in range(4)}
    delta = lora_jax.lorafy(params, "kernel", method=LoRA(rank=1)).delta
    smaller = share(delta, {f"Dense_{index}/kernel": float(index == 2) + 0.01 for index in range(4)})
    assert lora_jax.count(smaller) == lora_jax.count(delta) // 2


def test_outputs_of_any_kind():
    """What is no array, or has no derivative, is passed over; an adapter on which nothing depends is no
    adapter of importance zero.
    """
    params = {"w": numbers(4, 4), "v": numbers(4, 4, seed=1)}
    frozen, delta = lora_jax.lorafy(
        {name: weight.astype(jnp.float32) for name, weight in params.items()}, ".*", method=LoRA(rank=1)
    )
    delta, x = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), randomised(delta)), jnp.ones((2, 4))
    mixed = lambda params, x: {
        "y": x @ params["w"] @ params["v"],
        "name": "logits",
        "rate": 0.5,
        "best": jnp.argmax(x),
    }
    assert all(value > 0 for value in importance(mixed, frozen, delta, [(x,)]).values())
    stopped = lambda params, x: lax.stop_gradient(x @ params["w"]) @ params["v"]
    with pytest.raises(
        ValueError,
        match=(
            "nothing was measured of the adapter of 'w', which is not zero: none of the floating-point "
            "outputs"
        ),
    ):
        importance(stopped, frozen, delta, [(x,)])
    with pytest.raises(TypeError, match="`batches` holds a .*; each batch is a tuple of arguments"):
        importance(mixed, frozen, delta, [x])


def test_shared_adapters_are_made_plain_first():
    (frozen, delta), (_, stacked) = shared_pair()
    for call in (
        lambda: lora_jax.arithmetic.weighted([delta, delta], [1, 1]),
        lambda: importance(listed, frozen, delta, [(jnp.ones((1, WIDTH)),)]),
    ):
        with pytest.raises(ValueError, match="lora_jax.arithmetic.as_lora"):
            call()
    half = lora_jax.arithmetic.scaled(stacked, 0.5)
    np.testing.assert_allclose(half["stack"].arrays["b"], stacked["stack"].arrays["b"] / 2)


def test_errors():
    _, frozen, delta = of_layers()
    lonely = lora_jax.lorafy(
        {"query": jnp.ones((4, 4)), "value": jnp.ones((4, 4))}, ".*", method=LoRA(rank=1)
    ).delta
    with pytest.raises(ValueError, match="`delta` has no two layers of one kind, .*'query', 'value'"):
        share(lonely, {"query": 1.0, "value": 1.0})
    with pytest.raises(ValueError, match="`batches` is empty; pass a sample"):
        importance(listed, frozen, delta, [])
    with pytest.raises(
        ValueError, match="`importance` is zero everywhere: B is zero at the start, so train a few steps"
    ):
        share(delta, importance(listed, frozen, delta, [(jnp.ones((1, WIDTH)),)]))
    with pytest.raises(ValueError, match=r"`threshold` is 1.2; it must be above 0 and at most 1"):
        share(delta, paths(SCORES), threshold=1.2)
    with pytest.raises(ValueError, match="`importance` has None for 'h/4/kernel'; it needs a number"):
        share(delta, paths(SCORES[:4]))
    with pytest.raises(ValueError, match="needs an array of shape .5,., none negative"):
        share(of_stack()[2], {"stack": SCORES[:4]})
    with pytest.raises(ValueError, match="'h/0/kernel' has DoRA; LoRA-drop is a choice among"):
        importance(listed, *of_layers(DoRA(rank=1))[1:], [(jnp.ones((1, WIDTH)),)])
    with pytest.raises(ValueError, match="must hold LoRA adapters, and it holds no adapter"):
        share(lora_jax.lorafy({"b": jnp.ones(3)}, "b", method=Full()).delta, {})
    with pytest.raises(
        ValueError, match="'stack' is stacked and adapted in `blocks`, whose layers cannot share"
    ):
        share(of_stack(LoRA(rank=1, blocks=(True, False)))[2], {"stack": SCORES})
