"""Specs: rules for weights, adapters that follow their weight, and meshes that do not divide."""

import dataclasses
import math
import re

import encoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from safetensors.numpy import load_file, save_file

import lora_jax
from lora_jax._paths import named_leaves
from lora_jax.interop import hf
from lora_jax.models.gpt2 import GPT2, GPT2Config
from lora_jax.quant import NF4, Packed
from lora_jax.sharding import delta_specs, frozen_specs, gather_codes, partition_specs, shardings


CONFIG = GPT2Config(vocab_size=29, n_positions=16, n_embd=8, n_layer=2, n_head=2)


def gpt2_shapes(**options):
    return jax.eval_shape(GPT2(CONFIG, **options).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))[
        "params"
    ]


def by_path(tree):
    return dict(named_leaves(tree))


def test_gpt2_rules_with_and_without_stacked_layers():
    flat, stacked = (
        by_path(partition_specs(gpt2_shapes(), GPT2.partition_rules)),
        by_path(partition_specs(gpt2_shapes(scan=True), GPT2.partition_rules)),
    )
    assert flat["h/1/attn/c_attn/kernel"] == P("fsdp", "tensor")
    assert flat["h/1/mlp/c_proj/kernel"] == P("tensor", "fsdp")
    assert flat["wte/embedding"] == P(None, ("fsdp", "tensor"))
    assert flat["h/1/ln_1/scale"] == flat["h/1/attn/c_attn/bias"] == P()
    assert stacked["h/attn/c_attn/kernel"] == P(None, "fsdp", "tensor")
    assert stacked["h/mlp/c_proj/kernel"] == P(None, "tensor", "fsdp")


def test_first_rule_wins_and_long_specs_are_refused():
    params = {"a": {"kernel": jnp.zeros((2, 4))}, "b": {"kernel": jnp.zeros((2, 4))}}
    specs = partition_specs(params, {"a/kernel": P("fsdp"), "kernel": P("tensor", None)})
    assert specs == {"a": {"kernel": P(None, "fsdp")}, "b": {"kernel": P("tensor", None)}}
    with pytest.raises(ValueError, match="give 'a/kernel' the spec .* of 3 entries, but its shape is"):
        partition_specs(params, {"kernel": P(None, None, "fsdp")})


@pytest.mark.parametrize("scan", [False, True])
def test_adapters_follow_their_weight(scan):
    params = gpt2_shapes(scan=scan)
    axes = "layer in out" if scan else "in out"
    methods = {
        "attn/c_attn/kernel": lora_jax.LoRA(rank=2, blocks=(True, False, True)),
        "c_proj/kernel": lora_jax.LoRA(rank=2),
        "ln_f/scale": lora_jax.Full(),
    }
    _, delta = lora_jax.lorafy(params, methods, axes={"c_attn/kernel|c_proj/kernel": axes})
    specs = delta_specs(
        delta, partition_specs(params, {**dict(GPT2.partition_rules), "ln_f/scale": P("fsdp")})
    )
    assert jax.tree.structure(specs) == jax.tree.structure(delta)
    found, layer, lead = by_path(specs), "h" if scan else "h/0", (None,) if scan else ()
    assert found[f"{layer}/attn/c_attn/kernel/a"] == P(*lead, None, "fsdp", None)
    assert found[f"{layer}/attn/c_attn/kernel/b"] == P(*lead, None, None, None), (
        "a block of the out axis is not that axis"
    )
    assert found[f"{layer}/mlp/c_proj/kernel/a"] == P(*lead, "tensor", None)
    assert found[f"{layer}/mlp/c_proj/kernel/b"] == P(*lead, None, "fsdp")
    assert found["ln_f/scale"] == P("fsdp")


def test_a_mesh_that_does_not_divide():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("fsdp", "tensor"))
    fine = {"w": jnp.zeros((4, 8))}
    placed = jax.device_put(fine, shardings(mesh, {"w": P("fsdp", "tensor")}, fine))
    assert placed["w"].addressable_shards[0].data.shape == (2, 2)
    with pytest.raises(
        ValueError,
        match=(
            r"does not divide 'w': axis 0 of its shape \(6,\) would be split into 8 parts .*; 1, 2, 3, 6 "
            r"would do"
        ),
    ):
        shardings(mesh, {"w": P(("fsdp", "tensor"))}, {"w": jnp.zeros(6)})


# --- weights that are split as they are read ----------------------------------------------------------------


def every_mesh(count=8):
    """Every way of giving 8 devices to the three axes."""
    sizes = [size for size in range(1, count + 1) if count % size == 0]
    return [
        (data, fsdp, count // data // fsdp) for data in sizes for fsdp in sizes if count % (data * fsdp) == 0
    ]


def mesh_of(shape):
    return Mesh(np.array(jax.devices()[:8]).reshape(shape), ("data", "fsdp", "tensor"))


_BIG = {"vocab_size": 40, "hidden_size": 32, "num_attention_heads": 8, "intermediate_size": 64}
MODELS = {
    "gpt2": GPT2(GPT2Config(vocab_size=29, n_positions=16, n_embd=32, n_layer=2, n_head=8)),
    "bert": encoders.ours(encoders.changed(encoders.BERT, **_BIG), "sequence_classification"),
    "roberta": encoders.ours(encoders.changed(encoders.ROBERTA, **_BIG), "sequence_classification"),
    "deberta": encoders.ours(encoders.changed(encoders.DEBERTA, **_BIG), "masked_lm"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    dir = tmp_path_factory.mktemp("models")
    for name, model in MODELS.items():
        hf.save(dir / name, model, encoders.random_params(model), shard_bytes=50_000)
    return dir


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_weights_are_split_as_they_are_read(saved, name, scan):
    model, whole = hf.load(saved / name, scan=scan)
    mesh = mesh_of((2, 2, 2))
    _, params = hf.load(saved / name, scan=scan, mesh=mesh)
    specs = partition_specs(whole, model.partition_rules)
    for (path, one), other, sharding in zip(
        named_leaves(whole),
        jax.tree.leaves(params),
        jax.tree.leaves(shardings(mesh, specs, whole)),
        strict=True,
    ):
        assert other.sharding == sharding and np.array_equal(one, other), path
    # All large weights have a rule: a device holds little more than a quarter, what is split by both fsdp and
    # tensor.
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))
    matrices = [(path, leaf) for path, leaf in named_leaves(params) if leaf.size >= 1000]
    assert all(
        leaf.addressable_shards[0].data.size * 4 == leaf.size
        for path, leaf in matrices
        if "bias" not in path and "scale" not in path
    )
    assert held < 0.4 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_a_device_reads_its_own_part_alone(saved, monkeypatch):
    """Of a matrix over two devices, one asks for the upper half and one for the lower; of what it does
    not hold, nobody asks.
    """
    asked = []
    monkeypatch.setattr(
        hf._load, "check_finite", lambda dir, name, array: asked.append((name, array.shape)) or array
    )
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 2, 1), ("data", "fsdp", "tensor"))
    hf.load(saved / "gpt2", mesh=mesh, scan=True)
    assert {shape for name, shape in asked if name.endswith("c_attn.weight")} == {(16, 96)}
    assert {shape for name, shape in asked if name.endswith("wte.weight")} == {(29, 16)}


def test_what_does_not_fit_is_said_before_anything_is_read(saved, monkeypatch):
    monkeypatch.setattr(hf._load.jax, "make_array_from_callback", None)
    with pytest.raises(
        ValueError,
        match=r"does not divide '.*/c_attn/kernel': axis 0 of its shape \(32, 96\) would be split into 3 parts",  # noqa: E501
    ):
        hf.load(
            saved / "gpt2",
            mesh=Mesh(np.array(jax.devices()[:3]).reshape(1, 3, 1), ("data", "fsdp", "tensor")),
        )


def test_rules_of_ones_own(saved):
    mesh = mesh_of((1, 8, 1))
    _, params = hf.load(saved / "gpt2", mesh=mesh, rules={"c_fc/kernel": P(None, "fsdp")})
    by_name = by_path(params)
    assert by_name["h/0/mlp/c_fc/kernel"].addressable_shards[0].data.shape == (32, 16)
    assert by_name["h/0/attn/c_attn/kernel"].addressable_shards[0].data.shape == (32, 96)


def test_a_value_that_is_no_number_is_found_by_the_device_that_reads_it(saved, tmp_path):
    hf.save(tmp_path / "model", MODELS["gpt2"], encoders.random_params(MODELS["gpt2"]))
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["transformer.h.1.mlp.c_fc.weight"][31, 3] = np.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        Exception, match="values in 'transformer.h.1.mlp.c_fc.weight' that are infinite or no numbers"
    ):
        hf.load(tmp_path / "model", mesh=mesh_of((1, 8, 1)))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_codes_of_quantised_weights_are_split(saved, format, scan):
    """An eighth of the bytes a device, and the same values."""
    model, params = hf.load(saved / "gpt2", scan=scan)
    frozen, delta = lora_jax.lorafy(
        params,
        "c_attn/kernel",
        method=lora_jax.DoRA(rank=2),
        axes={".*kernel": "layer in out"} if scan else None,
    )
    frozen = lora_jax.quantize(frozen, format, targets="h/.*kernel", delta=delta)
    mesh, specs = mesh_of((1, 2, 4)), partition_specs(params, model.partition_rules)
    placed = jax.device_put(frozen, shardings(mesh, frozen_specs(frozen, specs), frozen))
    for path, leaf in named_leaves(placed):
        if path.endswith("codes"):
            assert leaf.addressable_shards[0].data.size * 8 == leaf.size, path
    run = jax.jit(
        lambda frozen, delta: lora_jax.adapt(model.apply)(
            {"params": lora_jax.combine(frozen, delta)}, jnp.arange(6).reshape(2, 3)
        )
    )
    np.testing.assert_allclose(run(frozen, delta), run(placed, delta), rtol=1e-5, atol=1e-5)
    assert all(
        np.array_equal(one, other)
        for one, other in zip(
            jax.tree.leaves(lora_jax.merge(frozen, delta)),
            jax.tree.leaves(lora_jax.merge(placed, delta)),
            strict=True,
        )
    )


def sent(compiled):
    """Dtype and size of what a program gathers that is as large as a part of a weight of `perceptron`'s,
    or as its codes.
    """
    found = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-gather\(", compiled.as_text())
    sizes = [(dtype, math.prod(map(int, shape.split(",")))) for dtype, shape in found]
    return {(dtype, size) for dtype, size in sizes if size >= 64 * 256 // 8}


def perceptron(layers, x):
    step = lambda x, layer: (x + jax.nn.relu(x @ layer["up"]) @ layer["down"], None)
    if isinstance(layers, dict):
        return jax.lax.scan(step, x, layers)[0]
    for layer in layers:
        x, _ = step(x, layer)
    return x


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("format", ["nf4", "nf4 turned", "int8"])
def test_codes_are_what_is_sent(format, shape, scan):
    """In the forward and in the backward pass, with the value and the gradients of one device. XLA sends
    numbers unless it is told.
    """
    draw = lambda seed, *shape: 0.1 * jax.random.normal(jax.random.key(seed), shape)
    params = [{"up": draw(layer, 64, 256), "down": draw(layer + 2, 256, 64)} for layer in range(2)]
    if scan:
        params = jax.tree.map(lambda *layers: jnp.stack(layers), *params)
    frozen, delta = lora_jax.lorafy(
        params,
        ".*",
        method=lora_jax.LoRA(rank=2),
        axes="layer in out" if scan else None,
        key=jax.random.key(1),
    )
    if format == "nf4 turned":  # as PyTorch stores a weight
        turned = lambda leaf: dataclasses.replace(
            Packed.of(jnp.swapaxes(leaf, -1, -2), NF4()), own=leaf.shape[-2:], turned=True
        )
        frozen = jax.tree.map(turned, frozen)
    else:
        frozen = lora_jax.quantize(frozen, format, delta=delta)
    delta = jax.tree.map(lambda leaf: draw(leaf.size, *leaf.shape), delta)
    mesh, specs = (
        mesh_of(shape),
        partition_specs(params, {"up": P("fsdp", "tensor"), "down": P("tensor", "fsdp")}),
    )
    x = draw(9, 64, 64)

    def loss(delta, frozen, x):
        return jnp.mean(jnp.square(lora_jax.adapt(perceptron)(lora_jax.combine(frozen, delta), x)))

    def on_mesh(frozen):
        placed = jax.device_put(frozen, shardings(mesh, frozen_specs(frozen, specs), frozen))
        arguments = (
            jax.device_put(delta, shardings(mesh, delta_specs(delta, specs), delta)),
            placed,
            jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp")))),
        )
        compiled = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
        numbers = {
            math.prod(map(int, shape.split(",")))
            for shape in re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
        }
        return (
            sent(compiled),
            compiled(*arguments),
            {path.rpartition("/")[2]: leaf for path, leaf in named_leaves(placed)},
            max(numbers),
        )

    assert {dtype for dtype, _ in on_mesh(frozen)[0]} == {"f32"}
    found_sent, found, stored, largest = on_mesh(gather_codes(frozen, specs, mesh))
    assert {
        name
        for name, leaf in stored.items()
        if leaf.addressable_shards[0].data.size * shape[1] * shape[2] == leaf.size
    } == {"codes", "absmax"} & set(stored)
    # Of what is stored by rows, a device's part along `tensor` is one piece where that axis is the first.
    assert found_sent == (
        {("s8", 64 * 256 // shape[2])} if format == "int8" else {("u8", 8192), ("u8", 8192 // shape[2])}
    )
    assert largest == 64 * 256 // shape[2], "a device unpacks its own part alone"
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6),
        found,
        jax.jit(jax.value_and_grad(loss))(delta, frozen, x),
    )


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("method", [lora_jax.LoRA(rank=2), lora_jax.DoRA(rank=2)], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_quantised_weight_on_explicit_axes(format, method, told):
    """Which `jax.make_mesh` makes by default: a weight is whole where it is used, and values, gradients
    and what is merged are as on one device.
    """
    draw = lambda seed, *shape: 0.1 * jax.random.normal(jax.random.key(seed), shape)
    mesh, specs = jax.make_mesh((4, 2), ("fsdp", "tensor")), {"w": P("fsdp", "tensor")}
    frozen, delta = lora_jax.lorafy(
        {"w": draw(0, 64, 128)}, "w", method=method, axes="in out", key=jax.random.key(1)
    )
    frozen, delta, x = (
        lora_jax.quantize(frozen, format, delta=delta),
        jax.tree.map(lambda leaf: draw(leaf.size, *leaf.shape), delta),
        draw(2, 8, 64),
    )
    marked = gather_codes(frozen, specs, mesh) if told else frozen
    placed = jax.device_put(marked, shardings(mesh, frozen_specs(marked, specs), marked))
    assert AxisType.Explicit in jax.tree.leaves(placed)[0].sharding.mesh.axis_types

    @jax.jit
    @jax.value_and_grad
    def loss(delta, frozen, x):
        return jnp.mean(
            jnp.square(lora_jax.adapt(lambda params, x: x @ params["w"])(lora_jax.combine(frozen, delta), x))
        )

    spread = jax.device_put(delta, shardings(mesh, delta_specs(delta, specs), delta))
    close = lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)
    jax.tree.map(
        close, loss(spread, placed, jax.device_put(x, NamedSharding(mesh, P("fsdp")))), loss(delta, frozen, x)
    )
    jax.tree.map(close, lora_jax.merge(placed, spread), lora_jax.merge(frozen, delta))


def test_scales_that_the_mesh_does_not_divide_are_whole():
    packed = gather_codes(
        {"w": Packed.of(jnp.ones((32, 8)), NF4())}, {"w": P("tensor", "fsdp")}, mesh_of((1, 1, 8))
    )["w"]
    specs = frozen_specs({"w": packed}, {"w": P("tensor", "fsdp")})["w"].arrays
    assert packed.arrays["absmax"].size == 4 and (specs["codes"], specs["absmax"]) == (
        P(("tensor", "fsdp")),
        P(),
    )
    traced = jax.make_jaxpr(lambda packed: packed.gathered().arrays)(packed)
    assert [equation.params["sharding"].spec for equation in traced.eqns] == [P(("tensor",)), P(None)], (
        "of codes and of scales"
    )


def test_an_axis_that_the_mesh_does_not_have():
    with pytest.raises(
        ValueError, match="`axes` has 'model', and the mesh has the axes 'data', 'fsdp', 'tensor'"
    ):
        gather_codes({"w": jnp.zeros((2, 2))}, {"w": P()}, mesh_of((1, 8, 1)), axes=("model",))
