"""BERT, RoBERTa and DeBERTa against themselves, and what they refuse."""

import encoders
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from encoders import (
    apply,
    BERT,
    changed,
    DEBERTA,
    ours,
    ROBERTA,
    SCALED,
    some_ids,
)

from lora_jax.models import BertConfig, DebertaV2, DebertaV2Config, RobertaConfig


@pytest.mark.parametrize("config", [BERT, ROBERTA, DEBERTA], ids=lambda c: c.family)
def test_bfloat16_is_near_and_logits_are_float32(config):
    model = ours(config, "masked_lm")
    params = encoders.random_params(model, scale=0.1)
    ids, mask = some_ids(config, 9, "right")
    exact = np.asarray(apply(model, params, ids, mask))[mask == 1]
    for found in (
        apply(ours(config, "masked_lm", dtype=jnp.bfloat16), params, ids, mask),
        apply(model, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), ids, mask),
    ):
        assert found.dtype == jnp.float32
        assert np.abs(np.asarray(found)[mask == 1] - exact).max() < 2**-4 * np.abs(exact).max()


@pytest.mark.parametrize("config", [BERT, ROBERTA, DEBERTA], ids=lambda c: c.family)
def test_attention_is_jaxs_own(config, monkeypatch):
    """So that fused kernels apply: one call a layer, and of the model's choice of them."""
    calls, own = [], jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *args, **kwargs: calls.append(kwargs) or own(*args, **kwargs)
    )
    model = ours(config, "features", implementation="xla")
    jax.eval_shape(model.apply, {"params": encoders.random_params(model)}, some_ids(config, 5)[0])
    used = calls[-config.num_hidden_layers :]
    assert [call["implementation"] for call in used] == ["xla"] * config.num_hidden_layers
    assert all((call["bias"] is not None) == (config is DEBERTA) for call in used)


@pytest.mark.parametrize("config", [BERT, ROBERTA, DEBERTA], ids=lambda c: c.family)
def test_padding_changes_nothing(config):
    """A row alone, and the same row beside a longer one: to the rounding of float32."""
    model = ours(config, "sequence_classification")
    params = encoders.random_params(model)
    ids, mask = some_ids(config, 10, "right")
    beside = apply(model, params, ids, mask)[2]
    np.testing.assert_allclose(apply(model, params, ids[2:, :8])[0], beside, atol=2e-6, rtol=0)


@pytest.mark.parametrize("config", [BERT, ROBERTA, DEBERTA], ids=lambda c: c.family)
def test_dropout_needs_a_key_and_is_as_often_as_it_says(config):
    model = ours(config, "sequence_classification")
    params = encoders.random_params(model)
    ids, mask = some_ids(config, 10, "right")

    def run(model, **rngs):
        return model.apply({"params": params}, ids, mask, deterministic=False, rngs=rngs)

    draw = jax.jit(lambda key: run(model, dropout=key))
    first, again, other = (draw(jax.random.key(n)) for n in (0, 0, 1))
    assert (first == again).all() and not np.allclose(first, other)
    assert not np.allclose(first, apply(model, params, ids, mask))
    with pytest.raises(Exception, match="dropout"):
        jax.eval_shape(lambda: run(model))
    still = ours(
        changed(config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), "sequence_classification"
    )
    without = jax.jit(lambda key: run(still, dropout=key))(jax.random.key(0))
    np.testing.assert_allclose(without, apply(model, params, ids, mask), atol=1e-5)


def test_the_size_of_a_scanned_program_does_not_depend_on_depth():
    """DeBERTa-v2-XXLarge lowers from its shapes alone, with as many equations as three layers of it."""
    sizes = []
    for layers in (3, 48):
        config = DebertaV2Config.named("deberta-v2-xxlarge", num_hidden_layers=layers)
        model = DebertaV2(config, head="sequence_classification", scan=True, checkpoint=True)
        params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
        ids = jax.ShapeDtypeStruct((4, 128), jnp.int32)
        gradient = jax.jit(jax.grad(lambda params, ids: model.apply({"params": params}, ids, ids).sum()))
        sizes.append(len(gradient.lower(params, ids).as_text().splitlines()))
    assert sizes[0] == sizes[1]
    # The published 1.5 billion, with this head's 2 labels and the pooler.
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == pytest.approx(1.57e9, rel=0.01)


@pytest.mark.parametrize(
    "name, millions",
    [
        ("bert-base-uncased", 109.5),
        ("bert-large-uncased", 335.1),
        ("all-MiniLM-L6-v2", 22.7),
        ("roberta-base", 124.6),
        ("roberta-large", 355.4),
        ("deberta-v3-base", 184.4),
        ("deberta-v3-small", 141.9),
        ("deberta-v3-xsmall", 70.8),
    ],
)
def test_published_sizes(name, millions):
    kind = next(kind for kind in (BertConfig, RobertaConfig, DebertaV2Config) if name in kind.sizes)
    shapes = jax.eval_shape(
        ours(kind.named(name), "sequence_classification", scan=True).init,
        jax.random.key(0),
        jnp.zeros((1, 1), int),
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "head"),
    [(ROBERTA, "masked_lm"), (DEBERTA, "sequence_classification")],
    ids=["RoBERTa", "DeBERTa-v2"],
)
def test_a_small_task_is_learned(config, head, relaxed_promotion):
    """Which of two halves of the vocabulary the second token is from; or the token that a mask hides,
    which the first one names.
    """
    config = changed(config, vocab_size=24)
    model = ours(config, head, scan=True)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    rng = np.random.default_rng(0)
    mask_token, tx = 23, optax.adam(2e-3)

    def batch():
        ids = rng.integers(3, 23, (32, 6))
        if head == "sequence_classification":
            return ids, (ids[:, 1] >= 13).astype(np.int32)
        labels = ids[:, 0].copy()
        ids[:, 3] = mask_token
        return ids, labels

    def loss_fn(params, ids, labels):
        logits = model.apply({"params": params}, ids)
        logits = logits[:, 3] if head == "masked_lm" else logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), (
            logits.argmax(-1) == labels
        ).mean()

    @jax.jit
    def step(params, state, ids, labels):
        (_, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, ids, labels)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, accuracy

    state, accuracies = tx.init(params), []
    for _ in range(400):
        params, state, accuracy = step(params, state, *batch())
        accuracies.append(float(accuracy))
    assert np.mean(accuracies[:5]) < 0.8 and np.mean(accuracies[-20:]) > 0.95


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, key, value, message",
    [
        (
            ROBERTA,
            "is_decoder",
            True,
            "`is_decoder` is True in config.json, which is not supported for RoBERTa",
        ),
        (ROBERTA, "add_cross_attention", True, "`add_cross_attention` is True"),
        (BERT, "is_decoder", True, "`is_decoder` is True in config.json, which is not supported for BERT"),
        (BERT, "add_cross_attention", True, "`add_cross_attention` is True"),
        (BERT, "position_embedding_type", "relative_key_query", "not supported for BERT: only 'absolute' is"),
        (BERT, "type_vocab_size", 0, "`type_vocab_size` is 0; it must be positive"),
        (BERT, "hidden_act", "mish", "`hidden_act` is 'mish', which is not supported"),
        (ROBERTA, "position_embedding_type", "relative_key", "only 'absolute' is"),
        (ROBERTA, "hidden_act", "mish", "`hidden_act` is 'mish', which is not supported"),
        (ROBERTA, "hidden_size", 33, "must be a multiple of `num_attention_heads`"),
        (ROBERTA, "id2label", {"0": "a", "2": "b"}, "not from 0 without a gap"),
        (ROBERTA, "num_labels", 5, "`num_labels` is 5 in config.json, but `id2label` has 2 names"),
        (ROBERTA, "hidden_dropout_prob", 1.0, "must be a probability below 1"),
        (DEBERTA, "pos_att_type", "c2p|p2p", "`pos_att_type` has 'p2p'; known are c2p, p2c"),
        (DEBERTA, "norm_rel_ebd", "rms_norm", "`norm_rel_ebd` has 'rms_norm'"),
        (DEBERTA, "attention_head_size", 16, "`attention_head_size` in config.json is not supported"),
        (DEBERTA, "pooler_hidden_size", 16, "`pooler_hidden_size` in config.json is not supported"),
        (DEBERTA, "conv_kernel_size", 4, "must be odd"),
        (DEBERTA, "conv_groups", 5, "must divide `hidden_size`"),
        (DEBERTA, "position_buckets", 1, "`position_buckets` is 1"),
        (DEBERTA, "embedding_size", "wide", "`embedding_size` is 'wide'; it must be"),
        (
            DEBERTA,
            "fancy_attention",
            3,
            "`fancy_attention` is 3 in config.json, which is not supported for DeBERTa-v2",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_key_that_is_not_supported_is_named(config, key, value, message):
    with pytest.raises((ValueError, TypeError), match=message.replace("|", r"\|")):
        type(config).from_hf({**config.to_hf(), key: value})


@pytest.mark.parametrize("config", SCALED.values(), ids=SCALED)
def test_configs_survive_a_round_trip(config):
    assert type(config).from_hf(config.to_hf()) == config
    assert type(config).from_hf({**config.to_hf(), "some_new_switch": False, "_name_or_path": "x"}) == config


@pytest.mark.parametrize("config", [BERT, ROBERTA, DEBERTA], ids=lambda c: c.family)
def test_mistaken_calls_are_named(config):
    model = ours(config, "masked_lm")
    variables = {"params": encoders.random_params(model)}
    ids, mask = some_ids(config, 6, "right")
    for arguments, error, message in [
        ((ids.astype(np.float32),), TypeError, "`input_ids` must be integers"),
        ((ids[0],), TypeError, "of shape .batch, time."),
        ((ids, mask.astype(np.float32)), TypeError, "`attention_mask` is floating point"),
        ((ids, mask[:, :3]), ValueError, "`attention_mask` must have the shape"),
        ((ids, mask, np.zeros((1, 2), int)), ValueError, "`position_ids` must have shape"),
        ((ids, mask, None, np.zeros((3, 2), int)), ValueError, "`token_type_ids`"),
    ]:
        with pytest.raises(error, match=message):
            model.apply(variables, *arguments)
    with pytest.raises(ValueError, match="`head` is 'sentiment'; it must be one of"):
        ours(config, "sentiment").init(jax.random.key(0), ids)
    with pytest.raises(ValueError, match="two outputs, start and end, and `labels` are 3"):
        ours(changed(config, labels=("a", "b", "c")), "question_answering").init(jax.random.key(0), ids)


def test_too_long_is_refused_where_positions_are_absolute():
    model = ours(ROBERTA, "masked_lm")
    with pytest.raises(ValueError, match="has 25 tokens and the model has room for 24"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.full((1, 25), 3))
    model = ours(BERT, "masked_lm")
    with pytest.raises(
        ValueError, match="has 25 tokens and the model has room for `max_position_embedd.*`=24"
    ):
        jax.eval_shape(model.init, jax.random.key(0), jnp.full((1, 25), 3))
    model = ours(changed(DEBERTA, position_biased_input=True), "masked_lm")
    with pytest.raises(ValueError, match="has 25 tokens and the model `max_position_embeddings`=24"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.full((1, 25), 3))
