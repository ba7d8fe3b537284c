"""BERT, RoBERTa and DeBERTa with LoRA."""

import encoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoders import BERT, changed, DEBERTA, ours, ROBERTA, some_ids
from formation import formed

import lora_jax
from lora_jax import LoRA


@pytest.mark.parametrize(
    ("config", "scan"),
    [
        (BERT, False),
        (ROBERTA, True),
        (DEBERTA, False),
        (changed(DEBERTA, share_att_key=False), True),
    ],
    ids=["bert", "roberta, scanned", "deberta", "deberta of own keys, scanned"],
)
def test_adapted_is_merged_and_nothing_is_formed(config, scan, x64):
    """With every matrix of the encoder adapted, the projections of distances and the convolution among
    them.
    """
    config = changed(config, hidden_size=20, intermediate_size=28, vocab_size=53)
    model = ours(config, "sequence_classification", scan=scan, checkpoint=scan, param_dtype=jnp.float64)
    params = encoders.random_params(model)
    ids, mask = some_ids(config, 7, "right", batch=2)
    targets = ["encoder/.*/kernel", "word_embeddings/embedding"]
    frozen, delta = lora_jax.lorafy(
        params, targets, method=LoRA(rank=2, alpha=3), fn=lambda p: model.apply({"params": p}, ids, mask)
    )
    rng = np.random.default_rng(1)
    delta = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape)), delta)
    forward = lora_jax.adapt(model.apply)

    def loss(apply, params):
        return jnp.mean(apply({"params": params}, ids, mask) ** 2)

    def both(delta):
        adapted = jax.value_and_grad(lambda d: loss(forward, lora_jax.combine(frozen, d)))(delta)
        return adapted, jax.value_and_grad(lambda d: loss(model.apply, lora_jax.merge(frozen, d)))(delta)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11),
        *jax.jit(both, compiler_options=encoders.QUICKLY)(delta),
    )
    leaves, treedef = jax.tree.flatten(frozen)
    named = lora_jax._paths.named_leaves(frozen)
    gradient = jax.make_jaxpr(
        lambda leaves, d: jax.grad(
            lambda d: loss(forward, lora_jax.combine(jax.tree.unflatten(treedef, leaves), d))
        )(d)
    )
    jaxpr, adapted = gradient(leaves, delta), 0
    for index, (path, leaf) in enumerate(named):
        if (
            path.startswith("encoder/")
            and path.endswith("kernel")
            or path.endswith("word_embeddings/embedding")
        ):
            layers = config.num_hidden_layers if scan and "/layer/" in path else 1
            for size in {leaf.size, leaf.size // layers}:
                assert not formed(jaxpr, [index], size), path
            adapted += 1
    assert adapted >= 7
