"""Dropout: on the input of the low-rank path alone, and other for every leaf, use, layer and step of a
loop.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P

import lora_jax
from lora_jax import LoRA


RATE, SIZE, ROWS = 0.25, 64, 8
ONES = jnp.ones((ROWS, SIZE))


def identity_adapters(params, axes="in out"):
    """Adapters whose A·B is the identity: the low-rank path returns its own, dropped out, input."""
    frozen, delta = lora_jax.lorafy(params, ".*", method=LoRA(rank=SIZE, alpha=SIZE, dropout=RATE), axes=axes)
    return frozen, jax.tree.map(lambda array: jnp.broadcast_to(jnp.eye(SIZE), array.shape), delta)


def every_use(params, x):
    """The output of each of many uses of weights: of two leaves, two uses, layers of a stack, and steps
    of loops.
    """
    outputs = {
        "first": x @ params["q"],
        "second": x @ params["q"],
        "other leaf": x @ params["v"],
        "turned": (params["q"].T @ x.T).T,
    }
    layers = lax.scan(lambda total, w: (total, x @ w), 0.0, params["stack"])[1]
    shared = lax.scan(lambda total, _: (total, x @ params["q"]), 0.0, length=3)[1]
    outputs |= {f"layer {index}": layer for index, layer in enumerate(layers)} | {
        f"step {index}": step for index, step in enumerate(shared)
    }
    looped = lax.fori_loop(
        0, 2, lambda step, out: out.at[step].set(x @ params["v"]), jnp.zeros((2, *x.shape))
    )
    outputs |= {"loop 0": looped[0], "loop 1": looped[1], "picked": x @ params["stack"][1]}

    # A loop of an unknown number of steps is a `while`. Weights are its constants, or in its carry if its
    # condition looks at them.
    def step(state):
        number, masks, carried = state
        return number + 1, masks.at[number].set(jnp.stack([x @ params["v"], x @ carried])), carried

    _, masks, _ = lax.while_loop(
        lambda state: (state[0] < 2) & (jnp.sum(state[2][0]) < 9.0),
        step,
        (0, jnp.zeros((2, 2, *x.shape)), params["q"]),
    )
    outputs |= {f"while {index}": mask for index, mask in enumerate(masks.reshape(4, *x.shape))}
    convolved, ragged = (
        lambda: lax.conv_general_dilated(
            x[None], params["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )[0],
        lambda: lax.ragged_dot(x, params["stack"], jnp.array([3, 5])),
    )
    outputs |= {f"convolution {index}": convolved() for index in range(2)}
    outputs |= {f"ragged {index}": ragged() for index in range(2)}
    outputs["branch"] = lax.cond(x[0, 0] > 0, lambda w: x @ w, lambda w: 2 * x @ w, params["v"])
    outputs["checkpoint"] = jax.checkpoint(lambda w: x @ w)(params["v"])
    outputs["jit"] = jax.jit(lambda w: x @ w)(params["v"])
    return outputs


@pytest.fixture(scope="module")
def uses():
    """`outputs(key)` of `every_use` on weights of zero: each is its own dropout mask, over the rate of
    keeping.
    """
    sizes = {"q": (), "v": (), "stack": (2,), "kernel": (1,)}
    params = {name: jnp.zeros((*more, SIZE, SIZE)) for name, more in sizes.items()}
    frozen, delta = identity_adapters(params, {"stack": "layer in out", "kernel": "in in out"})
    forward = lora_jax.adapt(every_use)
    return jax.jit(lambda key: forward(lora_jax.combine(frozen, delta, key=key), ONES))


def test_every_use_has_its_own_mask(uses):
    masks = {name: np.asarray(output) for name, output in uses(jax.random.key(0)).items()}
    assert len(masks) == 23
    kept = 1 / (1 - RATE)
    for name, mask in masks.items():
        assert set(np.unique(mask)) == {np.float32(0), np.float32(kept)}, name
        assert abs((mask == 0).mean() - RATE) < 5 * np.sqrt(RATE * (1 - RATE) / mask.size), name
    # Independent masks agree in (1-p)² + p² of the places.
    names, agreement = list(masks), (1 - RATE) ** 2 + RATE**2
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            found = (masks[first] == masks[second]).mean()
            assert abs(found - agreement) < 0.11, (first, second, found)


def test_key(uses):
    """The same key gives the same masks, another key others, whichever kind of key it is."""
    once, again, legacy, other = map(
        uses, (jax.random.key(0), jax.random.key(0), jax.random.PRNGKey(0), jax.random.key(1))
    )
    jax.tree.map(np.testing.assert_array_equal, once, again)
    jax.tree.map(np.testing.assert_array_equal, once, legacy)
    assert all(np.any(a != b) for a, b in zip(once.values(), other.values(), strict=True))


def mask_of(rate, x, wrap=lambda fn: fn):
    """The mask that x is dropped out by, times 1 / (1 - rate), where x is ones."""
    width = x.shape[-1]
    method = LoRA(rank=width, alpha=width, dropout=rate)
    frozen, delta = lora_jax.lorafy({"w": jnp.zeros((width, width))}, "w", method=method)
    delta = jax.tree.map(lambda array: jnp.eye(width), delta)
    forward = wrap(lora_jax.adapt(lambda params, x: x @ params["w"]))
    return forward(lora_jax.combine(frozen, delta, key=jax.random.key(3)), x)


@pytest.mark.parametrize("rate", [0.1, 0.003])
def test_rate(rate):
    """The rate is not rounded, the mean is that of no dropout, and entries that share random bits are as good
    as independent.
    """
    mask = np.asarray(mask_of(rate, jnp.ones((1 << 17, 32)), jax.jit))
    assert set(np.unique(mask)) == {np.float32(0), np.float32(1 / (1 - rate))}
    kept, keep = mask > 0, 1 - rate
    error = np.sqrt(rate * keep / mask.size)
    assert abs(kept.mean() - keep) < 5 * error  # rounded to a byte, either rate would be 10 errors off
    by_column = np.sqrt(rate * keep / len(mask))
    np.testing.assert_allclose(kept.mean(0), keep, atol=5 * by_column)
    apart = (kept - keep).astype("float32")
    together = apart.T @ apart / len(mask)
    words = np.arange(32) // 4
    bound = 5 * rate * keep / np.sqrt(len(mask)) + np.where(words[:, None] == words, 1 / 1024, 0)
    assert np.all((abs(together) < bound)[~np.eye(32, dtype=bool)])
    assert abs(np.mean(apart[1:] * apart[:-1])) < 5 * rate * keep / np.sqrt(mask.size)


@pytest.mark.parametrize("width", [1, 2, 5, 7])
def test_rows_that_are_no_whole_words(width):
    mask = np.asarray(mask_of(0.5, jnp.ones((4000, width))))
    np.testing.assert_allclose(mask.mean(0), 1.0, atol=5 / np.sqrt(4000))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    "spec", [P("data"), P("data", "model"), P(("data", "model")), P(None, None, "data")], ids=str
)
def test_the_mask_is_that_of_one_device(kind, spec):
    """However x is split, in rows or within them."""
    x = jnp.ones((8, 4, 16))
    expected = mask_of(0.3, x)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        split = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
        found = mask_of(0.3, split, jax.jit)
    np.testing.assert_array_equal(found, expected)


CASES = {
    "dot": ((6, 4), "in out", (3, 6), lambda w, x: x @ w),
    "weight on the left": ((4, 6), "out in", (6, 3), lambda w, x: w @ x),
    "heads": ((6, 2, 3), "in out out", (3, 6), lambda w, x: jnp.einsum("td,dhk->htk", x, w)),
    "conv": (
        (3, 2, 4),
        "in in out",
        (2, 5, 2),
        lambda w, x: lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_mean_and_start(case):
    """Over many keys the mean is the output without dropout, and the base's part is never dropped."""
    sizes, axes, x_sizes, fn = CASES[case]
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.normal(size=sizes), "float32") for sizes in (sizes, x_sizes))
    frozen, start = lora_jax.lorafy({"w": w}, "w", method=LoRA(rank=2, dropout=0.5), axes=axes)
    delta = jax.tree.map(lambda array: jnp.asarray(rng.normal(size=array.shape), "float32"), start)
    forward = lora_jax.adapt(lambda params, x: fn(params["w"], x))
    keys = jax.random.split(jax.random.key(0), 4000)

    @jax.jit
    def outputs(delta):
        with_key = jax.vmap(lambda key: forward(lora_jax.combine(frozen, delta, key=key), x))(keys)
        return with_key, forward(lora_jax.combine(frozen, delta), x), fn(w, x)

    dropped, plain, base = map(np.asarray, outputs(delta))
    error = dropped.std(0) / np.sqrt(len(keys))
    assert np.all(error > 0) and np.all(np.abs(dropped.mean(0) - plain) < 5 * error)
    assert np.any(np.abs(plain - base) > 0.1)
    dropped, plain, base = outputs(start)  # B is zero: dropout has nothing to drop
    assert np.array_equal(dropped, np.broadcast_to(base, dropped.shape)) and np.array_equal(plain, base)


@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.checkpoint], ids=["plain", "checkpoint"])
def test_gradients_see_the_same_mask(wrap, x64):
    """The backward pass, rematerialised or not, has the mask of the forward pass."""
    rng = np.random.default_rng(0)
    w, a, b, c, x = (
        rng.normal(size=sizes) for sizes in ((SIZE, 4), (SIZE, 3), (3, 4), (ROWS, 4), (ROWS, SIZE))
    )
    frozen, delta = lora_jax.lorafy({"w": jnp.asarray(w)}, "w", method=LoRA(rank=3, alpha=6, dropout=RATE))
    forward = lora_jax.adapt(wrap(lambda params, x: jnp.tanh(x @ params["w"])))

    def value(arrays, x):
        delta["w"].arrays.update(arrays)
        return forward(lora_jax.combine(frozen, delta, key=jax.random.key(7)), x)

    loss = lambda arrays, x: (jnp.sum(value(arrays, x) * c), value(arrays, x))
    gradient, y = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(
        {"a": jnp.asarray(a), "b": jnp.asarray(b)}, jnp.asarray(x)
    )
    # The mask, read off a low-rank path that copies one input channel to the output; all channels in one
    # `vmap`.
    pick = jax.vmap(
        lambda row: value(
            {"a": jnp.tile(row[:, None], (1, 3)), "b": jnp.ones((3, 4))}, jnp.ones((ROWS, SIZE)) * 1e-3
        )
    )(jnp.eye(SIZE))
    quiet = np.tanh(1e-3 * w.sum(0))
    mask = (np.abs(np.asarray(pick)[:, :, 0] - quiet[0]).T > 1e-6) / (1 - RATE)
    assert abs((mask == 0).mean() - RATE) < 0.1
    pre = x @ w + 2 * (x * mask) @ a @ b
    np.testing.assert_allclose(y, np.tanh(pre), rtol=1e-10)
    cotangent = c * (1 - np.tanh(pre) ** 2)
    np.testing.assert_allclose(gradient[0]["a"], 2 * (x * mask).T @ cotangent @ b.T, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(gradient[0]["b"], 2 * ((x * mask) @ a).T @ cotangent, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        gradient[1], cotangent @ w.T + 2 * (cotangent @ b.T @ a.T) * mask, rtol=1e-9, atol=1e-12
    )


def test_lookups_are_not_dropped():
    frozen, delta = identity_adapters({"table": jnp.zeros((SIZE, SIZE))})
    rows = lora_jax.adapt(lambda params: params["table"][jnp.array([3, 5])])(
        lora_jax.combine(frozen, delta, key=jax.random.key(0))
    )
    np.testing.assert_array_equal(rows, np.eye(SIZE)[[3, 5]])


@pytest.mark.parametrize("rate, key, carried", [(0.1, True, True), (0.1, False, False), (0.0, True, False)])
def test_key_is_carried_only_where_something_is_random(rate, key, carried):
    tree = lora_jax.combine(
        *lora_jax.lorafy({"w": ONES}, "w", method=LoRA(dropout=rate)), key=jax.random.key(0) if key else None
    )
    assert (tree["w"].key is not None) == carried


def test_merging_knows_no_dropout():
    frozen, delta = identity_adapters({"w": jnp.zeros((SIZE, SIZE))})
    np.testing.assert_array_equal(lora_jax.merge(frozen, delta)["w"], np.eye(SIZE))


def test_wrong_key():
    with pytest.raises(TypeError, match=r"`key` is 3; pass a random key"):
        lora_jax.combine(*lora_jax.lorafy({"w": ONES}, "w"), key=3)


def shapes_of(fn, methods, shapes, axes, key):
    """The shapes of what the adapted `fn` returns, with a key or without."""
    shapes = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    trees = lora_jax.lorafy(shapes, methods, axes=axes)
    of_trees = lambda frozen, delta, key: lora_jax.adapt(fn)(lora_jax.combine(frozen, delta, key=key))
    return jax.eval_shape(of_trees, *trees, jax.random.key(0) if key else None).shape


@pytest.mark.parametrize("other", [0.0, 0.5])
def test_joined_weights_have_one_dropout(other):
    """One input has one mask: of weights with different rates, the joined one has no low-rank form."""
    methods = {"q": LoRA(rank=2, dropout=RATE), "v": LoRA(rank=2, dropout=other)}
    joined = lambda params: jnp.ones((2, 4)) @ jnp.concatenate([params["q"], params["v"]], 1)
    given = (joined, methods, {"q": (4, 4), "v": (4, 4)}, "in out")
    assert shapes_of(*given, key=False) == (2, 8)
    with pytest.raises(lora_jax.MaterializeError, match="`concatenate`.*'q'"):
        shapes_of(*given, key=True)


def _gathered(params):
    """A stack whose layers lie on two devices, gathered where it is used."""
    return jax.shard_map(
        lambda w: jnp.einsum("i,lio->lo", jnp.ones(4), lax.all_gather(w, "model", axis=0, tiled=True)),
        mesh=jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,)),
        in_specs=P("model"),
        out_specs=P(),
        check_vma=False,
    )(params["w"])


LAYERS_CHANGED = {
    "pad": (
        lambda params: jnp.einsum("i,lio->lo", jnp.ones(4), jnp.pad(params["w"], ((1, 1), (0, 0), (0, 0)))),
        4,
    ),
    "all_gather": (_gathered, 2),
}


@pytest.mark.parametrize("operation", LAYERS_CHANGED)
def test_layers_that_are_not_those_of_the_keys(operation):
    """Every layer has a key of its own. Where layers come in, keys would be missing."""
    fn, layers = LAYERS_CHANGED[operation]
    given = (fn, {"w": LoRA(rank=2, dropout=RATE)}, {"w": (2, 4, 4)}, "layer in out")
    assert shapes_of(*given, key=False) == (layers, 4)
    with pytest.raises(lora_jax.MaterializeError, match=f"`{operation}`.*'w'"):
        shapes_of(*given, key=True)
