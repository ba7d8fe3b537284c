"""GGUF's blocks that stay packed: bit for bit gguf's values, and every use equals that of the plain
weights.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gguf_files import data_of, gguf as package, needs_real, PACKABLE, REAL, write
from quant_model import randomised

import lora_jax
from lora_jax import DoRA, LoRA
from lora_jax._tree.nodes import is_node
from lora_jax.interop import gguf, hf, peft
from lora_jax.quant import Blocks, from_gguf, nbytes, Packed
from lora_jax.sharding import frozen_specs, gather_codes, partition_specs, shardings


IDS = np.array([[3, 14, 15, 92, 65, 35, 89, 79], [1, 2, 3, 4, 5, 6, 7, 8]])
LAYERS = "layers/.*kernel"


# -- values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PACKABLE)
def test_values_are_gguf_s_bit_for_bit(kind):
    """Of random bytes, so that every code, sign and size of scale is among them; NaN and infinity too."""
    type_ = package.GGMLQuantizationType[kind]
    _, width = package.GGML_QUANT_SIZES[type_]
    data = np.random.default_rng(0).integers(0, 256, (3, 256, 4 * width), np.uint8)
    with np.errstate(all="ignore"):
        expected = package.dequantize(data, type_)
    assert 0.9 < np.isfinite(expected).mean() < 1
    unpacked = from_gguf(data, kind)
    assert unpacked.stack == (3,) and unpacked.shape == (3, *expected.shape[:0:-1])
    for found in (unpacked.value(), jax.jit(lambda packed: packed.value())(unpacked)):
        found = np.swapaxes(np.asarray(found), 1, 2)
        same = (found.view(np.int32) == expected.view(np.int32)) | np.isnan(found) & np.isnan(expected)
        assert same.all()
    turned = from_gguf(data[0], kind, transpose=False, dtype="bfloat16")
    finite = np.isfinite(expected[0])
    np.testing.assert_array_equal(
        np.asarray(turned.value())[finite], np.asarray(jnp.asarray(expected[0], jnp.bfloat16))[finite]
    )


def test_bytes_a_weight():
    for kind, bits in {"Q4_0": 4.5, "Q4_1": 5, "Q8_0": 8.5, "Q4_K": 4.5, "Q6_K": 6.5625}.items():
        packed = from_gguf(data_of((64, 512), kind, 0), kind)
        assert 8 * nbytes(packed) / packed.size == bits


def test_errors():
    with pytest.raises(ValueError, match="`kind` is 'IQ2_S'; blocks of Q4_0, .*Q6_K may stay packed"):
        Blocks("IQ2_S")
    with pytest.raises(
        ValueError, match=r"`data` is uint8\[4, 35\]; of Q8_0, rows of whole blocks of 34 bytes"
    ):
        from_gguf(np.zeros((4, 35), np.uint8), "Q8_0")
    with pytest.raises(ValueError, match="'w' cannot be quantised: GGUF's blocks are read, not made here"):
        lora_jax.quantize({"w": jnp.ones((4, 32))}, Blocks("Q8_0"), targets="w")


# -- models --------------------------------------------------------------------------------------------------


def loaded(tmp_path, kinds=("Q8_0",), **options):
    """The model, packed parameters, and plain ones."""
    file = tmp_path / "model.gguf"
    # Round over token_embd, q, k, v, output, gate, up, down.
    write(file, kinds=kinds)
    model, params = gguf.load(file, packed=True, **options)
    return model, params, gguf.load(file, **options)[1]


def plain(tree):
    return jax.tree.map(
        lambda leaf: leaf.value() if isinstance(leaf, Packed) else leaf, tree, is_leaf=is_node
    )


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("kind", PACKABLE)
def test_packed_is_dequantised(kind, scan, tmp_path):
    """With query and key in Hugging Face's order: whole rows move."""
    _, params, expected = loaded(tmp_path, kinds=("F16", *[kind] * 7, *[kind] * 7), scan=scan)
    packed = {path for path, leaf in named(params) if isinstance(leaf, Packed)}
    assert len(packed) == (7 if scan else 14)
    assert all("_proj/kernel" in path for path in packed)
    jax.tree.map(np.testing.assert_array_equal, plain(params), expected)


def named(params):
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_node)
    return [("/".join(str(key.key) for key in path), leaf) for path, leaf in leaves]


@pytest.mark.parametrize("method", [LoRA(rank=2), DoRA(rank=2)], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("scan", [False, True])
def test_a_step_beside_packed_weights(method, scan, tmp_path):
    """Loss, gradient and updated adapters equal those beside the dequantised weights."""
    kinds = ("F16", *PACKABLE[:7], *(PACKABLE[:7] if scan else PACKABLE[1:]))
    model, params, expected = loaded(tmp_path, kinds=kinds, scan=scan)
    axes = "layer in out" if scan else None
    tx = optax.sgd(0.1)
    forward = lora_jax.adapt(model.apply)

    @jax.jit
    def step(frozen, delta, state):
        def loss(delta):
            logits = forward({"params": lora_jax.combine(frozen, delta)}, jnp.asarray(IDS))
            return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 0])

        value, gradient = jax.value_and_grad(loss)(delta)
        updates, state = tx.update(gradient, state, delta)
        return value, optax.apply_updates(delta, updates)

    results = []
    for tree in (params, expected):
        frozen, delta = lora_jax.lorafy(tree, LAYERS, method=method, axes=axes)
        delta = randomised(delta)
        results.append((*step(frozen, delta, tx.init(delta)), lora_jax.merge(frozen, delta)))
    (value, delta, merged), (other, reference, whole) = results
    np.testing.assert_allclose(value, other, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-5), delta, reference)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), merged, whole)


def test_what_takes_packed_weights(tmp_path):
    """Exports merge them, or leave them out, as they do NF4's."""
    model, params, expected = loaded(tmp_path, kinds=("F16", "Q4_K", "Q6_K"))
    frozen, delta = lora_jax.lorafy(params, "(q|v)_proj/kernel", method=LoRA(rank=2))
    delta = randomised(delta)
    merged = lora_jax.merge(lora_jax.lorafy(expected, "(q|v)_proj/kernel", method=LoRA(rank=2)).frozen, delta)
    hf.save(tmp_path / "merged", model, lora_jax.combine(frozen, delta))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7),
        hf.load(tmp_path / "merged")[1],
        merged,
    )
    peft.save(tmp_path / "adapter", model, frozen, delta)
    again = peft.load(tmp_path / "adapter", model, params)
    jax.tree.map(np.testing.assert_array_equal, again.delta, delta)
    assert lora_jax.count(delta) == lora_jax.count(again.delta)


def test_cast_and_chosen(tmp_path):
    file = tmp_path / "model.gguf"
    write(file, kinds=("Q8_0", "Q4_0"), tied=False)
    model, params = gguf.load(
        file, packed=["embed_tokens/embedding", "lm_head/kernel"], param_dtype=jnp.bfloat16
    )
    packed = {path: leaf for path, leaf in named(params) if isinstance(leaf, Packed)}
    assert set(packed) == {"embed_tokens/embedding", "lm_head/kernel"}
    expected = gguf.load(file, param_dtype=jnp.bfloat16)[1]
    jax.tree.map(np.testing.assert_array_equal, plain(params), expected)
    forward = jax.jit(lora_jax.adapt(model.apply))
    np.testing.assert_allclose(
        *(np.asarray(forward({"params": tree}, jnp.asarray(IDS)), np.float32) for tree in (params, expected)),
        rtol=0.05,
        atol=0.05,
    )
    seen = []
    gguf.load(file, packed="o_proj/kernel", place=lambda path, array: seen.append((path, array)))
    assert dict(seen)["layers/0/self_attn/o_proj/kernel"].dtype == np.uint8
    assert dict(seen)["layers/0/self_attn/q_proj/kernel"].dtype == np.float32


def test_refused(tmp_path):
    file = tmp_path / "model.gguf"
    write(file, kinds=("F16", "Q4_K", "Q6_K"))
    with pytest.raises(ValueError, match=r"'layers/.*kernel', whose layers .*Q4_K, Q6_K.*scan=False"):
        gguf.load(file, packed=True, scan=True)
    gguf.load(file, packed=True)
    write(file, kinds=("F16", "IQ4_NL"))
    with pytest.raises(
        ValueError, match="`packed` names '.*kernel', which is stored as IQ4_NL; packed may stay Q4_0"
    ):
        gguf.load(file, packed=True)
    with pytest.raises(ValueError, match="`targets` pattern 'query' matches no leaf"):
        gguf.load(file, packed="query")
    write(file, kinds=("F16",))
    assert not any(isinstance(leaf, Packed) for _, leaf in named(gguf.load(file, packed=True)[1]))


# -- memory and meshes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [LoRA(rank=2), DoRA(rank=2)], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("scan", [False, True])
def test_no_more_than_one_unpacked_weight_is_in_memory(scan, kind, method):
    """The compiled step's temporary bytes: those beside plain weights, and one weight more. Newer versions of
    XLA for the CPU unpack the weight of the first product before DoRA's norms, and keep it meanwhile.
    """
    layers, width = 8, 256
    size = 4 * width * width
    stacked = from_gguf(np.stack([data_of((width, width), kind, seed) for seed in range(layers)]), kind)
    base = stacked if scan else [stacked.along_stack(lambda array: array[i]) for i in range(layers)]

    def fn(params, x):
        if scan:
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]
        return functools.reduce(lambda x, w: jnp.tanh(x @ w), params["layers"], x)

    def temporaries(params, of, fn):
        frozen, delta = lora_jax.lorafy(
            params, "layers.*", method=method, axes="layer in out" if scan else None
        )
        loss = lambda delta, frozen, x: jnp.sum(fn(of(frozen, delta), x) ** 2)
        step = jax.jit(jax.value_and_grad(loss)).lower(delta, frozen, jnp.ones((4, width)))
        return step.compile().memory_analysis().temp_size_in_bytes

    adapted = lora_jax.adapt(fn)
    beside = temporaries({"layers": base}, lora_jax.combine, adapted)
    more = 1.6 if scan or isinstance(method, LoRA) else 2.1
    assert beside <= temporaries(plain({"layers": base}), lora_jax.combine, adapted) + more * size
    assert temporaries({"layers": base}, lora_jax.merge, fn) >= layers * size


@pytest.mark.parametrize("scan", [False, True])
def test_on_a_mesh(scan, tmp_path):
    """Codes are split, and gathered as codes."""
    model, params, expected = loaded(tmp_path, kinds=("F16", *["Q8_0"] * 14), scan=scan)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4, 1), ("data", "fsdp", "tensor"))
    _, split = gguf.load(tmp_path / "model.gguf", packed=True, scan=scan, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, split, params)
    kernel = dict(named(split))[
        "layers/self_attn/q_proj/kernel" if scan else "layers/1/self_attn/q_proj/kernel"
    ]
    codes = kernel.arrays["codes"]
    assert codes.addressable_shards[0].data.size == codes.size // 4
    specs = partition_specs(dict(expected), model.partition_rules)
    gathered = gather_codes(split, specs, mesh)
    placed = shardings(mesh, frozen_specs(gathered, specs), gathered)
    gathered = jax.device_put(gathered, placed)
    forward = jax.jit(lora_jax.adapt(model.apply))
    ids = jax.device_put(jnp.asarray(IDS), jax.NamedSharding(mesh, jax.P("data")))
    reference = model.apply({"params": expected}, jnp.asarray(IDS))
    for tree in (split, gathered):
        np.testing.assert_allclose(forward({"params": tree}, ids), reference, atol=2e-4)
    program = forward.lower({"params": gathered}, ids).compile().as_text()
    sent = re.findall(r"= (\w+)\[[\d,]*\]\S* all-gather\(", program)
    assert sent == ["u8"] * (7 if scan else 14)


# -- the real model ------------------------------------------------------------------------------------------


@needs_real
@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_the_real_model(scan):
    model, params = gguf.load(REAL, packed=True, scan=scan)
    assert nbytes(params["layers"]) < 0.17 * 4 * sum(leaf.size for _, leaf in named(params["layers"]))
    expected = gguf.load(REAL, scan=scan)[1]
    jax.tree.map(np.testing.assert_array_equal, plain(params["layers"]), expected["layers"])
    ids = jnp.array([[504, 3575, 282, 4649, 314]])  # The capital of France is
    found = jax.jit(lora_jax.adapt(model.apply))({"params": params}, ids)
    reference = jax.jit(model.apply)({"params": expected}, ids)
    np.testing.assert_allclose(found, reference, atol=1e-5 * np.abs(reference).max())
    assert found[0, -1].argmax() == 7042  # Paris
