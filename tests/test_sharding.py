"""Specs: rules for weights, adapters that follow their weight, and meshes that do not divide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax._paths import named_leaves
from lora_jax.models.gpt2 import GPT2, GPT2Config
from lora_jax.sharding import GPT2_RULES, delta_specs, partition_specs, shardings

CONFIG = GPT2Config(vocab_size=29, n_positions=16, n_embd=8, n_layer=2, n_head=2)


def gpt2_shapes(**options):
    return jax.eval_shape(GPT2(CONFIG, **options).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def by_path(tree):
    return dict(named_leaves(tree))


def test_gpt2_rules_with_and_without_stacked_layers():
    flat, stacked = by_path(partition_specs(gpt2_shapes(), GPT2_RULES)), by_path(partition_specs(gpt2_shapes(scan=True), GPT2_RULES))
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
    methods = {"attn/c_attn/kernel": lora_jax.LoRA(rank=2, blocks=(True, False, True)), "c_proj/kernel": lora_jax.LoRA(rank=2), "ln_f/scale": lora_jax.Full()}
    _, delta = lora_jax.lorafy(params, methods, axes={"c_attn/kernel|c_proj/kernel": axes})
    specs = delta_specs(delta, partition_specs(params, {**dict(GPT2_RULES), "ln_f/scale": P("fsdp")}))
    assert jax.tree.structure(specs) == jax.tree.structure(delta)
    found, layer, lead = by_path(specs), "h" if scan else "h/0", (None,) if scan else ()
    assert found[f"{layer}/attn/c_attn/kernel/a"] == P(*lead, None, "fsdp", None)
    assert found[f"{layer}/attn/c_attn/kernel/b"] == P(*lead, None, None, None), "a block of the out axis is not that axis"
    assert found[f"{layer}/mlp/c_proj/kernel/a"] == P(*lead, "tensor", None)
    assert found[f"{layer}/mlp/c_proj/kernel/b"] == P(*lead, None, "fsdp")
    assert found["ln_f/scale"] == P("fsdp")


def test_a_mesh_that_does_not_divide():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("fsdp", "tensor"))
    fine = {"w": jnp.zeros((4, 8))}
    placed = jax.device_put(fine, shardings(mesh, {"w": P("fsdp", "tensor")}, fine))
    assert placed["w"].addressable_shards[0].data.shape == (2, 2)
    with pytest.raises(ValueError, match=r"does not divide 'w': axis 0 of its shape \(6,\) would be split into 8 parts .*; 1, 2, 3, 6 would do"):
        shardings(mesh, {"w": P(("fsdp", "tensor"))}, {"w": jnp.zeros(6)})
