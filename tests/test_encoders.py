"""RoBERTa and DeBERTa against `transformers`' PyTorch models on the same random weights, and against
themselves.
"""

import encoders
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from encoders import (
    apply,
    changed,
    DEBERTA,
    from_torch,
    ours,
    QUICKLY,
    ROBERTA,
    run_theirs,
    SCALED,
    some_ids,
    theirs,
)

from lora_jax.models import (
    DebertaV2,
    DebertaV2Config,
    HEADS,
    Roberta,
    RobertaConfig,
    stack_layers,
    unstack_layers,
)
from lora_jax.models.deberta import distance_rows


BOTH = {"roberta": ROBERTA, "deberta": DEBERTA, "deberta v3": SCALED["deberta-v3-base"]}
VARIANTS = [{}, {"scan": True, "checkpoint": True}]


def equal_at_tokens(found, expected, mask, atol=1e-5):
    """What stands at padding is nobody's business."""
    found, expected = np.asarray(found), expected.detach().numpy()
    assert found.shape == expected.shape and found.dtype == expected.dtype
    real = np.ones(found.shape[:2], bool) if mask is None else mask.astype(bool)
    pick = (lambda x: x[real]) if found.ndim == 3 else (lambda x: x)
    np.testing.assert_allclose(pick(found), pick(expected), atol=atol, rtol=0)


# -- PyTorch's results ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", BOTH)
def test_every_head_is_pytorchs(torch, name, head, padding):
    config = BOTH[name]
    reference = theirs(torch, config, head)
    ids, mask = some_ids(config, 11, padding)
    found = apply(ours(config, head), from_torch(torch, reference), ids, mask)
    if name == "roberta" and head == "features":
        found, pooled = found
        out = reference(torch.tensor(ids), attention_mask=None if mask is None else torch.tensor(mask))
        np.testing.assert_allclose(pooled, out.pooler_output.detach().numpy(), atol=1e-5, rtol=0)
    equal_at_tokens(found, run_theirs(torch, reference, ids, mask), mask)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", SCALED)
def test_every_published_shape_is_pytorchs(torch, name, variant):
    config = SCALED[name]
    reference = theirs(torch, config, "sequence_classification")
    params = from_torch(torch, reference)
    params = stack_layers(params, "encoder/layer") if variant.get("scan") else params
    ids, mask = some_ids(config, 13, "right")
    found = apply(ours(config, "sequence_classification", **variant), params, ids, mask)
    equal_at_tokens(found, run_theirs(torch, reference, ids, mask), mask)


_ROBERTA_CHANGES = [
    {"hidden_act": "gelu_new"},
    {"hidden_act": "relu"},
    {"layer_norm_eps": 0.1},
    {"pad_token_id": 5},
    {"type_vocab_size": 3},
    {"tie_word_embeddings": False},
]
_DEBERTA_CHANGES = [
    {"hidden_act": "relu"},
    {"layer_norm_eps": 0.1},
    {"pos_att_type": ("c2p",)},
    {"pos_att_type": ("p2c",)},
    {"pos_att_type": ()},
    {"share_att_key": False},
    {"share_att_key": False, "pos_att_type": ("p2c",)},
    {"relative_attention": False},
    {"position_buckets": -1},
    {"position_buckets": -1, "max_relative_positions": 5},
    {"max_relative_positions": 10},
    {"norm_rel_ebd": ("none",)},
    {"position_biased_input": True},
    {"type_vocab_size": 2},
    {"embedding_size": 20},
    {"conv_act": "tanh", "conv_kernel_size": 5},
    {"conv_groups": 4},
    {"conv_kernel_size": 0},
    {"legacy": False},
    {"tie_word_embeddings": False},
    {"tie_word_embeddings": False, "legacy": False},
]


@pytest.mark.parametrize(
    "config, change",
    [(ROBERTA, c) for c in _ROBERTA_CHANGES] + [(DEBERTA, c) for c in _DEBERTA_CHANGES],
    ids=lambda v: str(v) if isinstance(v, dict) else v.family,
)
def test_every_flag_that_changes_the_computation_is_honoured(torch, config, change):
    config = changed(config, **change)
    reference = theirs(torch, config, "masked_lm")
    ids, mask = some_ids(config, 12, "right")
    types = (
        np.arange(ids.size).reshape(ids.shape) % config.type_vocab_size
        if config.type_vocab_size > 1
        else None
    )
    found = apply(ours(config, "masked_lm"), from_torch(torch, reference), ids, mask, token_type_ids=types)
    equal_at_tokens(found, run_theirs(torch, reference, ids, mask, token_type_ids=types), mask)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_the_poolers_activation_is_honoured(torch, activation):
    config = changed(DEBERTA, pooler_hidden_act=activation)
    reference = theirs(torch, config, "sequence_classification")
    ids, _ = some_ids(config, 6)
    equal_at_tokens(
        apply(ours(config, "sequence_classification"), from_torch(torch, reference), ids),
        run_theirs(torch, reference, ids),
        None,
    )


@pytest.mark.parametrize(
    "config", [ROBERTA, changed(DEBERTA, position_biased_input=True)], ids=lambda c: c.family
)
def test_positions_may_be_given(torch, config):
    reference = theirs(torch, config, "masked_lm")
    ids, _ = some_ids(config, 7)
    positions = np.tile(np.arange(9, 2, -1), (3, 1))
    found = apply(ours(config, "masked_lm"), from_torch(torch, reference), ids, position_ids=positions)
    equal_at_tokens(found, run_theirs(torch, reference, ids, position_ids=positions), None)
    assert np.abs(found - apply(ours(config, "masked_lm"), from_torch(torch, reference), ids)).max() > 0.1


@pytest.mark.parametrize("labels", [("score",), ("a", "b", "c")], ids=len)
@pytest.mark.parametrize("name", ["roberta", "deberta"])
def test_any_number_of_labels(torch, name, labels):
    config = changed(BOTH[name], labels=labels)
    reference = theirs(torch, config, "sequence_classification")
    ids, mask = some_ids(config, 6, "right")
    found = apply(ours(config, "sequence_classification"), from_torch(torch, reference), ids, mask)
    assert found.shape == (3, len(labels))
    equal_at_tokens(found, run_theirs(torch, reference, ids, mask), mask)


@pytest.mark.parametrize("tokens", [1, 4, 5, 6, 23, 24, 25, 40])
def test_lengths_around_the_borders_of_buckets(torch, tokens):
    """8 buckets: distances up to 4 are exact, beyond 23 are one. A model without absolute positions takes
    any length.
    """
    reference = theirs(torch, DEBERTA, "masked_lm")
    ids, mask = some_ids(DEBERTA, tokens, "right" if tokens > 3 else "none")
    equal_at_tokens(
        apply(ours(DEBERTA, "masked_lm"), from_torch(torch, reference), ids, mask),
        run_theirs(torch, reference, ids, mask),
        mask,
    )


@pytest.mark.parametrize(
    "buckets, furthest", [(256, 512), (8, 24), (2, 8), (3, 9), (32, 128), (64, 512), (256, 1024)]
)
def test_distances_fall_into_pytorchs_buckets(torch, buckets, furthest):
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    config = changed(DEBERTA, position_buckets=buckets, max_relative_positions=furthest)
    expected = build_relative_position(torch.zeros(1, 1200, 1), torch.zeros(1, 1200, 1), buckets, furthest)[
        0
    ].numpy()
    rows = distance_rows(config, 1200)
    np.testing.assert_array_equal(rows, np.clip(expected + buckets, 0, 2 * buckets - 1))


@pytest.mark.parametrize("name", BOTH)
def test_gradients_are_pytorchs(torch, name):
    """Of the cross entropy of a masked-LM head, with respect to every parameter; PyTorch leaves the
    padding's rows out.
    """
    config = BOTH[name]
    reference = theirs(torch, config, "masked_lm")
    ids, mask = some_ids(config, 9, "right")
    logits = run_theirs(torch, reference, ids, mask)
    torch.nn.functional.cross_entropy(logits[mask == 1], torch.tensor(ids[mask == 1])).backward()
    expected = from_torch(torch, reference, {name: p.grad for name, p in reference.named_parameters()})

    def loss(params):
        logits = ours(config, "masked_lm", scan=True, checkpoint=True).apply({"params": params}, ids, mask)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, ids)
        return jnp.sum(each * mask) / mask.sum()

    with jax.numpy_dtype_promotion("standard"):
        found = jax.jit(jax.grad(loss), compiler_options=QUICKLY)(
            stack_layers(from_torch(torch, reference), "encoder/layer")
        )
    found = unstack_layers(found, "encoder/layer")
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    assert largest > 0.1
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        mine = np.array(_at(found, path))
        if (
            path[-1].key == "embedding"
            and path[-2].key in ("position_embeddings", "word_embeddings")
            and config.pad_token_id is not None
        ):
            mine, leaf = (np.delete(array, config.pad_token_id, 0) for array in (mine, np.asarray(leaf)))
        np.testing.assert_allclose(mine, leaf, atol=1e-4, rtol=0, err_msg=jax.tree_util.keystr(path))


def _at(tree, path):
    for entry in path:
        tree = tree[entry.key]
    return tree


@pytest.mark.parametrize("name", BOTH)
def test_float64_agrees_with_pytorchs_double(torch, x64, name):
    config = BOTH[name]
    reference = theirs(torch, config, "masked_lm").double()
    ids, mask = some_ids(config, 9, "left")
    found = apply(ours(config, "masked_lm"), from_torch(torch, reference), ids, mask)
    # PyTorch's DeBERTa takes the root of its scale in float32, whatever the model's dtype.
    equal_at_tokens(
        found, run_theirs(torch, reference, ids, mask), mask, atol=1e-11 if name == "roberta" else 1e-7
    )


# -- themselves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [ROBERTA, DEBERTA], ids=lambda c: c.family)
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


@pytest.mark.parametrize("config", [ROBERTA, DEBERTA], ids=lambda c: c.family)
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


@pytest.mark.parametrize("config", [ROBERTA, DEBERTA], ids=lambda c: c.family)
def test_padding_changes_nothing(config):
    """A row alone, and the same row beside a longer one: to the rounding of float32."""
    model = ours(config, "sequence_classification")
    params = encoders.random_params(model)
    ids, mask = some_ids(config, 10, "right")
    beside = apply(model, params, ids, mask)[2]
    np.testing.assert_allclose(apply(model, params, ids[2:, :8])[0], beside, atol=2e-6, rtol=0)


@pytest.mark.parametrize("config", [ROBERTA, DEBERTA], ids=lambda c: c.family)
def test_dropout_needs_a_key_and_is_as_often_as_it_says(config):
    model = ours(config, "sequence_classification")
    params = encoders.random_params(model)
    ids, mask = some_ids(config, 10, "right")
    draw = jax.jit(
        lambda key: model.apply({"params": params}, ids, mask, deterministic=False, rngs={"dropout": key})
    )
    first, again, other = (draw(jax.random.key(n)) for n in (0, 0, 1))
    assert (first == again).all() and not np.allclose(first, other)
    assert not np.allclose(first, apply(model, params, ids, mask))
    with pytest.raises(Exception, match="dropout"):
        model.apply({"params": params}, ids, mask, deterministic=False)
    still = ours(
        changed(config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), "sequence_classification"
    )
    without = still.apply(
        {"params": params}, ids, mask, deterministic=False, rngs={"dropout": jax.random.key(0)}
    )
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
        ("roberta-base", 124.6),
        ("roberta-large", 355.4),
        ("deberta-v3-base", 184.4),
        ("deberta-v3-small", 141.9),
        ("deberta-v3-xsmall", 70.8),
    ],
)
def test_published_sizes(name, millions):
    kind, config = (Roberta, RobertaConfig) if name.startswith("roberta") else (DebertaV2, DebertaV2Config)
    shapes = jax.eval_shape(
        kind(config.named(name), head="sequence_classification").init,
        jax.random.key(0),
        jnp.zeros((1, 1), int),
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("config", [ROBERTA, DEBERTA], ids=lambda c: c.family)
@pytest.mark.parametrize("head", ["masked_lm", "sequence_classification"])
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


@pytest.mark.parametrize("config", [ROBERTA, DEBERTA], ids=lambda c: c.family)
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
    model = ours(changed(DEBERTA, position_biased_input=True), "masked_lm")
    with pytest.raises(ValueError, match="has 25 tokens and the model `max_position_embeddings`=24"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.full((1, 25), 3))
