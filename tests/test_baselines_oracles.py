"""Baselines against the same by other means: PyTorch's models with hooks, a model whose vocabulary has the
special tokens, and words in place of special tokens.
"""

import dataclasses

import encoders
import gpt2_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoders import QUICKLY, ROBERTA
from gpt2_models import SMALL_VOCABULARY

from lora_jax.baselines import attach, Houlsby, Lin, Pfeiffer, PrefixEmbedding, PrefixLayer
from lora_jax.models import GPT2, stack_layers


IDS = np.asarray([[5, 6, 7, 8, 9], [9, 3, 4, 2, 5]])
STRONG = {"std": 0.3, "up_std": 0.3}


def applied(model, params, ids):
    return jax.jit(model.apply, compiler_options=QUICKLY)({"params": params}, ids)


def biased(tree):
    """Adapters whose biases and norms are not at their start."""
    if "down" not in tree:
        return {name: biased(value) if isinstance(value, dict) else value for name, value in tree.items()}
    return jax.tree.map(lambda leaf: leaf + 0.2 if leaf.ndim == 1 else leaf, tree)


# -- adapters in PyTorch's models ----------------------------------------------------------------------------


def adapter_of(torch, arrays, activation, normed=False):
    """up(activation(down(x))) in PyTorch."""
    arrays = jax.tree.map(lambda array: torch.tensor(np.asarray(array)), arrays)

    def added(x):
        if normed:
            x = torch.nn.functional.layer_norm(
                x, x.shape[-1:], arrays["norm"]["scale"], arrays["norm"]["bias"], eps=1e-5
            )
        hidden = activation(x @ arrays["down"]["kernel"] + arrays["down"]["bias"])
        return hidden @ arrays["up"]["kernel"] + arrays["up"]["bias"]

    return added


def adds(added):
    """A hook after a module: its output, or the first of its outputs, and what the adapter adds."""

    def hook(module, inputs, output):
        if isinstance(output, tuple):
            return output[0] + added(output[0]), *output[1:]
        return output + added(output)

    return hook


@pytest.mark.parametrize(
    "baseline",
    [Houlsby(3, **STRONG), Pfeiffer(3, **STRONG), Lin(3, **STRONG)],
    ids=lambda each: type(each).__name__,
)
def test_adapters_of_gpt2_are_hooks_of_pytorch(torch, baseline):
    reference = gpt2_models.torch_model(torch, SMALL_VOCABULARY)
    model, params = attach(GPT2(SMALL_VOCABULARY), gpt2_models.from_torch(reference), baseline)
    params = biased(params)
    gelu = lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    for number, block in enumerate(reference.transformer.h):
        here = params["h"][str(number)]
        if isinstance(baseline, Houlsby):
            for module, name in ((block.attn, "attn"), (block.mlp, "mlp")):
                module.register_forward_hook(adds(adapter_of(torch, here[name]["adapter"], gelu)))
        else:
            added = adapter_of(torch, here["adapter"], torch.relu, isinstance(baseline, Lin))
            block.register_forward_hook(adds(added))
    with torch.no_grad():
        expected = reference(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(applied(model, params, IDS), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "baseline", [Houlsby(3, **STRONG), Pfeiffer(3, **STRONG)], ids=lambda each: type(each).__name__
)
def test_adapters_of_roberta_are_hooks_of_pytorch(torch, baseline):
    """Before the residual sum and its norm; Pfeiffer's reads what the norm gives without it."""
    head = "sequence_classification"
    reference = encoders.theirs(torch, ROBERTA, head)
    plain = encoders.from_torch(torch, reference)
    model, params = attach(encoders.ours(ROBERTA, head), plain, baseline)
    params = biased(params)
    gelu = lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    for number, layer in enumerate(reference.roberta.encoder.layer):
        here = params["encoder"]["layer"][str(number)]
        if isinstance(baseline, Houlsby):
            halves = ((layer.attention.output, here["attention"]["output"]), (layer.output, here["output"]))
            for module, arrays in halves:
                module.dropout.register_forward_hook(adds(adapter_of(torch, arrays["adapter"], gelu)))
        else:
            added = adapter_of(torch, here["output"]["adapter"], torch.relu)
            norm = layer.output.LayerNorm
            norm.register_forward_hook(
                lambda module, inputs, output, added=added: torch.nn.functional.layer_norm(
                    inputs[0] + added(output),
                    module.normalized_shape,
                    *(module.weight, module.bias, module.eps),
                )
            )
    with torch.no_grad():
        expected = reference(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(applied(model, params, IDS), expected, atol=2e-5, rtol=0)


# -- prefixes ------------------------------------------------------------------------------------------------


def gpt2(seed=0):
    params = GPT2(SMALL_VOCABULARY).init(jax.random.key(seed), IDS)["params"]
    # The keys, which start at 0.02, must tell one token from another.
    return jax.tree.map(lambda leaf: leaf * 4 if leaf.ndim == 2 else leaf, params)


def test_a_prefix_embedding_is_more_rows_of_the_vocabulary():
    prefix = PrefixEmbedding(2, 2, std=0.1)
    model, params = attach(GPT2(SMALL_VOCABULARY), gpt2(), prefix)
    ids = np.asarray([prefix.insert(model, row) for row in IDS.tolist()])
    assert ids[0].tolist() == [101, 102, 5, 6, 7, 8, 9, 103, 104]
    found = applied(model, params, ids)
    larger = GPT2(dataclasses.replace(SMALL_VOCABULARY, vocab_size=105))
    wte = params["wte"]
    rows = jnp.concatenate([wte["embedding"], wte["prefix"]])
    expected = applied(larger, {**params, "wte": {"embedding": rows}}, ids)
    np.testing.assert_allclose(found, expected[..., :101], atol=1e-5, rtol=0)
    assert np.all(np.isnan(applied(model, params, np.full((1, 2), 105))))  # no such token


@pytest.mark.parametrize("kind", [PrefixEmbedding, PrefixLayer])
def test_words_as_special_tokens_are_those_words(kind):
    """In a decoder a text has the states that it has alone. So a prefix that starts from words is the words,
    before it is trained.
    """
    base, params = GPT2(SMALL_VOCABULARY), gpt2()
    prefix = kind(3, words=(11, 12))
    model, more = attach(base, params, prefix)
    ids = np.asarray([prefix.insert(model, row) for row in IDS.tolist()])
    words = np.concatenate([np.asarray([[11, 12, 11]] * 2), IDS], axis=1)
    np.testing.assert_allclose(applied(model, more, ids), applied(base, params, words), atol=1e-5, rtol=0)


def test_a_prefix_layer_replaces_the_input_of_each_layer(torch):
    """Hooks before PyTorch's blocks, and what the layers themselves compute there has no effect."""
    reference = gpt2_models.torch_model(torch, SMALL_VOCABULARY)
    prefix = PrefixLayer(2, 1, std=1.0)
    model, params = attach(GPT2(SMALL_VOCABULARY), gpt2_models.from_torch(reference), prefix)
    ids = np.asarray([prefix.insert(model, row) for row in IDS.tolist()])
    places = [0, 1, ids.shape[1] - 1]

    def replaces(states):
        def hook(module, inputs):
            x = inputs[0].clone()
            x[:, places] = states
            return x, *inputs[1:]

        return hook

    for number, block in enumerate(reference.transformer.h):
        block.register_forward_pre_hook(
            replaces(torch.tensor(np.asarray(params["h"][str(number)]["prefix"])))
        )
    with torch.no_grad():
        expected = reference(torch.tensor(np.where(ids > 100, 7, ids))).logits.numpy()
    np.testing.assert_allclose(applied(model, params, ids)[:, 2:-1], expected[:, 2:-1], atol=2e-5, rtol=0)


def test_stacked_layers_start_from_words_too():
    base, params = GPT2(SMALL_VOCABULARY, scan=True), gpt2()
    prefix = PrefixLayer(2, words=(11, 12))
    single = attach(base.clone(scan=False), params, prefix).params
    stacked = attach(base, stack_layers(params), prefix).params
    np.testing.assert_allclose(stacked["h"]["prefix"], stack_layers(single)["h"]["prefix"], atol=1e-6, rtol=0)


def test_an_encoder_reads_its_first_token_before_the_prefix():
    model = encoders.ours(ROBERTA, "sequence_classification")
    prefix = PrefixEmbedding(2, 1)
    assert prefix.insert(model, [0, 5, 2]) == [0, 83, 84, 5, 2, 85]
