"""GPT-2 against `transformers`' PyTorch model on the same random weights and real tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpt2_models import apply, from_torch, SMALL_VOCABULARY, some_ids, tensor, TEXTS, TINY, torch_model

from lora_jax.models import GPT2, stack_layers, unstack_layers


VARIANTS = [dict(), dict(scan=True), dict(scan=True, checkpoint=True)]


@pytest.fixture(scope="module")
def tokens(data_dir):
    """Two texts of unequal length, in GPT-2's own tokens."""
    tokenizers = pytest.importorskip(
        "tokenizers", reason="tokenizers is not installed: pip install tokenizers"
    )
    tokenizer = tokenizers.Tokenizer.from_file(str(data_dir / "gpt2_bpe" / "tokenizer.json"))
    rows = [tokenizer.encode(text).ids for text in TEXTS]
    assert len(rows[0]) > len(rows[1]) + 2
    return rows


def padded(rows, side):
    """The rows as one array, and the mask of its real tokens."""
    width = max(map(len, rows))
    before = [width - len(row) if side == "left" else 0 for row in rows]
    ids, mask = np.full((2, len(rows), width), 0, np.int32)
    for i, (row, start) in enumerate(zip(rows, before, strict=True)):
        ids[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = 1
    return ids, mask


# Every case where the layers are traced one by one; stacked, those that differ in the program.
@pytest.mark.parametrize(
    ("case", "variant"),
    [(case, VARIANTS[0]) for case in ("no padding", "right", "left", "left with positions")]
    + [("right", VARIANTS[1]), ("left with positions", VARIANTS[2])],
    ids=str,
)
def test_logits_are_pytorchs(torch, tokens, case, variant):
    rows = [row[: len(tokens[1])] for row in tokens] if case == "no padding" else tokens
    ids, mask = padded(rows, case.split()[0])
    mask = None if case == "no padding" else mask
    positions = np.maximum(mask.cumsum(-1) - 1, 0) if case == "left with positions" else None
    theirs = torch_model(torch, TINY)
    params = from_torch(theirs)
    params = stack_layers(params) if variant.get("scan") else params

    arguments = dict(attention_mask=mask, position_ids=positions)
    ours = apply(GPT2(TINY, **variant), params, ids, **arguments)
    with torch.no_grad():
        expected = theirs(
            tensor(torch, ids), **{k: tensor(torch, v) for k, v in arguments.items()}
        ).logits.numpy()

    assert ours.shape == (*ids.shape, TINY.vocab_size) and ours.dtype == jnp.float32
    # What stands at padding is nobody's business: the two libraries differ there in how they fill an empty
    # softmax.
    real = np.ones_like(ids, bool) if mask is None else mask.astype(bool)
    np.testing.assert_allclose(ours[real], expected[real], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "change",
    [
        dict(activation_function=name)
        for name in ["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu"]
    ]
    + [dict(activation_function=name) for name in ["relu", "silu", "swish", "tanh"]]
    + [
        dict(layer_norm_epsilon=0.1),
        dict(n_inner=48),
        dict(scale_attn_weights=False),
        dict(scale_attn_by_inverse_layer_idx=True),
        dict(scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False),
        dict(reorder_and_upcast_attn=True),
        dict(tie_word_embeddings=False),
    ],
    ids=str,
)
def test_every_flag_that_changes_the_computation_is_honoured(torch, change):
    config = dataclasses.replace(SMALL_VOCABULARY, **change)
    theirs = torch_model(torch, config)
    params = from_torch(theirs)
    ids = some_ids((2, 9))
    with torch.no_grad():
        expected = theirs(tensor(torch, ids)).logits.numpy()
    np.testing.assert_allclose(apply(GPT2(config), params, ids), expected, atol=1e-5, rtol=0)
    if config.scale_attn_by_inverse_layer_idx:  # under `scan` the layer's number is traced
        scanned = apply(GPT2(config, scan=True), stack_layers(params), ids)
        np.testing.assert_allclose(scanned, expected, atol=1e-5, rtol=0)


def test_float64_agrees_with_pytorchs_double(torch, x64):
    theirs = torch_model(torch, SMALL_VOCABULARY).double()
    ids, mask = some_ids((2, 9)), np.array([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    ours = apply(GPT2(SMALL_VOCABULARY), from_torch(theirs), ids, mask)
    with torch.no_grad():
        expected = theirs(tensor(torch, ids), attention_mask=tensor(torch, mask)).logits.numpy()
    assert ours.dtype == jnp.float64
    np.testing.assert_allclose(ours[mask == 1], expected[mask == 1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[-1]], ids=str)
def test_gradients_are_pytorchs(torch, variant):
    theirs = torch_model(torch, SMALL_VOCABULARY)
    params = from_torch(theirs)
    ids, mask = some_ids((2, 9)), np.array([[1] * 9, [1] * 6 + [0] * 3])
    labels = np.where(mask == 1, np.asarray(ids), -100)
    theirs(
        tensor(torch, ids), attention_mask=tensor(torch, mask), labels=tensor(torch, labels)
    ).loss.backward()
    # PyTorch keeps gradients beside the values; put them in their place, and they have names and layout too.
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    expected = from_torch(theirs)

    def loss(params):
        logits = apply(GPT2(SMALL_VOCABULARY, **variant), params, ids, mask)
        scores = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1)[..., 0]
        return -jnp.where(mask[:, 1:] == 1, scores, 0).sum() / mask[:, 1:].sum().astype(np.float32)

    ours = jax.jit(jax.grad(loss))(stack_layers(params) if variant.get("scan") else params)
    ours = unstack_layers(ours) if variant.get("scan") else ours
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=0), ours, expected)
    assert (
        max(abs(leaf).max() for leaf in jax.tree.leaves(ours)) > 1e-2
    )  # or the tolerance would prove nothing


@pytest.mark.parametrize("scan", [False, True])
def test_greedy_decoding_is_pytorchs(torch, tokens, scan):
    ids, mask = padded(tokens, "left")
    theirs = torch_model(torch, TINY)
    expected = theirs.generate(
        tensor(torch, ids),
        attention_mask=tensor(torch, mask),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    ).numpy()[:, ids.shape[1] :]

    params = from_torch(theirs)
    model = GPT2(TINY, scan=scan)
    variables = {"params": stack_layers(params) if scan else params}
    step = jax.jit(model.apply, static_argnames="last_only")
    logits, cache = step(variables, ids, mask, cache=model.init_cache(2, TINY.n_positions), last_only=True)
    chosen = [logits.argmax(-1)]
    for _ in range(5):
        logits, cache = step(variables, chosen[-1], cache=cache)
        chosen.append(logits.argmax(-1))
    np.testing.assert_array_equal(np.concatenate(chosen, 1), expected)
