"""`lorafy`: which leaves a target names, in which trees, and what is counted from shapes alone."""

import dataclasses
from functools import partial

import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from shapes import adapters, QV, RANK_2, shape

import lora_jax
from lora_jax import Full, LoRA


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
