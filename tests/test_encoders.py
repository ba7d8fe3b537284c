"""BERT, RoBERTa and DeBERTa against `transformers`' PyTorch models on the same random weights."""

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
    from_torch,
    ours,
    QUICKLY,
    ROBERTA,
    run_theirs,
    SCALED,
    some_ids,
    theirs,
)

from lora_jax.models import HEADS, stack_layers, unstack_layers
from lora_jax.models.deberta import distance_rows


CONFIGS = {
    "bert": BERT,
    "roberta": ROBERTA,
    "deberta": DEBERTA,
    "deberta v3": SCALED["deberta-v3-base"],
}
VARIANTS = [{}, {"scan": True, "checkpoint": True}]


def equal_at_tokens(found, expected, mask, atol=1e-5):
    """What stands at padding is nobody's business."""
    found, expected = np.asarray(found), expected.detach().numpy()
    assert found.shape == expected.shape and found.dtype == expected.dtype
    real = np.ones(found.shape[:2], bool) if mask is None else mask.astype(bool)
    pick = (lambda x: x[real]) if found.ndim == 3 else (lambda x: x)
    np.testing.assert_allclose(pick(found), pick(expected), atol=atol, rtol=0)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_head_is_pytorchs(torch, name, head):
    """With padding on either side; without, which is another program, for one head."""
    config = CONFIGS[name]
    reference = theirs(torch, config, head)
    params = from_torch(torch, reference)
    for padding in ("right", "left", *(["none"] if head == "token_classification" else [])):
        ids, mask = some_ids(config, 11, padding)
        found = apply(ours(config, head), params, ids, mask)
        if name in ("bert", "roberta") and head == "features":
            found, pooled = found
            out = reference(torch.tensor(ids), attention_mask=torch.tensor(mask))
            np.testing.assert_allclose(pooled, out.pooler_output.detach().numpy(), atol=1e-5, rtol=0)
        equal_at_tokens(found, run_theirs(torch, reference, ids, mask), mask)


# Of the same size, some of the published models are the same one.
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("config", dict.fromkeys(SCALED.values()), ids=lambda config: config.family)
def test_every_published_shape_is_pytorchs(torch, config, variant):
    reference = theirs(torch, config, "sequence_classification")
    params = from_torch(torch, reference)
    params = stack_layers(params, "encoder/layer") if variant.get("scan") else params
    ids, mask = some_ids(config, 11, "right")
    found = apply(ours(config, "sequence_classification", **variant), params, ids, mask)
    equal_at_tokens(found, run_theirs(torch, reference, ids, mask), mask)


_BERT_CHANGES = [
    {"hidden_act": "gelu_new"},
    {"hidden_act": "relu"},
    {"layer_norm_eps": 0.1},
    {"pad_token_id": 5},
    {"type_vocab_size": 3},
    {"tie_word_embeddings": False},
    {"num_attention_heads": 8},
]
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
    [(BERT, c) for c in _BERT_CHANGES]
    + [(ROBERTA, c) for c in _ROBERTA_CHANGES]
    + [(DEBERTA, c) for c in _DEBERTA_CHANGES],
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
    "config", [BERT, ROBERTA, changed(DEBERTA, position_biased_input=True)], ids=lambda c: c.family
)
def test_positions_may_be_given(torch, config):
    reference = theirs(torch, config, "masked_lm")
    ids, _ = some_ids(config, 7)
    positions = np.tile(np.arange(9, 2, -1), (3, 1))
    found = apply(ours(config, "masked_lm"), from_torch(torch, reference), ids, position_ids=positions)
    equal_at_tokens(found, run_theirs(torch, reference, ids, position_ids=positions), None)
    assert np.abs(found - apply(ours(config, "masked_lm"), from_torch(torch, reference), ids)).max() > 0.1


@pytest.mark.parametrize("labels", [("score",), ("a", "b", "c")], ids=len)
@pytest.mark.parametrize("name", ["bert", "roberta", "deberta"])
def test_any_number_of_labels(torch, name, labels):
    config = changed(CONFIGS[name], labels=labels)
    reference = theirs(torch, config, "sequence_classification")
    ids, mask = some_ids(config, 6, "right")
    found = apply(ours(config, "sequence_classification"), from_torch(torch, reference), ids, mask)
    assert found.shape == (3, len(labels))
    equal_at_tokens(found, run_theirs(torch, reference, ids, mask), mask)


@pytest.mark.parametrize("tokens", [1, 5, 25, 40])
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


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_pytorchs(torch, name):
    """Of the cross entropy of a masked-LM head, with respect to every parameter; PyTorch leaves the
    padding's rows out.
    """
    config = CONFIGS[name]
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
        mine = np.array(encoders.at(found, path))
        if (
            path[-1].key == "embedding"
            and path[-2].key in ("word_embeddings", *(["position_embeddings"] if name == "roberta" else []))
            and config.pad_token_id is not None
        ):
            mine, leaf = (np.delete(array, config.pad_token_id, 0) for array in (mine, np.asarray(leaf)))
        np.testing.assert_allclose(mine, leaf, atol=1e-4, rtol=0, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta"])
def test_float64_agrees_with_pytorchs_double(torch, x64, name):
    config = CONFIGS[name]
    reference = theirs(torch, config, "masked_lm").double()
    ids, mask = some_ids(config, 9, "left")
    found = apply(ours(config, "masked_lm"), from_torch(torch, reference), ids, mask)
    # PyTorch's DeBERTa takes the root of its scale in float32, whatever the model's dtype.
    equal_at_tokens(
        found, run_theirs(torch, reference, ids, mask), mask, atol=1e-7 if name == "deberta" else 1e-11
    )
