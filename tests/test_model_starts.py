"""What training begins with, against PyTorch's models: how each parameter is drawn, and each dropout."""

import collections

import encoders
import gpt2_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import GPT2


GPT2_CONFIG = encoders.changed(gpt2_models.SMALL_VOCABULARY, embd_pdrop=0.1, attn_pdrop=0.2, resid_pdrop=0.3)
RATES = dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2)
BERT = encoders.changed(encoders.BERT, classifier_dropout=0.4, **RATES)
ROBERTA = encoders.changed(encoders.ROBERTA, classifier_dropout=0.4, **RATES)
DEBERTA = encoders.changed(encoders.DEBERTA, pooler_dropout=0.3, cls_dropout=0.4, **RATES)
MODELS = {
    "gpt2": GPT2(GPT2_CONFIG),
    "bert": encoders.ours(BERT, "sequence_classification"),
    "bert, masked": encoders.ours(BERT, "masked_lm"),
    "roberta": encoders.ours(ROBERTA, "sequence_classification"),
    "roberta, by token": encoders.ours(ROBERTA, "token_classification"),
    "deberta": encoders.ours(DEBERTA, "sequence_classification"),
    "deberta, masked": encoders.ours(DEBERTA, "masked_lm"),
}


def fresh(torch, model):
    """PyTorch's model of the same config as it begins."""
    import transformers

    torch.manual_seed(7)
    if isinstance(model, GPT2):
        settings = {key: value for key, value in model.config.to_hf().items() if value is not None}
        config = transformers.GPT2Config(**settings, attn_implementation="eager")
        return transformers.GPT2LMHeadModel(config)
    name = encoders.named_class(model.config, model.head)
    config = encoders.their_config(model.config, attn_implementation="eager")
    return getattr(transformers, name)(config)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_begin_as_pytorchs(torch, name):
    model, theirs = MODELS[name], fresh(torch, MODELS[name])
    expected = gpt2_models.from_torch(theirs) if name == "gpt2" else encoders.from_torch(torch, theirs)
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 4), int))["params"]
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        found = np.asarray(encoders.at(params, path))
        if path[-1].key in ("bias", "scale"):
            np.testing.assert_array_equal(found, leaf, err_msg=jax.tree_util.keystr(path))
            continue
        spread = np.asarray(leaf)[np.any(np.asarray(leaf) != 0, axis=-1)].std()  # without the padding's row
        assert found.std() == pytest.approx(spread, rel=5 / found.size**0.5), jax.tree_util.keystr(path)


def test_stacked_layers_begin_apart():
    model = MODELS["gpt2"].clone(scan=True)
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 4), int))["params"]
    one, other = params["h"]["mlp"]["c_fc"]["kernel"]
    assert abs(np.corrcoef(np.ravel(one), np.ravel(other))[0, 1]) < 0.1


@pytest.mark.parametrize("name", MODELS)
def test_dropout_is_where_pytorchs_is(torch, name, monkeypatch):
    """As often, of the same rate, and of as many numbers."""
    model, expected, found = MODELS[name], collections.Counter(), collections.Counter()
    theirs, ids = fresh(torch, model).train(), np.full((2, 7), 5)
    whole, bernoulli = torch.nn.functional.dropout, jax.random.bernoulli

    def noted(input, p=0.5, training=True, inplace=False):
        expected.update([(round(p, 6), input.numel())] if training and p > 0 else [])
        return whole(input, p, training, inplace)

    def drawn(key, p, shape):
        found.update([(round(1 - p, 6), int(np.prod(shape)))])
        return bernoulli(key, p, shape)

    monkeypatch.setattr(torch.nn.functional, "dropout", noted)
    theirs(torch.tensor(ids))
    monkeypatch.setattr(jax.random, "bernoulli", drawn)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)
    assert not found, "evaluation mode draws nothing"
    run = lambda params: model.apply(params, ids, deterministic=False, rngs={"dropout": jax.random.key(0)})
    jax.eval_shape(run, shapes)
    assert found == expected


def test_stacked_layers_draw_apart():
    """Two layers add the same vector: of a number of it, none, one or both of the two are dropped."""
    width = GPT2_CONFIG.n_embd
    config = encoders.changed(
        GPT2_CONFIG, vocab_size=width, tie_word_embeddings=False, embd_pdrop=0.0, resid_pdrop=0.5
    )
    model = GPT2(config, scan=True)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 1), int))["params"]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    params["h"]["attn"]["c_proj"]["bias"] += 1
    params["ln_f"]["scale"] += 1
    params["lm_head"]["kernel"] += np.eye(width, dtype=np.float32)
    run = lambda key: model.apply({"params": params}, np.zeros((1, 1), int), deterministic=False, rngs=key)
    logits = jax.jit(run)({"dropout": jax.random.key(0)})
    assert len(np.unique(np.round(logits, 4))) == 3
