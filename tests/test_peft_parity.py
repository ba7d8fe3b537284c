"""Every method that PEFT has too, against PEFT, in float64: logits, merged weights and gradients."""

import copy

import encoders
import jax
import jax.numpy as jnp
import numpy as np
import peft_models
import pytest
from peft_models import (
    adapters,
    agree,
    all_close,
    close,
    from_peft,
    IDS,
    merged_by_peft,
    paired,
    peft_logits_and_gradients,
    with_peft,
)

import lora_jax
from lora_jax import AdaLoRA, DoRA, DyLoRA, Full, LoRA, LoRAFA, PiSSA, VeRA
from lora_jax._tree.nodes import Fixed, is_node, Shared


peft = peft_models.peft
base = peft_models.base


# PEFT asks transformers for it under the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


# No two of the numbers that could be taken for each other are equal.
LORA = dict(r=3, lora_alpha=5)
METHODS = {
    "LoRA": (LoRA(rank=3, alpha=5), "LoraConfig", LORA),
    "rsLoRA": (LoRA(rank=3, alpha=5, rs=True), "LoraConfig", dict(LORA, use_rslora=True)),
    "DoRA": (DoRA(rank=3, alpha=5), "LoraConfig", dict(LORA, use_dora=True)),
    "rank-stabilised DoRA": (
        DoRA(rank=3, alpha=5, rs=True),
        "LoraConfig",
        dict(LORA, use_dora=True, use_rslora=True),
    ),
    "VeRA": (
        VeRA(rank=50, seed=3, d_initial=0.3),
        "VeraConfig",
        dict(r=50, projection_prng_key=3, d_initial=0.3),
    ),  # of more than full rank
    "AdaLoRA": (
        AdaLoRA(rank=3, alpha=5),
        "AdaLoraConfig",
        dict(init_r=3, target_r=2, lora_alpha=5, total_step=10),
    ),
    # An optimiser there: what it computes is LoRA, and so is B's gradient.
    "LoRA-FA": (LoRAFA(rank=3, alpha=5), "LoraConfig", LORA),
}


def targets(base, method):
    return {**({"classifier/.*": Full()} if base.scan else {}), base.kernels: method}


BOTH = [(name, row) for name in ("gpt2", "roberta") for row in ("LoRA", "DoRA", "VeRA", "AdaLoRA")]
ONE = [("gpt2", "LoRA-FA"), ("gpt2", "rsLoRA"), ("roberta", "rank-stabilised DoRA")]


@pytest.mark.parametrize("name, row", [*BOTH, *ONE])
def test_methods_are_pefts(torch, peft, base, name, row, tmp_path, x64):
    base, (method, kind, settings) = base(name), METHODS[row]
    pair = paired(torch, base, targets(base, method), with_peft(peft, base, kind, **settings))
    agree(torch, base, pair, merged_by_peft(base, pair.theirs, tmp_path))


@pytest.mark.parametrize("name, rs", [("gpt2", True), ("roberta", False)])
def test_pissa_is_pefts(torch, peft, base, name, rs, tmp_path, x64):
    """PEFT decomposes in float32 and rounds the residual there: what its model computes at the start is, to
    that, the base.

    From there on it is exact. The signs of singular vectors are anybody's; A·B is not, to float32 and the
    gaps between singular values.
    """
    base, method = base(name), PiSSA(rank=3, alpha=5, rs=rs)
    started = with_peft(peft, base, "LoraConfig", **LORA, init_lora_weights="pissa", use_rslora=rs)
    params = merged_by_peft(base, started, tmp_path / "start")
    all_close(params, base.params, 1e-6)
    own = lora_jax.lorafy(base.params, targets(base, method), axes=base.axes).delta
    for path, theirs in adapters(from_peft(base, started, own)).items():
        products = [jnp.matmul(node.arrays["a"], node.arrays["b"]) for node in (adapters(own)[path], theirs)]
        close(*products, 1e-4, path)

    pair = paired(torch, base, targets(base, method), started, params)
    agree(torch, base, pair, merged_by_peft(base, pair.theirs, tmp_path / "trained"))


def test_ranks_and_numerators_by_pattern_are_pefts(torch, peft, base, tmp_path, x64):
    base = base("gpt2")
    patterns = {
        "attn/c_attn/kernel": LoRA(rank=4, alpha=3),
        "h/1/mlp/c_fc/kernel": LoRA(rank=2, alpha=7),
        base.kernels: LoRA(rank=3, alpha=5),
    }
    rest = dict(rank_pattern={"c_attn": 4, "h.1.mlp.c_fc": 2}, alpha_pattern={"c_attn": 3, "h.1.mlp.c_fc": 7})
    pair = paired(torch, base, patterns, with_peft(peft, base, "LoraConfig", **LORA, **rest))
    agree(torch, base, pair, merged_by_peft(base, pair.theirs, tmp_path))


@pytest.mark.parametrize("row", ["LoRA", "DoRA"])
def test_adapted_embeddings_are_pefts(torch, peft, base, row, tmp_path, x64):
    """Of tokens and of positions. The head of this GPT-2 is its embedding: PEFT adapts the lookup alone,
    so here they are apart.
    """
    base, (method, kind, settings) = base("gpt2", tie="untie"), METHODS[row]
    started = with_peft(peft, base, kind, **settings, target_modules=["wte", "wpe", "c_attn"])
    pair = paired(torch, base, {"(wte|wpe)/embedding|c_attn/kernel": method}, started)
    # Merged, PEFT's two are one again and both are changed.
    agree(torch, base, pair, merged_by_peft(base, pair.theirs, tmp_path, tie="untie"), but=["lm_head/kernel"])


def test_dylora_is_pefts_lora_of_whatever_rank(torch, peft, base, x64):
    """Of its own, without a key, and of a lower one that it is truncated to: PEFT's three ranks are the
    first of six.
    """
    base = base("gpt2")
    pair = paired(
        torch, base, targets(base, LoRA(rank=3, alpha=5)), with_peft(peft, base, "LoraConfig", **LORA)
    )
    whole = lora_jax.lorafy(base.params, targets(base, DyLoRA(rank=3, alpha=5))).delta
    longer = lora_jax.lorafy(base.params, targets(base, DyLoRA(rank=6, alpha=5))).delta
    for path, three in adapters(pair.delta).items():
        adapters(whole)[path].arrays.update(three.arrays)
        arrays, draw = adapters(longer)[path].arrays, np.random.default_rng(2).normal
        arrays["a"] = jnp.concatenate([three.arrays["a"], draw(size=three.arrays["a"].shape)], axis=1)
        arrays["b"] = jnp.concatenate([three.arrays["b"], draw(size=three.arrays["b"].shape)], axis=0)

    apply = jax.jit(lora_jax.adapt(base.model.apply), compiler_options=encoders.QUICKLY)
    expected, _ = peft_logits_and_gradients(torch, base, pair)
    for delta in (whole, lora_jax.methods.truncate(longer, 3)):
        close(apply({"params": lora_jax.combine(base.params, delta)}, IDS), expected, 1e-12)


@pytest.mark.parametrize("seed, rank", [(0, 7), (0, 256), (4_294_967_295, 20)])
@pytest.mark.parametrize("name", ["gpt2", "roberta"])
def test_veras_projections_are_pefts_bit_for_bit(peft, base, name, seed, rank):
    """As large as the largest of mixed shapes, from the seed alone."""
    base = base(name)
    settings = dict(
        r=rank, projection_prng_key=seed, target_modules=list(base.modules), fan_in_fan_out=not base.scan
    )
    theirs = peft.get_peft_model(copy.deepcopy(base.torch), peft.VeraConfig(**settings)).base_model
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), base.params)
    frozen, _ = lora_jax.lorafy(params, base.kernels, method=VeRA(rank=rank, seed=seed), axes=base.axes)
    nodes = [leaf for leaf in jax.tree.leaves(frozen, is_leaf=is_node) if isinstance(leaf, Fixed)]
    (owner,) = [
        node for node in nodes if not isinstance(node.arrays["shared_a"], Shared)
    ]  # the others refer to it
    for shared, tensor in (("shared_a", theirs.vera_A["default"]), ("shared_b", theirs.vera_B["default"])):
        found, expected = np.asarray(owner.arrays[shared]), tensor.numpy().T
        assert found.dtype == expected.dtype == np.float32
        np.testing.assert_array_equal(found.view(np.int32), np.ascontiguousarray(expected).view(np.int32))
