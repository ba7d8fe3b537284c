"""`lorafy`: which leaves a target names, in which trees, along which axes, and what the adapters start as."""

import dataclasses
import math
from functools import partial

import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax
from lora_jax import Full, LoRA


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


def block(size):
    return {
        "attn": {
            "c_attn": {"kernel": shape(size, 3 * size), "bias": shape(3 * size)},
            "c_proj": {"kernel": shape(size, size), "bias": shape(size)},
        },
        "ln_1": {"scale": shape(size), "bias": shape(size)},
    }


MODEL = {
    "wte": {"embedding": shape(64, 16)},
    "h": {"0": block(16), "1": block(16)},
    "steps": shape(dtype="int32"),
    "ids": shape(4, 4, dtype="int32"),
}
ATTN, PROJ = (
    [f"h/{layer}/attn/c_attn/kernel" for layer in (0, 1)],
    [f"h/{layer}/attn/c_proj/kernel" for layer in (0, 1)],
)
RANK_2 = LoRA(rank=2)


def is_adapter(leaf):
    return hasattr(leaf, "spec")


def adapters(delta):
    """Every adapter of a delta by the path of its leaf."""
    return {leaf.spec.path: leaf for leaf in jax.tree.leaves(delta, is_leaf=is_adapter) if is_adapter(leaf)}


# --- targets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets, expected",
    [
        ("attn/c_attn/kernel", ATTN),  # last whole components
        ("h/0/attn/c_attn/kernel", ATTN[:1]),  # the whole path
        ("kernel", ATTN + PROJ),
        ("c_attn/kernel|c_proj/kernel", ATTN + PROJ),  # one group: both alternatives may be endings
        ("h/1/attn/c_attn/kernel|embedding", [*ATTN[1:], "wte/embedding"]),
        (r"h/\d+/attn/c_attn/kernel", ATTN),
        (r"1/.*/kernel", [ATTN[1], PROJ[1]]),
        ("^h/0/.*kernel$", [ATTN[0], PROJ[0]]),
        (["c_attn/kernel", "embedding"], [*ATTN, "wte/embedding"]),
        (
            ("kernel", "c_attn/kernel|embedding"),
            [*ATTN, *PROJ, "wte/embedding"],
        ),  # overlapping, but each adds something
        (lambda path, leaf: leaf.shape == (16, 16) and "h/1" in path, PROJ[1:]),
        (
            lambda path, leaf: leaf.shape in ((4, 4), (64, 16)),
            ["wte/embedding"],
        ),  # the integers are passed over
        ({"h/0/.*/kernel": RANK_2, "c_proj/kernel": LoRA(rank=3)}, [*ATTN[:1], *PROJ]),
    ],
)
def test_targets(targets, expected):
    assert sorted(adapters(lora_jax.lorafy(MODEL, targets, method=RANK_2).delta)) == sorted(expected)


def test_first_match_of_a_mapping_wins():
    methods = {
        "h/0/attn/c_attn/kernel": LoRA(rank=3),
        "kernel": RANK_2,
        lambda path, leaf: path == "wte/embedding": LoRA(rank=5),
        "bias|scale": Full(),
    }
    frozen, delta = lora_jax.lorafy(MODEL, methods)
    assert {path: adapter.spec.method.rank for path, adapter in adapters(delta).items()} == {
        ATTN[0]: 3,
        **dict.fromkeys([ATTN[1], *PROJ], 2),
        "wte/embedding": 5,
    }
    assert frozen["h"]["0"]["ln_1"] == {"scale": None, "bias": None}
    assert delta["h"]["0"]["ln_1"] == MODEL["h"]["0"]["ln_1"]
    assert delta["steps"] is None and frozen["steps"] is MODEL["steps"]


@pytest.mark.parametrize(
    "targets, message",
    [
        ("c_attn", r"pattern 'c_attn' matches no leaf.*nearest paths are.*'h/0/attn/c_attn/kernel'"),
        (
            "ttn/c_attn/kernel",
            r"matches no leaf.*nearest paths are 'h/0/attn/c_attn/kernel', 'h/1/attn/c_attn/kernel'",
        ),  # half a component
        ("attn/c_attn/kernal", r"nearest paths are 'h/0/attn/c_attn/kernel', 'h/1/attn/c_attn/kernel'"),
        (["kernel", "query/kernel"], r"'query/kernel' matches no leaf"),
        (
            {"kernel": RANK_2, "c_attn/kernel": LoRA(rank=4)},
            r"'c_attn/kernel' matches only leaves that earlier.*'h/0/attn/c_attn/kernel'.*move it before",
        ),
        (["kernel", "kernel"], r"'kernel' matches only leaves that earlier"),
        ("ids", r"'ids' matches only leaves that are not floating point: 'ids \(int32\)'"),
        ("steps|ids", r"not floating point: 'ids \(int32\)', 'steps \(int32\)'"),
        (lambda path, leaf: path == "ids", r"predicate .* chose no floating-point leaf among 15"),
        ("c_attn/(kernel", r"'c_attn/\(kernel' is not a regular expression"),
        ([], r"`targets` is empty"),
        ({}, r"`targets` is empty"),
        ("all-linear", r"'all-linear', which needs `fn=` and `args=`"),
    ],
)
def test_wrong_targets(targets, message):
    with pytest.raises(ValueError, match=message):
        lora_jax.lorafy(MODEL, targets, method=RANK_2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"targets": 3}, r"`targets` is 3; pass a pattern"),
        ({"targets": [lambda path, leaf: True]}, r"`targets` holds <function"),
        ({"targets": {3: RANK_2}}, r"`targets` has the key 3"),
        (
            {"targets": "kernel", "method": LoRA},
            r"The method for 'h/0/attn/c_attn/kernel' is <class.*LoRA\(rank=8\)",
        ),
        ({"targets": {"kernel": 4}}, r"The method for 'h/0/attn/c_attn/kernel' is 4"),
        (
            {"targets": "kernel", "key": 0},
            r"`key` is 0; pass a random key, for example `jax.random.key\(0\)`",
        ),
        ({"targets": "kernel", "axes": ["in out"]}, r"`axes` is \['in out'\]; pass a string"),
        (
            {"targets": "kernel", "axes": {"kernel": ("in", "out")}},
            r"`axes` for 'h/0/attn/c_attn/kernel' is \('in', 'out'\); pass one string",
        ),
        (
            {"targets": "kernel", "fn": lambda params, x: x, "args": shape(3)},
            r"`args` is a ShapeDtypeStruct; pass a tuple, `args=\(x,\)`",
        ),
    ],
)
def test_wrong_kind_of_argument(arguments, message):
    with pytest.raises(TypeError, match=message):
        lora_jax.lorafy(MODEL, **arguments)


def test_refuses_what_it_cannot_tell_apart():
    with pytest.raises(ValueError, match=r"'a/b', which is the path of 2 leaves"):
        lora_jax.lorafy({"a/b": shape(8, 8), "a": {"b": shape(9, 9)}}, "a/b")
    with pytest.raises(ValueError, match=r"`args` is given without `fn`"):
        lora_jax.lorafy(MODEL, "kernel", args=(shape(1),))
    with pytest.raises(ValueError, match=r"`params` has no leaves"):
        lora_jax.lorafy({}, "kernel")


def test_refuses_an_adapted_tree():
    frozen, delta = lora_jax.lorafy(MODEL, "c_attn/kernel")
    for tree in (delta, lora_jax.combine(frozen, delta)):
        with pytest.raises(TypeError, match="`params` already holds adapters"):
            lora_jax.lorafy(tree, "c_proj/kernel")


def test_partition_undoes_combine():
    params = {
        "a": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)},
        "absent": None,
        "steps": jnp.arange(3),
        "head": [jnp.ones((4, 2))],
    }
    frozen, delta = lora_jax.lorafy(params, {"kernel": LoRA(rank=2, dropout=0.1), "head/0": Full()})
    for key in (None, jax.random.key(0)):
        apart = lora_jax.partition(lora_jax.combine(frozen, delta, key=key))
        assert jax.tree.structure(apart) == jax.tree.structure(lora_jax.Lorafied(frozen, delta))
        assert all(
            a is b for a, b in zip(jax.tree.leaves(apart), jax.tree.leaves((frozen, delta)), strict=True)
        )
    assert lora_jax.partition({}) == ({}, {})
    with pytest.raises(TypeError, match="`tree` is a delta; pass the combined tree"):
        lora_jax.partition(delta)


@pytest.mark.parametrize("swap", [lora_jax.combine, lora_jax.merge, lora_jax.unmerge, lora_jax.merge_report])
def test_trees_that_do_not_belong_together(swap):
    frozen, delta = lora_jax.lorafy({"w": jnp.ones((4, 4))}, "w", method=RANK_2)
    with pytest.raises(
        ValueError,
        match=r"at 'w' the first has an Adapter and the second an array of shape \(4, 4\)"
        if swap is not lora_jax.unmerge
        else "'w'",
    ):
        swap(delta, frozen)
    with pytest.raises(ValueError, match="do not have the same containers"):
        swap(frozen, {"v": delta["w"]})


# --- containers ---------------------------------------------------------------------------------------------


@partial(jax.tree_util.register_dataclass, data_fields=["kernel", "bias"], meta_fields=["name"])
@dataclasses.dataclass
class Layer:
    kernel: jax.Array
    bias: jax.Array
    name: str = "layer"


class Net(eqx.Module):
    layers: list
    activation: object
    size: int = eqx.field(static=True)


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.value = nnx.Param(jnp.ones((4, 4)))  # a parameter that is called like the wrapper's own field


KERNEL = jnp.ones((4, 4))
BIAS = jnp.zeros(4)
PLAIN = {"first": {"kernel": KERNEL, "bias": BIAS}}


def haiku_like():
    return {"mlp/~/linear_0": {"w": KERNEL, "b": BIAS}}


@pytest.mark.parametrize(
    "params, target, path",
    [
        (PLAIN, "first/kernel", "first/kernel"),
        (flax.core.freeze(PLAIN), "first/kernel", "first/kernel"),
        ([{"kernel": KERNEL}, (BIAS, KERNEL)], r"1/1", "1/1"),
        (
            haiku_like(),
            "linear_0/w",
            "mlp/~/linear_0/w",
        ),  # the end of a key, because each of its parts is a component
        (Layer(KERNEL, BIAS), "kernel", "kernel"),
        (nnx.state(Mlp(nnx.Rngs(0))), "first/kernel", "first/kernel"),
        (nnx.state(Mlp(nnx.Rngs(0))), "value", "value"),
        (
            Net([eqx.nn.Linear(4, 4, use_bias=False, key=jax.random.key(0))], jax.nn.relu, 3),
            "weight",
            "layers/0/weight",
        ),
        ({"a": None, "b": {"kernel": KERNEL}, "c": "text", "d": 3}, "kernel", "b/kernel"),
        (KERNEL, ".*", ""),
    ],
    ids=[
        "dict",
        "FrozenDict",
        "list",
        "haiku",
        "dataclass",
        "nnx",
        "nnx-value",
        "equinox",
        "odd leaves",
        "bare array",
    ],
)
def test_containers(params, target, path):
    frozen, delta = lora_jax.lorafy(params, target, method=RANK_2)
    assert list(adapters(delta)) == [path]
    assert jax.tree.structure(frozen) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(frozen), jax.tree.leaves(params), strict=True))
    assert type(delta) is type(params) or path == ""
    assert len(jax.tree.leaves(delta)) == 2 and lora_jax.count(delta) == 2 * (4 + 4)
    # The containers survive the round trip, and the model's own type takes the result.
    merged = lora_jax.merge(frozen, delta)
    assert jax.tree.structure(merged) == jax.tree.structure(params) and type(merged) is type(params)
    assert jax.tree.structure(lora_jax.combine(frozen, delta)).num_leaves == len(jax.tree.leaves(params)) + 2


def test_nnx_state_goes_back_into_its_model():
    model = Mlp(nnx.Rngs(0))
    graph, params = nnx.split(model)
    frozen, delta = lora_jax.lorafy(params, "first/kernel", method=RANK_2)
    delta = jax.tree.map(jnp.ones_like, delta)
    merged = nnx.merge(graph, lora_jax.merge(frozen, delta))
    # A·B is rank 2 of ones, scaled by alpha / rank = 8.
    np.testing.assert_allclose(merged.first.kernel[...], model.first.kernel[...] + 16.0, rtol=1e-6)
    assert merged.value[...] is model.value[...]


def test_full_moves_the_leaf_itself():
    params = {"kernel": KERNEL, "bias": BIAS}
    frozen, delta = lora_jax.lorafy(params, {"bias": Full()})
    assert (
        frozen["bias"] is None
        and delta["bias"] is BIAS
        and delta["kernel"] is None
        and frozen["kernel"] is KERNEL
    )
    everything = lora_jax.lorafy(params, {".*": Full()})
    assert jax.tree.leaves(everything.frozen) == [] and everything.delta == params


# --- shapes alone -------------------------------------------------------------------------------------------


def gpt2(size, layers):
    kernels = {"c_attn": 3 * size, "c_proj": size}
    attn = {
        name: {"kernel": shape(layers, size, out), "bias": shape(layers, out)}
        for name, out in kernels.items()
    }
    mlp = {
        "c_fc": {"kernel": shape(layers, size, 4 * size)},
        "c_proj": {"kernel": shape(layers, 4 * size, size)},
    }
    return {"wte": {"embedding": shape(50257, size)}, "h": {"attn": attn, "mlp": mlp}}


QV = (True, False, True)


@pytest.mark.parametrize(
    "size, layers, targets, method, expected",
    [
        (1024, 24, "c_attn/kernel", LoRA(rank=4, blocks=QV), 393_216),  # GPT-2 medium, loralib's q and v
        (1280, 36, "c_attn/kernel", LoRA(rank=4, blocks=QV), 737_280),
        (1600, 48, "c_attn/kernel", LoRA(rank=4, blocks=QV), 1_228_800),  # 1.5B
        (
            1024,
            24,
            "c_attn/kernel",
            LoRA(rank=4),
            393_216,
        ),  # PEFT's: another function class, by chance as many
        (1024, 24, "attn/c_proj/kernel", LoRA(rank=8, rs=True), 24 * 8 * 2048),
        (
            12288,
            96,
            "c_attn/kernel",
            LoRA(rank=4, blocks=QV),
            18_874_368,
        ),  # GPT-3: 175 billion shapes, and nothing of it
        (1600, 48, {"bias": Full()}, None, 48 * (3 * 1600 + 1600)),
    ],
)
def test_counts_from_shapes_alone(size, layers, targets, method, expected):
    axes = None if method is None else "layer in out"
    frozen, delta = lora_jax.lorafy(gpt2(size, layers), targets, method=method, axes=axes)
    assert lora_jax.count(delta) == expected
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((frozen, delta)))
    merged = lora_jax.merge(frozen, delta)
    assert jax.tree.map(lambda leaf: leaf.shape, merged) == jax.tree.map(
        lambda leaf: leaf.shape, gpt2(size, layers)
    )


@pytest.mark.parametrize(
    "sizes, axes, method, a, b",
    [
        ((6, 10), "in out", LoRA(rank=3), (6, 3), (3, 10)),
        ((10, 6), "out in", LoRA(rank=3), (6, 3), (3, 10)),
        ((5, 6, 10), "layer in out", LoRA(rank=3), (5, 6, 3), (5, 3, 10)),
        ((6, 5, 10), "in layer out", LoRA(rank=3), (5, 6, 3), (5, 3, 10)),
        ((6, 4, 5), "in out out", LoRA(rank=6), (6, 6), (6, 4, 5)),
        ((4, 5, 6), "in in out", LoRA(rank=6), (4, 5, 6), (6, 6)),
        ((3, 3, 2, 8), "in in in out", LoRA(rank=8), (3, 3, 2, 8), (8, 8)),
        ((6, 12), "in out", LoRA(rank=3, blocks=(True, False, True)), (2, 6, 3), (2, 3, 4)),
        ((6, 12), "in out", LoRA(rank=3, blocks=[0, 1]), (1, 6, 3), (1, 3, 6)),
        ((5, 12, 6), "layer out in", LoRA(rank=3, blocks=(True, True, True)), (5, 3, 6, 3), (5, 3, 3, 4)),
    ],
)
def test_shapes_of_factors(sizes, axes, method, a, b):
    adapter = lora_jax.lorafy({"w": shape(*sizes)}, "w", method=method, axes=axes).delta["w"]
    assert {name: array.shape for name, array in adapter.arrays.items()} == {"a": a, "b": b}
    along = lambda word: tuple(size for size, axis in zip(sizes, axes.split(), strict=True) if axis == word)
    assert [sizes[axis] for axis in adapter.array_axes()["a"] if axis is not None] == [
        *along("layer"),
        *along("in"),
    ]


def test_shapes_keep_their_sharding():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    leaf = jax.ShapeDtypeStruct((4, 4), "float32", sharding=sharding)
    frozen, delta = lora_jax.lorafy({"w": leaf, "head": leaf}, {"w": RANK_2, "head": Full()})
    assert frozen["w"] is leaf and delta["head"] is leaf


# --- axes ---------------------------------------------------------------------------------------------------

X = shape(2, 6)


def heads(params, x):
    return jnp.einsum("hkd,bhk->bd", params["o"], jnp.einsum("bd,dhk->bhk", x, params["q"]))


HEADS = {"q": shape(6, 2, 4), "o": shape(2, 4, 6)}


def scanned(params, x):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]


def convolved(params, x):
    return jax.lax.conv_general_dilated(
        x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def tied(params, x):
    return params["w"][x] @ params["w"].T


@pytest.mark.parametrize(
    "params, fn, args, expected",
    [
        ({"w": shape(6, 4)}, lambda params, x: x @ params["w"], (X,), {"w": "in out"}),
        ({"w": shape(4, 6)}, lambda params, x: x @ params["w"].T, (X,), {"w": "out in"}),
        ({"w": shape(4, 6)}, lambda params, x: params["w"] @ x, (shape(6),), {"w": "out in"}),
        (HEADS, heads, (X,), {"q": "in out out", "o": "in in out"}),
        ({"w": shape(3, 6, 6)}, scanned, (X,), {"w": "layer in out"}),
        ({"w": shape(3, 3, 2, 4)}, convolved, (shape(1, 5, 5, 2),), {"w": "in in in out"}),
        (
            {"w": shape(8, 6)},
            lambda params, ids: params["w"][ids],
            (shape(3, dtype="int32"),),
            {"w": "in out"},
        ),
        (
            {"w": shape(8, 6)},
            tied,
            (shape(3, dtype="int32"),),
            {"w": "in out"},
        ),  # contradictory, but LoRA has no sides
        ({"w": shape(6, 4)}, lambda params, x, scale: x @ params["w"] * scale, (X, 2.0), {"w": "in out"}),
        (
            {"w": shape(6, 4, dtype="bfloat16")},
            lambda params, x: x @ params["w"].astype("float32"),
            (X,),
            {"w": "in out"},
        ),
    ],
)
def test_axes_read_off_the_function(params, fn, args, expected):
    delta = lora_jax.lorafy(params, ".*", method=RANK_2, fn=fn, args=args).delta
    assert {path: " ".join(adapter.spec.axes) for path, adapter in adapters(delta).items()} == expected


@pytest.mark.parametrize(
    "axes, expected",
    [
        ("in out out", {"q": "in out out", "o": "in out out"}),  # what the user says is taken at its word
        ({"q": "in out out", "o": "in in out"}, {"q": "in out out", "o": "in in out"}),
        (
            {"q": "in out out", ".*": "in in out"},
            {"q": "in out out", "o": "in in out"},
        ),  # the first match wins
    ],
)
def test_axes_given(axes, expected):
    delta = lora_jax.lorafy(HEADS, ".*", method=RANK_2, axes=axes).delta
    assert {path: " ".join(adapter.spec.axes) for path, adapter in adapters(delta).items()} == expected


def test_given_axes_win_over_those_read():
    delta = lora_jax.lorafy(
        {"w": shape(6, 4)}, "w", method=RANK_2, axes="out in", fn=lambda params, x: x @ params["w"], args=(X,)
    ).delta
    assert delta["w"].spec.axes == ("out", "in")


def test_axes_string_does_not_touch_leaves_that_train_themselves():
    delta = lora_jax.lorafy(
        {"w": shape(3, 6, 6), "b": shape(6)}, {"w": RANK_2, "b": Full()}, axes="layer in out"
    ).delta
    assert delta["w"].spec.axes == ("layer", "in", "out") and delta["b"].shape == (6,)


def looped(params, x):  # stacked in one use, one matrix of two in axes in the other
    return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0] + jnp.einsum(
        "bli,lij->bj", jnp.ones((2, 3, 6)), params["w"]
    )


@pytest.mark.parametrize(
    "params, options, message",
    [
        (
            HEADS,
            {},
            r"axes of 'o', of shape \(2, 4, 6\), are unknown.*Pass `axes=\{'o': '...'\}`.*each of its 3 "
            r"axes, or `fn=`",
        ),
        (
            HEADS,
            {"axes": "in out"},
            r"`axes` for 'o' is 'in out', 2 words, but the leaf has shape \(2, 4, 6\)",
        ),
        (HEADS, {"axes": "in out heads"}, r"'heads' is not one of 'in', 'out', 'layer'"),
        (HEADS, {"axes": "layer out out"}, r"at least one 'in' and one 'out'"),
        (HEADS, {"axes": {"k": "in out out"}}, r"`axes` pattern 'k' matches no leaf. The nearest paths are"),
        (
            {"w": shape(6)},
            {},
            r"'w', of shape \(6,\): fewer than two axes have no low-rank form.*`targets=\{'w': Full\(\)",
        ),
        (
            {"w": shape(6, 6)},
            {"fn": lambda params, x: x + params["w"][:1], "args": (X,)},
            r"axes of 'w'.*cannot be read off `fn`, which does not contract with it as",
        ),
        (
            {"w": shape(6, 6)},
            {"fn": lambda params, x: x, "args": (X,)},
            r"'w', of shape \(6, 6\), but `fn` never contracts with it: `fn` does not use it.*`Full\(\)`",
        ),
        (
            {"w": shape(6, 6)},
            {"fn": lambda params, x: x @ (params["w"] * jnp.tri(6)), "args": (X,)},
            r"'w', of shape \(6, 6\), but `fn` never contracts with it: it goes into `mul` at "
            r".*test_lorafy.py.*what is contracted later is another array",
        ),
        (
            {"w": shape(2, 6)},
            {"fn": lambda params, x: x + params["w"], "args": (X,)},
            r"'w', of shape \(2, 6\), but `fn` never contracts",
        ),
        (
            {"w": shape(2, 6)},
            {"fn": lambda params, x: x + params["w"], "args": (X,), "axes": "in out"},
            r"`fn` never contracts",
        ),
        (
            {"w": shape(3, 6, 6)},
            {"fn": looped, "args": (X,)},
            r"`fn` uses 'w', of shape \(3, 6, 6\), in contradictory ways",
        ),
        (
            {"w": shape(8, 6)},
            {"fn": tied, "args": (shape(3, dtype="int32"),), "method": LoRA(rank=2, blocks=(True, False))},
            r"`fn` uses 'w'.*in contradictory ways",
        ),
        (
            {"w": shape(6, 4)},
            {"method": LoRA(rank=5)},
            r"`rank` is 5, above min\(in, out\) = 4 of 'w', of shape \(6, 4\) with axes 'in out'",
        ),
        ({"w": shape(9, 6, 4)}, {"method": LoRA(rank=5), "axes": "layer in out"}, r"min\(in, out\) = 4"),
        ({"w": shape(6, 2, 4)}, {"method": LoRA(rank=7), "axes": "in out out"}, r"min\(in, out\) = 6"),
        ({"w": shape(6, 12)}, {"method": LoRA(rank=5, blocks=QV)}, r"min\(in, out\) = 4"),
        (
            {"w": shape(6, 10)},
            {"method": LoRA(rank=2, blocks=QV)},
            r"3 entries, which do not divide the out axis of 'w', of size 10",
        ),
        (
            {"w": shape(6, 3, 4)},
            {"method": LoRA(rank=2, blocks=QV), "axes": "in out out"},
            r"exactly one out axis, and 'w' has the axes 'in out out'",
        ),
    ],
)
def test_axes_errors(params, options, message):
    options = {"method": RANK_2, **options}
    with pytest.raises(ValueError, match=message):
        lora_jax.lorafy(params, ".*", **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "`rank` is 0"),
        ({"rank": 2.0}, "`rank` is 2.0"),
        ({"rank": True}, "`rank` is True"),
        ({"dropout": 1.0}, "`dropout` is 1.0"),
        ({"dropout": -0.1}, "`dropout` is -0.1"),
        ({"dropout": "0.1"}, "`dropout` is '0.1'; it must be a number"),
        ({"alpha": float("nan")}, "`alpha` is nan"),
        ({"alpha": "16"}, "`alpha` is '16'; it must be a number"),
        ({"init": "normal"}, "`init` is 'normal'"),
        ({"dtype": "int32"}, "`dtype` is 'int32'"),
        ({"blocks": (False, False)}, "it adapts nothing"),
        ({"blocks": 3}, "`blocks` is 3"),
    ],
)
def test_wrong_methods(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        LoRA(**options)


# --- all-linear ---------------------------------------------------------------------------------------------


def model(params, ids, x):
    h = params["table"][ids] + params["positions"] + x * params["scale"][None]
    h = jnp.tanh(h @ params["kernel"] + params["bias"][None])
    h = heads(params["attn"], h)
    return h @ params["tied"].T + params["tied"][ids].sum()


LINEAR = {
    "table": shape(8, 6),
    "positions": shape(3, 6),  # as large as a matrix, only added
    "scale": shape(6),
    "kernel": shape(6, 6),
    "bias": shape(6),
    "attn": HEADS,
    "tied": shape(8, 6),
    "counter": shape(4, 4, dtype="int32"),
}
LINEAR_ARGS = (shape(3, dtype="int32"), shape(3, 6))


@pytest.mark.parametrize(
    "targets, expected",
    [
        ("all-linear", ["attn/o", "attn/q", "kernel"]),
        (
            ["all-linear", "tied"],
            ["attn/o", "attn/q", "kernel", "tied"],
        ),  # tied to a lookup: only where it is named
        ({"all-linear": RANK_2, "table": LoRA(rank=3)}, ["attn/o", "attn/q", "kernel", "table"]),
    ],
)
def test_all_linear(targets, expected):
    delta = lora_jax.lorafy(LINEAR, targets, method=RANK_2, fn=model, args=LINEAR_ARGS).delta
    assert sorted(adapters(delta)) == expected


def test_all_linear_beside_full():
    delta = lora_jax.lorafy(
        LINEAR, {"all-linear": RANK_2, "bias|scale": Full()}, fn=model, args=LINEAR_ARGS
    ).delta
    assert delta["bias"] == LINEAR["bias"] and delta["scale"] == LINEAR["scale"] and delta["table"] is None


def test_all_linear_of_nothing():
    with pytest.raises(ValueError, match="'all-linear', but `fn` contracts with no floating-point leaf"):
        lora_jax.lorafy(LINEAR, "all-linear", fn=lambda params, x: x, args=(X,))


# --- what adapters start as ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weight, dtype, expected",
    [
        ("float32", None, "float32"),
        ("bfloat16", None, "float32"),
        ("float16", None, "float32"),
        ("float64", None, "float64"),
        ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", jnp.bfloat16, "bfloat16"),
        ("float64", jnp.float32, "float32"),
    ],
)
def test_dtypes(weight, dtype, expected, x64):
    for leaf in (shape(4, 4, dtype=weight), np.ones((4, 4), jnp.dtype(weight)))[
        : 2 if weight != expected else 1
    ]:
        frozen, delta = lora_jax.lorafy({"w": leaf}, "w", method=LoRA(rank=2, dtype=dtype))
        assert {array.dtype.name for array in delta["w"].arrays.values()} == {expected} and frozen[
            "w"
        ] is leaf


def test_numpy_weights():
    weight = np.ones((4, 4))  # float64, which JAX takes as float32 when it is not told otherwise
    frozen, delta = lora_jax.lorafy({"w": weight}, "w", method=RANK_2)
    assert frozen["w"] is weight and delta["w"].arrays["a"].dtype == "float32"


INS, OUTS = 400, 8


@pytest.mark.parametrize(
    "init, sizes, axes, blocks",
    [
        ("gaussian", (OUTS, INS), "out in", None),
        ("gaussian", (3, INS, OUTS), "layer in out", None),  # layers are no fan-in
        ("kaiming", (3, INS, OUTS), "layer in out", None),
        ("kaiming", (4, INS // 4, OUTS), "in in out", None),  # two in axes are
        ("gaussian", (INS, 3 * OUTS), "in out", QV),
    ],
)
def test_initialisation(init, sizes, axes, blocks):
    method = LoRA(rank=OUTS, init=init, blocks=blocks)
    delta = lora_jax.lorafy({"w": np.zeros(sizes, np.float32)}, "w", method=method, axes=axes).delta["w"]
    a = np.asarray(delta.arrays["a"], np.float64)
    assert not np.any(delta.arrays["b"])
    bound = 1 / math.sqrt(INS)
    std = bound if init == "gaussian" else bound / math.sqrt(3)
    # Five standard errors of the mean and (bounded by that of the normal distribution) of the deviation.
    assert abs(a.mean()) < 5 * std / math.sqrt(a.size)
    assert abs(a.std() / std - 1) < 5 / math.sqrt(2 * a.size)
    tail = np.mean(np.abs(a) > 1.5 * std)
    if init == "kaiming":
        assert 0.99 * bound < np.abs(a).max() <= bound and abs(tail - (1 - 1.5 / math.sqrt(3))) < 0.02
    else:
        assert np.abs(a).max() > 2.5 * std and abs(tail - 0.1336) < 0.02
    if "layer" in axes or blocks:  # an independent A each
        groups = a.reshape(a.shape[0], -1)
        correlation = np.corrcoef(groups)[np.triu_indices(len(groups), 1)]
        assert np.all(np.abs(correlation) < 5 / math.sqrt(groups.shape[1]))


PAIR = {"q": jnp.ones((4, 4)), "v": jnp.ones((4, 4)), "o": jnp.ones((4, 6))}


def same(a, b):
    return a.spec.path == b.spec.path and all(
        np.array_equal(a.arrays[name], b.arrays[name]) for name in a.arrays
    )


def test_keys_come_from_paths():
    alone = adapters(lora_jax.lorafy(PAIR, "q", method=RANK_2).delta)["q"]
    others = adapters(lora_jax.lorafy(PAIR, {"o|v": LoRA(rank=3), "q": RANK_2}).delta)
    assert same(alone, others["q"])
    assert not np.array_equal(others["o"].arrays["a"], others["v"].arrays["a"])
    moved = lora_jax.lorafy({"a": jnp.ones((2, 2)), **PAIR}, "q", method=RANK_2).delta["q"]
    assert same(alone, moved)


def test_key():
    default, zero, legacy, other = (
        lora_jax.lorafy(PAIR, "q", method=RANK_2, key=key).delta["q"]
        for key in (None, jax.random.key(0), jax.random.PRNGKey(0), jax.random.key(1))
    )
    assert same(default, zero) and same(zero, legacy) and not same(default, other)


def test_traces():
    """Under `jit` the adapters are those of an eager call, and the weights pass through."""
    eager = lora_jax.lorafy(PAIR, "q", method=RANK_2).delta["q"]
    traced = jax.jit(lambda params: lora_jax.lorafy(params, "q", method=RANK_2).delta)(PAIR)["q"]
    np.testing.assert_allclose(traced.arrays["a"], eager.arrays["a"], rtol=1e-6)
    assert traced.spec == eager.spec
