"""Rows of several texts: each decoder gives the logits and the gradients of the texts in rows of their
own.
"""

import dataclasses

import gpt2_models
import jax
import jax.numpy as jnp
import llama_models
import numpy as np
import pytest
from gpt2_models import SMALL_VOCABULARY
from llama_models import apply, TINY

from lora_jax.models import GPT2, Llama


CONFIGS = {"gpt2": dataclasses.replace(SMALL_VOCABULARY, n_positions=10), **TINY}
# Longer than the windows, which are four, and than one another. No two texts of a row have equal lengths.
LENGTHS = [[7, 3, 5], [1, 9, 4]]
TOKENS = 17
QUICKLY = {"xla_backend_optimization_level": 0}


def started(kind, **options):
    """A model and random parameters, nothing at 0 or 1."""
    model = (GPT2 if kind == "gpt2" else Llama)(CONFIGS[kind], **options)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    draw = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: draw.normal(0.05, 0.15, leaf.shape).astype(np.float32), shapes)


def texts():
    draw = np.random.default_rng(3)
    return [[draw.integers(1, 83, length) for length in row] for row in LENGTHS]


def packed(rows):
    """Ids and segments of each row, with padding between its texts and after them."""
    ids, segments = np.zeros((2, len(rows), TOKENS), np.int32)
    where = []  # of each text: its row and its columns
    for row, several in enumerate(rows):
        at = 0
        for number, text in enumerate(several, 1):
            ids[row, at : at + len(text)], segments[row, at : at + len(text)] = text, number
            where.append((row, np.arange(at, at + len(text))))
            at += len(text) + (number == 1)
    return ids, segments, where


def apart(rows):
    """Ids of one text a row, which padding on the right does not change."""
    several = [text for row in rows for text in row]
    return np.stack([np.pad(text, (0, 10 - len(text))) for text in several]).astype(np.int32)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "dtype, tolerance, scan", [("float32", 1e-5, False), ("float32", 1e-5, True), ("float64", 1e-10, True)]
)
def test_texts_of_a_row_are_texts_apart(kind, scan, dtype, tolerance, x64):
    """Logits of named columns in any order, and gradients of all parameters, of a loss that weighs each logit
    differently. With `scan` the layers are recomputed too.
    """
    model, params = started(kind, scan=scan, checkpoint=scan)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    rows = texts()
    ids, segments, where = packed(rows)
    columns = np.stack(
        [np.concatenate([at for of, at in where if of == row][::-1])[:14] for row in range(len(rows))]
    )
    # The same tokens, by text and by place within it.
    owner, place = np.full((2, *ids.shape), -1)
    for number, (row, at) in enumerate(where):
        owner[row, at], place[row, at] = number, np.arange(len(at))
    owner, place = (np.take_along_axis(array, columns, 1) for array in (owner, place))
    assert (owner >= 0).all()
    weights = np.random.default_rng(5).normal(size=(*columns.shape, model.config.vocab_size))

    def in_rows(params):
        logits = model.apply({"params": params}, ids, segment_ids=segments, logits_at=columns)
        return (logits * weights.astype(dtype)).sum(), logits

    def alone(params):
        logits = model.apply({"params": params}, apart(rows))[owner, place]
        return (logits * weights.astype(dtype)).sum(), logits

    @jax.jit
    def both(params):
        return [jax.value_and_grad(loss, has_aux=True)(params) for loss in (in_rows, alone)]

    ((_, logits), gradients), ((_, expected), expected_gradients) = both.lower(params).compile(QUICKLY)(
        params
    )
    assert logits.dtype == dtype
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance * abs(expected).max())
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, rtol=0, atol=tolerance * abs(two).max()),
        gradients,
        expected_gradients,
    )


@pytest.mark.parametrize("kind", ["gpt2", "mistral"])
def test_positions_and_padding_may_be_the_callers(kind):
    model, params = started(kind)
    rows = texts()
    ids, segments, where = packed(rows)
    forward = jax.jit(lambda *args, **kwargs: model.apply({"params": params}, *args, **kwargs))
    plain = forward(ids, segment_ids=segments)
    positions = np.zeros_like(ids)
    for row, at in where:
        positions[row, at] = np.arange(len(at))
    same = forward(ids, (segments != 0).astype(int), positions, segment_ids=segments)
    np.testing.assert_allclose(same[segments != 0], plain[segments != 0], atol=1e-5, rtol=0)
    assert not np.isnan(plain).any()  # padding attends to padding
    # Each text one position later, and the second token of the third text hidden from those after it.
    hidden, (row, at) = np.ones_like(ids), where[2]
    hidden[row, at[1]] = 0
    found = forward(ids, hidden, np.minimum(positions + 1, 9), segment_ids=segments)[row, at[2:]]
    alone = apply(model, params, rows[0][2][None], np.array([[1, 0, 1, 1, 1]]), np.arange(1, 6)[None])[0, 2:]
    np.testing.assert_allclose(found, alone, atol=1e-5, rtol=0)


def test_a_row_may_be_longer_than_the_model_and_a_text_may_not():
    model, params = started("gpt2")
    ids, segments = np.ones((2, 24), np.int32), np.array([[1] * 10 + [2] * 10 + [3] * 4, [1] * 11 + [2] * 13])
    logits = gpt2_models.apply(model, params, ids, segment_ids=segments)
    assert np.isfinite(logits[0]).all() and np.isnan(logits[1]).any()
    with pytest.raises(ValueError, match="24 tokens and the model `n_positions`=10"):
        gpt2_models.apply(model, params, ids)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_wrong_segments_say_what_was_passed(kind):
    model, params = started(kind)
    ids = np.ones((2, 5), np.int32)
    call = lambda **arguments: llama_models.apply(model, params, ids, **arguments)
    with pytest.raises(ValueError, match=r"`segment_ids` must have the shape .*\(2, 5\), got \(5,\)"):
        call(segment_ids=np.ones(5, int))
    with pytest.raises(TypeError, match=r"`segment_ids` must be integers, got bool.*1, 2, 3, …, with 0 at"):
        call(segment_ids=np.ones((2, 5), bool))
    with pytest.raises(ValueError, match="`segment_ids` and `cache` do not go together.*a row of its own"):
        call(segment_ids=ids, cache=model.init_cache(2, 8))
    with pytest.raises(ValueError, match="`segment_ids`, `logits_at` and `last_only` go with the language"):
        model.clone(head="sequence_classification").apply({"params": params}, ids, segment_ids=ids)
