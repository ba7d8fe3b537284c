"""Unmodified models of Flax linen, Flax NNX and Equinox, adapted by "all-linear" with their axes read off
the function.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from formation import formed

import lora_jax
from lora_jax import LoRA
from lora_jax._tree.nodes import Adapter


pytestmark = pytest.mark.usefixtures("relaxed_promotion")


@dataclasses.dataclass(frozen=True)
class Model:
    """`fn(params, *inputs)`, and the axes of every leaf that "all-linear" should find, by path."""

    params: Any
    fn: Callable
    inputs: tuple
    linear: dict[str, str]


def _numbers(*shape):
    return jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)


_TOKENS = jnp.array([[3, 1, 4], [1, 5, 9]])


# --- Flax linen ---------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention from `DenseGeneral` heads, and the module that Flax has for it."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
        heads = nn.DenseGeneral((2, 4), dtype=self.dtype, name="heads")(h)
        h = nn.DenseGeneral(8, axis=(-2, -1), dtype=self.dtype, name="merge")(nn.gelu(heads))
        return x + nn.MultiHeadDotProductAttention(num_heads=2, dtype=self.dtype, name="attention")(h)


ATTENTION = {"heads": "in out out", "merge": "in in out"} | {
    f"attention/{name}": axes
    for name, axes in {
        "query": "in out out",
        "key": "in out out",
        "value": "in out out",
        "out": "in in out",
    }.items()
}


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8, name="embed")
        x = nn.Dense(8, name="dense")(embed(tokens))
        return embed.attend(Attention(name="block")(x))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(8, name="dense")(Attention(name="attention")(x)), None


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        return scanned(name="layers")(x, None)[0]


class Images(nn.Module):
    """A convolutional network: strided, depthwise, grouped and dilated, transposed."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(2, name="norm")(nn.Conv(4, (3, 3), strides=2, name="strided")(x)))
        x = nn.Conv(4, (3, 3), feature_group_count=4, name="depthwise")(x)
        x = nn.Conv(6, (3, 3), feature_group_count=2, kernel_dilation=2, name="grouped")(x)
        x = nn.ConvTranspose(5, (2, 2), strides=(2, 2), name="transposed")(x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class Recurrent(nn.Module):
    """Its cell joins the kernels of its gates at run time."""

    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.OptimizedLSTMCell(6))(x)


def _drawn(shapes):
    """Parameters of these shapes, in NumPy: a module's own start compiles each of its draws."""
    rng = np.random.default_rng(4)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / leaf.shape[-1] ** 0.5, leaf.dtype), shapes
    )


def _linen(module, linear, *inputs):
    params = _drawn(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])
    return Model(
        params,
        lambda params, *inputs: module.apply({"params": params}, *inputs),
        inputs,
        {f"{path}/kernel": axes for path, axes in linear.items()},
    )


def _decoding():
    """One step with a cache, which is another collection of variables and changes."""
    module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, decode=True)
    variables = jax.jit(module.init)(jax.random.key(0), _numbers(2, 3, 8))

    def step(params, x):
        return module.apply({"params": params, "cache": variables["cache"]}, x, mutable=["cache"])

    linear = {f"{name}/kernel": "in out out" for name in ("query", "key", "value")} | {
        "out/kernel": "in in out"
    }
    return Model(variables["params"], step, (_numbers(2, 1, 8),), linear)


# --- Flax NNX -----------------------------------------------------------------------------------------------


class Transformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, 8, decode=False, rngs=rngs)
        self.linear = nnx.Linear(8, 12, rngs=rngs)
        self.general = nnx.LinearGeneral(12, (2, 4), rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        return self.general(nnx.relu(self.linear(x + self.attention(self.norm(x)))))


TRANSFORMER = {f"attention/{name}/kernel": "in out out" for name in ("query", "key", "value")} | {
    "attention/out/kernel": "in in out",
    "linear/kernel": "in out",
    "general/kernel": "in out out",
}


class NnxImages(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.second = nnx.Conv(4, 4, (3, 3), feature_group_count=2, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(nnx.relu(self.norm(self.first(x)))))


def _nnx_state():
    graph, params, rest = nnx.split(Transformer(nnx.Rngs(0)), nnx.Param, ...)
    return Model(
        params, lambda params, tokens: nnx.merge(graph, params, rest)(tokens), (_TOKENS,), TRANSFORMER
    )


def _nnx_module():
    """The module itself is a pytree."""
    linear = {"first/kernel": "in in in out", "second/kernel": "in in in out"}
    return Model(NnxImages(nnx.Rngs(0)), lambda module, x: module(x), (_numbers(2, 5, 5, 3),), linear)


# --- Equinox ------------------------------------------------------------------------------------------------


def _equinox_mlp():
    """Weights stored (out, in), and leaves that are functions."""
    linear = {f"layers/{index}/weight": "out in" for index in range(3)}
    return Model(
        eqx.nn.MLP(5, 3, 8, 2, key=jax.random.key(0)),
        lambda mlp, x: jax.vmap(mlp)(x),
        (_numbers(4, 5),),
        linear,
    )


def _equinox_attention():
    keys = jax.random.split(jax.random.key(0), 4)
    model = {
        "embed": eqx.nn.Embedding(11, 8, key=keys[0]),
        "norm": eqx.nn.LayerNorm(8),
        "attention": eqx.nn.MultiheadAttention(2, 8, key=keys[1]),
        "head": eqx.nn.Linear(8, 11, key=keys[2]),
    }

    def one(model, tokens):
        x = jax.vmap(model["norm"])(jax.vmap(model["embed"])(tokens))
        return jax.vmap(model["head"])(x + model["attention"](x, x, x))

    linear = {f"attention/{name}_proj/weight": "out in" for name in ("query", "key", "value", "output")} | {
        "head/weight": "out in"
    }
    return Model(
        model, lambda model, tokens: jax.vmap(one, in_axes=(None, 0))(model, tokens), (_TOKENS,), linear
    )


def _equinox_images():
    keys = jax.random.split(jax.random.key(0), 2)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(3, 4, 3, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Conv2d(4, 6, 3, groups=2, key=keys[1]),
        ]
    )
    linear = {f"layers/{index}/weight": "out in in in" for index in (0, 2)}
    return Model(model, lambda model, x: jax.vmap(model)(x), (_numbers(2, 3, 6, 6),), linear)


def _equinox_recurrent():
    cell = eqx.nn.GRUCell(5, 6, key=jax.random.key(0))

    def run(cell, xs):
        return jax.lax.scan(lambda state, x: (cell(x, state), None), jnp.zeros(6), xs)[0]

    return Model(cell, run, (_numbers(4, 5),), {"weight_ih": "out in", "weight_hh": "out in"})


MODELS = {
    "linen tied embedding": lambda: _linen(
        Tied(), {"dense": "in out"} | {f"block/{path}": axes for path, axes in ATTENTION.items()}, _TOKENS
    ),
    "linen scan and remat": lambda: _linen(
        Layers(),
        {"layers/dense": "layer in out"}
        | {f"layers/attention/{path}": f"layer {axes}" for path, axes in ATTENTION.items()},
        _numbers(2, 3, 8),
    ),
    "linen convolutions": lambda: _linen(
        Images(),
        {name: "in in in out" for name in ("strided", "depthwise", "grouped", "transposed")}
        | {"head": "in out"},
        _numbers(2, 6, 6, 3),
    ),
    "linen joined LSTM": lambda: _linen(
        Recurrent(),
        {f"OptimizedLSTMCell_0/{side}{gate}": "in out" for side in "ih" for gate in "ifgo"},
        _numbers(2, 4, 5),
    ),
    "linen decoding": _decoding,
    "nnx state": _nnx_state,
    "nnx module": _nnx_module,
    "equinox MLP": _equinox_mlp,
    "equinox attention": _equinox_attention,
    "equinox convolutions": _equinox_images,
    "equinox GRU": _equinox_recurrent,
}


def _arrays(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]


def _adapt(model):
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), model.inputs)
    # LoRA leaves the parameters as they are, so shapes do, of which nothing is compiled.
    of_shape = lambda leaf: (
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array) else leaf
    )
    params = jax.tree.map(of_shape, model.params)
    _, delta = lora_jax.lorafy(params, "all-linear", method=LoRA(rank=1, alpha=1), fn=model.fn, args=shapes)
    frozen = model.params
    adapters = [
        leaf
        for leaf in jax.tree.leaves(delta, is_leaf=lambda leaf: isinstance(leaf, Adapter))
        if isinstance(leaf, Adapter)
    ]
    assert {adapter.spec.path: " ".join(adapter.spec.axes) for adapter in adapters} == model.linear
    rng = np.random.default_rng(3)
    delta = jax.tree.map(lambda array: jnp.asarray(0.3 * rng.normal(size=array.shape), array.dtype), delta)
    explanation = lora_jax.explain(model.fn, lora_jax.combine(frozen, delta), *shapes)
    assert not explanation.formed and not explanation.unused and not explanation.contradictory, explanation
    return frozen, delta


@pytest.mark.parametrize("name", MODELS)
def test_equal_to_merged(name):
    model = MODELS[name]()
    frozen, delta = _adapt(model)

    def of(fn, join):
        def loss(delta):
            outputs = _arrays(fn(join(frozen, delta), *model.inputs))
            return sum(
                jnp.sum(jnp.sin(output)) for output in outputs if jnp.issubdtype(output.dtype, jnp.floating)
            ), outputs

        return jax.grad(loss, has_aux=True)

    adapted = of(lora_jax.adapt(model.fn), lora_jax.combine)
    both = jax.jit(lambda delta: (adapted(delta), of(model.fn, lora_jax.merge)(delta)))(delta)
    for left, right in zip(*map(_arrays, both), strict=True):
        np.testing.assert_allclose(left, right, rtol=2e-4, atol=2e-4 * max(1.0, float(jnp.abs(right).max())))

    # Nothing of the size of a weight is computed from anything but that weight.
    weights = [leaf for leaf, pair in zip(*_paired(frozen, delta), strict=True) if isinstance(pair, Adapter)]
    flat, treedef = jax.tree.flatten(frozen)
    positions = [index for index, leaf in enumerate(flat) if any(leaf is weight for weight in weights)]

    def forward(*arrays):
        leaves = list(flat)
        for position, array in zip(positions, arrays, strict=True):
            leaves[position] = array
        return _arrays(
            lora_jax.adapt(model.fn)(
                lora_jax.combine(jax.tree.unflatten(treedef, leaves), delta), *model.inputs
            )
        )

    jaxpr = jax.make_jaxpr(forward)(*weights)
    largest = max(weight.size for weight in weights)
    assert not formed(jaxpr, range(len(weights)), largest), name


def _paired(frozen, delta):
    is_leaf = lambda leaf: leaf is None or isinstance(leaf, Adapter)
    return jax.tree.leaves(frozen, is_leaf=is_leaf), jax.tree.leaves(delta, is_leaf=is_leaf)


def test_bfloat16():
    """A bfloat16 model with float32 A and B: as near to the merged one as its own rounding."""
    module = Attention(dtype=jnp.bfloat16)
    model = _linen(module, ATTENTION, _numbers(2, 3, 8).astype(jnp.bfloat16))
    model = dataclasses.replace(
        model, params=jax.tree.map(lambda array: array.astype(jnp.bfloat16), model.params)
    )
    frozen, delta = _adapt(model)
    assert {array.dtype for array in jax.tree.leaves(delta)} == {jnp.dtype(jnp.float32)}
    adapted, merged = jax.jit(
        lambda delta: (
            lora_jax.adapt(model.fn)(lora_jax.combine(frozen, delta), *model.inputs),
            model.fn(lora_jax.merge(frozen, delta), *model.inputs),
        )
    )(delta)
    assert adapted.dtype == merged.dtype == jnp.bfloat16
    adapted, merged = (np.asarray(array, np.float32) for array in (adapted, merged))
    np.testing.assert_allclose(adapted, merged, rtol=0, atol=2**-6 * np.abs(merged).max())
