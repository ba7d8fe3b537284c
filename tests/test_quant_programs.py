"""What a program with quantised weights holds in memory, and what it can be transformed by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from quant_model import near, numbers, randomised

import lora_jax
from benchmarks.live_arrays import most_at_once
from lora_jax import DoRA, LoRA, quantize
from lora_jax.quant import Blocks, from_gguf, nbytes


# --- memory -------------------------------------------------------------------------------------------------

LAYERS, WIDTH = 8, 256
LAYER = WIDTH * WIDTH * 4


def scanned(params, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]


def rematerialised(params, x):
    return lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, params["layers"])[0]


def indexed(params, x):
    for index in range(LAYERS):
        x = jnp.tanh(x @ params["layers"][index])
    return x


def listed(params, x):
    for weight in params["layers"]:
        x = jnp.tanh(x @ weight)
    return x


@pytest.mark.parametrize("method", [LoRA(rank=2), DoRA(rank=2)], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("fn", [scanned, rematerialised, indexed, listed])
def test_no_more_than_one_unpacked_layer_is_in_memory(fn, method):
    """The compiled training step's temporary bytes are those of the same step on a plain base, and one layer
    more. Its text has one array of that size at a time, and one beside it in the loop of DoRA's norms.
    """
    layers = numbers(LAYERS, WIDTH, WIDTH, scale=0.05)
    params = {"layers": list(layers) if fn is listed else layers}
    frozen, delta = lora_jax.lorafy(
        params, "layers.*", method=method, axes=None if fn is listed else "layer in out"
    )
    x = numbers(4, WIDTH)

    def compiled(frozen, of=lambda frozen, delta: lora_jax.combine(frozen, delta), fn=lora_jax.adapt(fn)):
        return compiled_step(lambda delta, frozen, x: fn(of(frozen, delta), x), delta, frozen, x)

    packed = quantize(frozen, "nf4", targets="layers.*")
    assert nbytes(packed) < 0.2 * nbytes(frozen)
    # The plain step of the indexed stack copies every layer of it; the packed one does not, and may not.
    plain = min(temporaries(compiled(frozen)), 2 * LAYER if fn is indexed else np.inf)
    step, merged = compiled(packed), compiled(packed, lora_jax.merge, fn)
    assert temporaries(step) <= plain + 1.6 * LAYER
    assert at_once(step) == (2 if fn is indexed and isinstance(method, DoRA) else 1)
    seen = "the bound does not see that merging inside the loss holds every layer"
    assert temporaries(merged) >= LAYERS * LAYER, seen
    assert fn is not listed or at_once(merged) >= LAYERS, seen


@pytest.mark.parametrize("format", ["int8", "Q4_0", "Q8_0", "Q4_K", "Q6_K"])
def test_every_format_is_unpacked_one_weight_at_a_time(format):
    params = {"layers": list(numbers(LAYERS, WIDTH, WIDTH, scale=0.05))}
    frozen, delta = lora_jax.lorafy(params, "layers.*", method=LoRA(rank=2))
    x, forward = numbers(4, WIDTH), lora_jax.adapt(listed)
    compiled = lambda frozen: compiled_step(
        lambda delta, frozen, x: forward(lora_jax.combine(frozen, delta), x), delta, frozen, x
    )
    if format == "int8":
        packed = quantize(frozen, format, targets="layers.*")
    else:
        kind = Blocks(format)
        zeros = np.zeros((WIDTH, WIDTH // kind.size * kind.width), np.uint8)
        packed = {"layers": [from_gguf(zeros, format) for _ in range(LAYERS)]}
    step = compiled(packed)
    assert at_once(step) == 1
    assert temporaries(step) <= temporaries(compiled(frozen)) + 1.6 * LAYER


def compiled_step(fn, delta, frozen, x):
    loss = lambda delta, frozen, x: jnp.sum(fn(delta, frozen, x) ** 2)
    return jax.jit(jax.value_and_grad(loss)).lower(delta, frozen, x).compile()


def temporaries(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


def at_once(compiled):
    return most_at_once(compiled.as_text(), {WIDTH * WIDTH})


def test_the_trace_holds_packed_arrays_only():
    """Between forward and backward pass no unpacked weight is kept: residuals, however the compiler may
    schedule them.
    """
    params = {"layers": numbers(LAYERS, 64, 64)}
    frozen, delta = lora_jax.lorafy(params, "layers", method=LoRA(rank=2), axes="layer in out")
    packed = quantize(frozen, "nf4")
    forward = lora_jax.adapt(scanned)

    def kept(frozen):
        residuals = jax.vjp(lambda delta: forward(lora_jax.combine(frozen, delta), numbers(4, 64)), delta)[1]
        return [
            leaf.shape
            for leaf in jax.tree.leaves(residuals)
            if leaf.size == LAYERS * 64 * 64 and jnp.issubdtype(leaf.dtype, jnp.floating)
        ]

    assert kept(packed) == []
    assert kept(frozen) != []


# --- transformations ----------------------------------------------------------------------------------------


def test_composes(x64):
    params = {
        "w": numbers(64, 64, dtype="float64"),
        "v": numbers(64, 64, seed=1, dtype="float64"),
    }  # v has no adapter
    frozen, delta = lora_jax.lorafy(params, "w", method=LoRA(rank=2))
    packed, delta = quantize(frozen, "nf4"), randomised(delta)
    x = numbers(5, 64, dtype="float64")
    fn = lambda params, x: jnp.tanh(x @ params["w"]) @ params["v"].T
    merged, adapted = lora_jax.merge(packed, delta), lora_jax.adapt(fn)
    expected = fn(merged, x)
    of = lambda delta, x: adapted(lora_jax.combine(packed, delta), x)
    near(of(delta, x), expected, 1e-12)  # not compiled
    inside = lora_jax.adapt(lambda params, x: lax.cond(x[0, 0] < 99, jax.jit(fn), fn, params, x))
    # A gradient, an adapter for each example, and a gradient for each example.
    slope = jax.grad(lambda delta, x: jnp.sum(of(delta, x) ** 2))
    literal = jax.grad(lambda delta, x: jnp.sum(fn(lora_jax.merge(packed, delta), x) ** 2))
    stacked = lora_jax.stack([delta, randomised(delta, 2)])
    ids = np.array([0, 1, 1, 0, 1])

    @jax.jit
    def composed(delta, stacked, x):
        looped = lax.fori_loop(0, 3, lambda _, total: total + of(delta, x), jnp.zeros_like(x))
        outputs = (
            of(delta, x),
            jax.checkpoint(of)(delta, x),
            jax.vmap(of, (None, 0))(delta, x),
            looped / 3,
            inside(lora_jax.combine(packed, delta), x),
        )
        # The gradient with respect to the input passes through both weights.
        gradients = (
            slope(delta, x),
            jax.vmap(slope, (None, 0))(delta, x[:, None]),
            jax.jacrev(of, 1)(delta, x),
        )
        return outputs, gradients, jax.vmap(of)(lora_jax.take(stacked, ids), x)

    @jax.jit
    def of_merged(delta, stacked, x):
        plain = lambda delta, x: fn(lora_jax.merge(packed, delta), x)
        gradients = literal(delta, x), jax.vmap(literal, (None, 0))(delta, x[:, None])
        return (*gradients, jax.jacrev(plain, 1)(delta, x)), jax.vmap(plain)(lora_jax.take(stacked, ids), x)

    outputs, *found = composed(delta, stacked, x)
    for output in outputs:
        near(output, expected, 1e-12)
    jax.tree.map(lambda a, b: near(a, b, 1e-11), tuple(found), of_merged(delta, stacked, x))


def test_a_loop_of_the_users_own_slices_the_stack():
    params = {"layers": numbers(LAYERS, 64, 64, scale=0.1)}
    frozen, delta = lora_jax.lorafy(params, "layers", method=DoRA(rank=2), axes="layer in out")
    packed, delta = quantize(frozen, "nf4"), randomised(delta)
    layer, x = lora_jax.adapt(lambda params, x: jnp.tanh(x @ params["layers"])), numbers(4, 64)
    found = lax.scan(lambda x, trees: (layer(lora_jax.combine(*trees), x), None), x, (packed, delta))[0]
    near(found, scanned(lora_jax.merge(packed, delta), x), 1e-5)


def test_compiled_once():
    params = {"w": numbers(64, 64)}
    frozen, delta = lora_jax.lorafy(params, "w", method=LoRA(rank=2))
    packed, traces = quantize(frozen, "nf4"), []

    def fn(params, x):
        traces.append(1)
        return x @ params["w"]

    step = jax.jit(lambda delta, packed, x: lora_jax.adapt(fn)(lora_jax.combine(packed, delta), x))
    for seed in range(3):
        step(randomised(delta, seed), packed, numbers(4, 64, seed=seed))
    assert len(traces) == 1 and step._cache_size() == 1


@pytest.mark.parametrize("method", [LoRA(rank=2), DoRA(rank=2)], ids=["LoRA", "DoRA"])
def test_a_batch_of_examples_unpacks_a_weight_once(method):
    """Also with an adapter for each, forwards and backwards."""
    params = {"w": numbers(128, 96)}
    frozen, delta = lora_jax.lorafy(params, "w", method=method)
    packed, x = quantize(frozen, "nf4"), numbers(32, 128)
    forward = lora_jax.adapt(lambda params, x: x @ params["w"])
    loss = lambda delta, x: jnp.sum(forward(lora_jax.combine(packed, delta), x) ** 2)
    many = lora_jax.take(lora_jax.stack([delta, randomised(delta)]), jnp.arange(32) % 2)
    shared = str(jax.make_jaxpr(jax.vmap(jax.grad(loss, (0, 1)), (None, 0)))(delta, x))
    assert "[32,128,96]" not in shared and "[32,12288]" not in shared
    if not isinstance(method, DoRA):  # whose norm is of each adapter's own sum
        apart = str(jax.make_jaxpr(jax.vmap(jax.grad(loss, (0, 1))))(many, x))
        assert "[32,128,96]" not in apart and "[32,12288]" not in apart
    found = jax.jit(jax.vmap(lambda delta, x: forward(lora_jax.combine(packed, delta), x)))(many, x)
    for row in (0, 1):
        near(
            found[row::2],
            x[row::2]
            @ lora_jax.merge(packed, lora_jax.take(lora_jax.stack([delta, randomised(delta)]), row))["w"],
            1e-5,
        )


def test_the_adapters_say_what_is_stacked():
    """Heads and convolutions are packed as one, so that nothing but the layers is apart."""
    shape = {
        "heads": jax.ShapeDtypeStruct((768, 12, 64), "float32"),
        "stack": jax.ShapeDtypeStruct((3, 768, 12, 64), "float32"),
    }
    frozen, delta = lora_jax.lorafy(
        shape, ".*", method=LoRA(rank=2), axes={"heads": "in out out", "stack": "layer in out out"}
    )
    packed = quantize(frozen, "int8", delta=delta)
    assert (packed["heads"].stack, packed["stack"].stack) == ((), (3,))
    assert 8 * nbytes(packed) / sum(leaf.size for leaf in packed.values()) < 8.01
    for leaf in quantize(
        frozen, "nf4"
    ).values():  # without adapters at hand, all but two axes are apart: a little more
        assert 8 * nbytes(leaf) / leaf.size < 4.25


def test_layers_are_packed_one_by_one():
    stack = numbers(3, 64, 64)
    packed = quantize({"w": stack}, "nf4", targets="w")["w"]
    for index in range(3):
        alone = quantize({"w": stack[index]}, "nf4", targets="w")["w"]
        jax.tree.map(
            np.testing.assert_array_equal,
            packed.along_stack(lambda array, index=index: array[index]).arrays,
            alone.arrays,
        )
