"""The Llama family against `transformers`' PyTorch models on the same random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llama_models import apply, from_torch, some_ids, TINY, torch_model

from lora_jax.models import Llama, stack_layers, unstack_layers
from lora_jax.models._rope import Rope


pytestmark = pytest.mark.pytorch
_LLAMA3 = Rope(
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
_YARN = dict(kind="yarn", factor=4.0, original_max_position_embeddings=16)
# What a config may change, one at a time, and of which family.
_CHANGES = [(kind, {}) for kind in TINY] + [
    ("llama", dict(num_key_value_heads=4)),
    ("llama", dict(num_key_value_heads=1)),
    ("llama", dict(head_dim=16)),
    ("llama", dict(attention_bias=True)),
    ("llama", dict(mlp_bias=True)),
    ("llama", dict(tie_word_embeddings=True)),
    ("llama", dict(rms_norm_eps=0.1)),
    ("llama", dict(hidden_act="gelu_pytorch_tanh")),
    ("llama", dict(rope=Rope(theta=500.0))),
    ("llama", dict(rope=Rope(kind="linear", factor=3.0))),
    ("llama", dict(rope=Rope(kind="dynamic", factor=3.0))),
    # Shorter than the text, where the base grows with it.
    ("llama", dict(rope=Rope(kind="dynamic", factor=3.0), max_position_embeddings=8)),
    ("llama", dict(rope=_LLAMA3)),
    ("llama", dict(rope=Rope(**_YARN))),
    ("llama", dict(rope=Rope(**_YARN, attention_factor=1.3, beta_fast=8.0, beta_slow=2.0))),
    ("llama", dict(rope=Rope(**_YARN, mscale=0.7, mscale_all_dim=1.4, truncate=False))),
    ("mistral", dict(sliding_window=None)),
    ("qwen2", dict(use_sliding_window=False, layer_types=None)),
    ("qwen2", dict(layer_types=("sliding_attention", "full_attention"))),
    ("qwen3", dict(attention_bias=True)),
    ("gemma2", dict(attn_logit_softcapping=None, final_logit_softcapping=None)),
    ("gemma2", dict(attn_logit_softcapping=2.0, final_logit_softcapping=1.5)),
    ("gemma2", dict(attention_bias=True)),
    ("gemma3_text", dict(rope=Rope(kind="linear", theta=1e6, factor=8.0))),
    ("gemma3_text", dict(local_rope=Rope(theta=50.0), final_logit_softcapping=1.5)),
]


def _theirs(torch, model, ids, mask=None, **arguments):
    mask = None if mask is None else torch.tensor(mask, dtype=torch.long)
    return model(torch.tensor(ids, dtype=torch.long), attention_mask=mask, use_cache=False, **arguments)


@pytest.mark.parametrize(("kind", "change"), _CHANGES, ids=str)
def test_logits_are_pytorchs(torch, kind, change):
    config = dataclasses.replace(TINY[kind], **change)
    theirs = torch_model(torch, config)
    ids, _ = some_ids()
    with torch.no_grad():
        expected = _theirs(torch, theirs, ids).logits.numpy()
    ours = apply(Llama(config), from_torch(torch, theirs), ids)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("kind", TINY)
def test_padding_is_pytorchs(torch, kind, padding):
    theirs = torch_model(torch, TINY[kind])
    params = from_torch(torch, theirs)
    ids, mask = some_ids(padding)
    with torch.no_grad():
        expected = _theirs(torch, theirs, ids, mask).logits.numpy()
    for options in ({}, {"scan": True}):
        own = stack_layers(params, "layers") if options else params
        ours = apply(Llama(TINY[kind], **options), own, ids, mask)
        np.testing.assert_allclose(ours[mask == 1], expected[mask == 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", TINY)
def test_gradients_are_pytorchs(torch, kind):
    """Through scanned layers that are computed again, with a mask."""
    theirs = torch_model(torch, TINY[kind])
    ids, mask = some_ids("right")
    counted = mask[:, 1:].astype(np.float32)

    def loss(params):
        model = Llama(TINY[kind], scan=True, checkpoint=True)
        logits = model.apply({"params": params}, ids, mask)[:, :-1]
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(losses * counted) / counted.sum()

    ours = jax.jit(jax.grad(loss), compiler_options={"xla_backend_optimization_level": 0})(
        stack_layers(from_torch(torch, theirs), "layers")
    )
    logits = _theirs(torch, theirs, ids, mask).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), torch.tensor(ids[:, 1:], dtype=torch.long), reduction="none"
    )
    ((losses * torch.tensor(counted)).sum() / counted.sum()).backward()
    expected = from_torch(torch, theirs, {name: p.grad for name, p in theirs.named_parameters()})
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=0),
        unstack_layers(ours, "layers"),
        expected,
    )


@pytest.mark.parametrize("kind", TINY)
def test_generation_with_the_cache_is_pytorchs(torch, kind):
    """A batch of prompts that are padded on the left, and more new tokens than a window holds."""
    theirs = torch_model(torch, TINY[kind])
    ids, mask = some_ids("left")
    new = 9
    expected = theirs.generate(
        torch.tensor(ids, dtype=torch.long),
        attention_mask=torch.tensor(mask, dtype=torch.long),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
    ).numpy()[:, ids.shape[1] :]
    params = from_torch(torch, theirs)
    for options in ({}, {"scan": True}):
        own = stack_layers(params, "layers") if options else params
        model = Llama(TINY[kind], **options)
        cache = model.init_cache(len(ids), ids.shape[1] + new)
        logits, cache = apply(model, own, ids, mask, cache=cache, last_only=True)
        found = [logits.argmax(-1)]
        for _ in range(new - 1):
            logits, cache = apply(model, own, found[-1], cache=cache)
            found.append(logits.argmax(-1))
        np.testing.assert_array_equal(np.concatenate(found, axis=1), expected)


@pytest.mark.parametrize("kind", TINY)
def test_classification_is_pytorchs(torch, kind):
    config = dataclasses.replace(TINY[kind], labels=("a", "b", "c"))
    theirs = torch_model(torch, config, "sequence_classification")
    ids, mask = some_ids("right")
    with torch.no_grad():
        expected = _theirs(torch, theirs, ids, mask).logits.numpy()
    ours = apply(Llama(config, head="sequence_classification"), from_torch(torch, theirs), ids, mask)
    np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=1e-5)
