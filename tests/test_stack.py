"""`stack` and `take`: many adapters of one base, served one per example and trained side by side."""

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax import AdaLoRA, DoRA, DyLoRA, Full, LoRA, LoRAFA, VeRA


PARAMS = {"w": (6, 12), "layers": (3, 6, 6), "b": (12,)}
AXES = {"w": "in out", "layers": "layer in out"}
RANKS = [
    LoRA(rank=2, alpha=3),
    LoRA(rank=4, alpha=-5, rs=True, init="kaiming"),
    LoRA(rank=1, alpha=7, dtype="float64"),
]


def base():
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=sizes)) for name, sizes in PARAMS.items()}


def adapters(methods, params):
    """One delta a method, with random A and B, and a bias of its own."""
    rng, found = np.random.default_rng(1), []
    shapes = jax.eval_shape(lambda params: params, params)
    for method in methods:
        delta = lora_jax.lorafy(shapes, {"w|layers": method, "b": Full()}, axes=AXES).delta
        found.append(
            jax.tree.map(lambda array: jnp.asarray(rng.normal(size=array.shape), array.dtype), delta)
        )
    return {**params, "b": None}, found


@pytest.mark.parametrize("blocks", [None, (True, False, True)])
def test_each_is_what_it_was(blocks, x64):
    params = base() if blocks is None else {**base(), "layers": jnp.ones((3, 6, 12))}
    methods = [
        LoRA(rank=m.rank, alpha=m.alpha, rs=m.rs, init=m.init, dtype=m.dtype, blocks=blocks) for m in RANKS
    ]
    _, deltas = adapters(methods, params)
    stacked = lora_jax.stack(deltas)
    number = [] if blocks is None else [2]
    assert stacked["layers"].arrays["a"].shape == (3, 3, *number, 6, 4) and stacked["b"].shape == (3, 12)
    assert stacked["w"].spec.method.scale == 1
    assert not np.any(stacked["w"].arrays["a"][0, ..., 2:]) and not np.any(
        stacked["w"].arrays["b"][2, ..., 1:, :]
    )
    for index, (method, delta) in enumerate(zip(methods, deltas, strict=True)):
        np.testing.assert_array_equal(stacked["b"][index], delta["b"])
        for name in ("w", "layers"):
            a, b = (np.asarray(stacked[name].arrays[part][index]) for part in "ab")
            own_a, own_b = (np.asarray(delta[name].arrays[part]) for part in "ab")
            scale = method.alpha / (method.rank**0.5 if method.rs else method.rank)
            np.testing.assert_allclose(a @ b, scale * own_a @ own_b, rtol=1e-12, atol=1e-12)


def test_take(x64):
    _, deltas = adapters(RANKS, base())
    stacked = lora_jax.stack(deltas)
    bias = np.stack([delta["b"] for delta in deltas])
    for ids in (0, -1, [2, 0, 0], np.array([[1], [-3]]), np.array([], int)):
        wanted = np.asarray(ids)
        taken = lora_jax.take(stacked, ids)
        np.testing.assert_array_equal(taken["b"], bias[wanted])
        assert taken["w"].arrays["a"].shape == (*wanted.shape, 6, 4)
    traced = jax.jit(lambda ids: lora_jax.take(stacked, ids)["b"])
    np.testing.assert_array_equal(traced(jnp.array([1, -1, 5, -9])), bias[[1, 2, 2, 0]])  # clamped
    for ids in (3, [0, 3], -4):
        with pytest.raises(ValueError, match=r"`ids` reaches from .* but `stacked` holds 3 adapters"):
            lora_jax.take(stacked, ids)
    with pytest.raises(ValueError, match="`stacked` holds a single adapter at 'layers'"):
        lora_jax.take(deltas[0], 0)


def plain(params, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
    return x @ params["w"] + params["b"]


def dots(jaxpr):
    """Every `dot_general`, at any depth."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if isinstance(inner, jex.Jaxpr | jex.ClosedJaxpr):
                    yield from dots(getattr(inner, "jaxpr", inner))


def test_one_adapter_per_example(x64):
    frozen, deltas = adapters(RANKS, base())
    stacked, ids = lora_jax.stack(deltas), jnp.array([2, 0, 1, 2])
    xs = jnp.asarray(np.random.default_rng(2).normal(size=(4, 6)))
    forward = lora_jax.adapt(plain)

    def batched(stacked, ids, xs):
        return jax.vmap(lambda delta, x: forward(lora_jax.combine(frozen, delta), x))(
            lora_jax.take(stacked, ids), xs
        )

    ys = jax.jit(batched)(stacked, ids, xs)
    for index, x, y in zip(ids, xs, ys, strict=True):
        np.testing.assert_allclose(
            y, plain(lora_jax.merge(frozen, deltas[int(index)]), x), rtol=1e-11, atol=1e-11
        )
    shapes = [
        [atom.aval.shape for atom in eqn.invars]
        for eqn in dots(jax.make_jaxpr(batched)(stacked, ids, xs).jaxpr)
    ]
    for weight in ((6, 12), (6, 6)):
        assert sum(weight in operands for operands in shapes) == 1, shapes
        assert not any((4, *weight) in operands for operands in shapes)


def test_training_several_side_by_side(relaxed_promotion):
    params = {"w": base()["w"].astype("float32"), "b": base()["b"].astype("float32")}
    methods = [LoRA(rank=2, alpha=3), LoRA(rank=2, alpha=9)]
    deltas = [
        lora_jax.lorafy(params, {"w": method, "b": Full()}, key=jax.random.key(seed)).delta
        for seed, method in enumerate(methods)
    ]
    frozen = lora_jax.lorafy(params, {"w": methods[0], "b": Full()}).frozen
    rates = jnp.array(
        [1e-2, 1e-1]
    )  # B carries the scale after `stack`, so the adapters learn at rates of their own
    x, y = (
        jnp.asarray(np.random.default_rng(3).normal(size=sizes), "float32") for sizes in ((5, 6), (5, 12))
    )
    forward = lora_jax.adapt(lambda params, x: x @ params["w"] + params["b"][None])
    tx = optax.adam(1.0)

    def step(delta, state, rate):
        gradient = jax.grad(lambda delta: jnp.mean((forward(lora_jax.combine(frozen, delta), x) - y) ** 2))(
            delta
        )
        updates, state = tx.update(gradient, state)
        return optax.apply_updates(delta, jax.tree.map(lambda update: rate * update, updates)), state

    stacked = lora_jax.stack(deltas)
    together, states = stacked, jax.vmap(tx.init)(stacked)
    alone = [lora_jax.take(stacked, index) for index in (0, 1)]
    alone = [(delta, tx.init(delta)) for delta in alone]
    several, single = jax.jit(jax.vmap(step)), jax.jit(step)
    for _ in range(3):
        together, states = several(together, states, rates)
        alone = [single(*pair, rate) for pair, rate in zip(alone, rates, strict=True)]
    jax.tree.map(
        lambda a, *b: np.testing.assert_allclose(a, np.stack(b), rtol=1e-4, atol=1e-6),
        together,
        *(delta for delta, _ in alone),
    )
    assert np.all(np.abs(together["w"].arrays["b"] - stacked["w"].arrays["b"]).max((1, 2)) > 1e-3)


def delta_of(targets, method=None, axes=None):
    params = {"w": np.ones((4, 4), np.float32), "v": np.ones((4, 4), np.float32)}
    return lora_jax.lorafy(params, targets, method=method or LoRA(rank=2), axes=axes).delta


@pytest.mark.parametrize(
    "other, message",
    [
        (lambda: {"w": None}, r"`deltas\[1\]` does not have the containers of `deltas\[0\]`"),
        (
            lambda: delta_of({"w": Full()}),
            r"at 'w' they have an adapter, an array of shape \(4, 4\), and a LoRA",
        ),
        (lambda: delta_of({"v": Full()}), r"`deltas\[0\]` has nothing at 'v', where others train the leaf"),
        (
            lambda: delta_of("v", DoRA(rank=2)),
            r"at 'v' they have nothing, an adapter, and a DoRA adapter of zeros",
        ),
        (
            lambda: delta_of("w", LoRA(rank=2, blocks=(True, True))),
            r"`deltas\[1\]` differs from `deltas\[0\]` at 'w' in `blocks` \(\(True, True\) and None\): "
            r".*as_lora",
        ),
        (
            lambda: delta_of("w", LoRA(rank=2, dtype="bfloat16")),
            r"differs from `deltas\[0\]` at 'w' in `dtype` \(dtype\(bfloat16\) and",
        ),
        (lambda: delta_of("w", VeRA(rank=2)), r"differs .* at 'w' in `method` \('VeRA' and 'LoRA'\)"),
        (
            lambda: delta_of("w", axes="out in"),
            r"differs from `deltas\[0\]` at 'w' in `axes` \(\('out', 'in'\) and",
        ),  # same shapes: would be wrong in silence
    ],
)
def test_stack_errors(other, message):
    with pytest.raises(ValueError, match=message):
        lora_jax.stack([delta_of("w"), other()])


def test_stack_of_nothing():
    with pytest.raises(ValueError, match="`deltas` is empty"):
        lora_jax.stack([])


def test_adapters_that_share_with_other_leaves_are_not_stacked():
    """Their shapes are alike, so that one would be taken for the other in silence."""
    params = {str(index): jnp.ones((4, 4)) for index in range(4)}
    delta = lora_jax.lorafy(params, ".*", method=LoRA(rank=1)).delta
    shared = [
        lora_jax.drop.share(delta, {name: float(name == most) + 1e-3 for name in params}) for most in "03"
    ]
    assert lora_jax.stack([shared[0]] * 2)["0"].arrays["a"].shape == (2, 4, 1)
    with pytest.raises(
        ValueError, match=r"`deltas\[1\]` differs from `deltas\[0\]` at '1' in what it shares"
    ):
        lora_jax.stack(shared)


# --- adapters that do not match -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [LoRA(rank=2), LoRA(rank=2, blocks=(True, False)), AdaLoRA(rank=2), DyLoRA(rank=2)], ids=repr
)
def test_adapters_of_other_leaves(method):
    """Zeros where a delta has no adapter: each of the stack computes what it computed alone."""
    params, x = {"w": jnp.eye(4), "v": jnp.ones((4, 4))}, jnp.ones((2, 4))
    frozen, one = lora_jax.lorafy(params, "w", method=method)
    _, both = lora_jax.lorafy(params, ".", method=method)
    one, both = (jax.tree.map(lambda leaf: leaf + 0.5, delta) for delta in (one, both))
    forward = lora_jax.adapt(lambda params, x: x @ params["w"] @ params["v"])
    stacked = lora_jax.stack([one, both])
    for index, delta in enumerate((one, both)):
        found = forward(lora_jax.combine(frozen, lora_jax.take(stacked, index)), x)
        assert jnp.allclose(found, forward(lora_jax.combine(frozen, delta), x), rtol=1e-6)


def test_other_rates_of_dropout():
    """They matter with a key alone, and a stack of several rates has none."""
    stacked = lora_jax.stack([delta_of("w"), delta_of("w", LoRA(rank=2, dropout=0.1))])
    assert stacked["w"].spec.method.dropout == 0.0
    alike = [delta_of("w", LoRA(rank=rank, dropout=0.1)) for rank in (1, 2)]
    assert lora_jax.stack(alike)["w"].spec.method.dropout == 0.1


def test_another_alpha_compiles_nothing():
    params = {"w": np.ones((4, 4), np.float32), "v": np.ones((4, 4), np.float32)}
    call = jax.jit(
        lambda delta, x: lora_jax.adapt(lambda params, x: x @ params["w"])(
            lora_jax.combine(params, lora_jax.take(delta, 0)), x
        )
    )
    for alpha in (1, 2, 3):
        call(lora_jax.stack([delta_of("w", LoRA(rank=2, alpha=alpha))]), np.ones((1, 4), np.float32))
    assert call._cache_size() == 1


def test_scales_are_not_rounded_to_bfloat16():
    """16/3 in bfloat16 is 5.34375: every entry of B would be off by 0.2 %, in the same direction."""
    for method in (LoRA, DoRA, AdaLoRA, LoRAFA):
        delta = lora_jax.lorafy(
            {"w": np.ones((8, 64), np.float32)}, "w", method=method(rank=3, dtype="bfloat16")
        ).delta
        b = jnp.asarray(np.random.default_rng(0).normal(size=(3, 64)), "bfloat16")
        delta["w"].arrays["b"] = b
        found = lora_jax.stack([delta])["w"].arrays["b"][0]
        expected = (b.astype("float32") * delta["w"].spec.method.scale).astype("bfloat16")
        assert jnp.all(found == expected), method
