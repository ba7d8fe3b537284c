"""Beam search, greedy decoding and drawing: against a search written with lists, against `transformers`, and
against themselves.

The reference knows no cache, no batch and no padding: it runs every prefix anew and keeps Python lists.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import llama_models
import numpy as np
import pytest
from continuing import END, generated, MODEL, PROMPTS, weights

from experiments.config import Decode, Mesh, Sample
from experiments.decoding.sample import draw
from experiments.decoding.search import search
from experiments.tasks.examples import padded_width
from experiments.training import sharded
from lora_jax.interop import hf
from lora_jax.models import Llama, stack_layers
from lora_jax.models.gpt2 import GPT2


@functools.cache
def _forward(model):
    return jax.jit(model.apply)


def next_logits(params, sequences, model=MODEL):
    """The logits after each sequence, by the whole forward pass over all of it."""
    rows = np.zeros((10, model.config.positions), np.int32)  # of one shape, whatever is asked: compiled once
    for row, sequence in zip(rows, sequences, strict=False):
        row[: len(sequence)] = sequence
    logits = np.asarray(_forward(model)({"params": params}, rows), np.float64)
    return [logits[row, len(sequence) - 1] for row, sequence in enumerate(sequences)]


def repeats(tokens, size):
    """What would complete a second occurrence of `size` tokens in a row."""
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return {gram[-1] for gram in grams if gram[:-1] == tuple(tokens[len(tokens) - size + 1 :])}


def reference(params, prompt, section, end, seen=None, model=MODEL):
    """The authors' beam search for one prompt. `seen` collects the names of what occurred."""
    seen = set() if seen is None else seen
    live, ended = [(0.0, [])], []

    def finish(score, tokens):
        ended.append((score / len(tokens) ** section.length_penalty, tokens))

    for _ in range(section.max_tokens):
        candidates = []
        logits = next_logits(params, [prompt + tokens for _, tokens in live], model)
        for (score, tokens), row in zip(live, logits, strict=True):
            banned = repeats(tokens, section.no_repeat_ngram) if section.no_repeat_ngram else set()
            if banned:
                seen.add("banned")
                row[list(banned)] = -math.inf
            log_p = row - np.log(np.exp(row - row.max()).sum()) - row.max()
            candidates += [
                (score + log_p[token], [*tokens, token]) for token in range(len(row)) if token not in banned
            ]
        live = []
        for score, tokens in sorted(candidates, key=lambda candidate: -candidate[0])[: section.beams]:
            if tokens[-1] in end:
                seen.add(f"ended by {tokens[-1]}")
                finish(score, tokens)
            else:
                live.append((score, tokens))
        if not live:
            seen.add("all ended")
            break
    for score, tokens in live:
        finish(score, tokens)
    best = max(ended, key=lambda text: text[0])[1]
    seen.add("best is whole" if best[-1] not in end else "best has ended")
    return best[:-1] if best[-1] in end else best


# One length and one batch, so that tests that need no other share the compiled programs.
COMMON = Decode(max_tokens=12, batch=3)


SECTIONS = {
    "greedy": COMMON,
    "penalty": dataclasses.replace(COMMON, beams=3, length_penalty=0.8),
    "strong penalty": dataclasses.replace(COMMON, beams=10, length_penalty=2.0, no_repeat_ngram=2),
    "negative penalty, no token twice": dataclasses.replace(
        COMMON, beams=4, length_penalty=-0.3, no_repeat_ngram=1
    ),
    "ban": dataclasses.replace(COMMON, beams=5, no_repeat_ngram=3),
    "the authors'": dataclasses.replace(COMMON, beams=10, length_penalty=0.9, no_repeat_ngram=4),
}


@pytest.mark.parametrize("name", SECTIONS)
def test_search_is_the_reference(name):
    """Five prompts of different lengths in batches of three, on four random models."""
    section, seen = SECTIONS[name], set()
    for seed in range(4):
        found = generated(weights(seed), PROMPTS, section)
        assert found == [reference(weights(seed), prompt, section, END, seen) for prompt in PROMPTS]
        assert not set(END) & {token for tokens in found for token in tokens}
    # A comparison in which nothing happens would prove little.
    assert "best has ended" in seen and (section.beams == 1 or {"ended by 0", "ended by 5"} <= seen)
    assert ("banned" in seen) == (section.no_repeat_ngram is not None)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text"])
def test_search_in_the_llama_family_is_the_reference(kind):
    """Beams that share a prompt's cache, with rotary positions, and windows shorter than the texts."""
    model = Llama(dataclasses.replace(llama_models.TINY[kind], vocab_size=MODEL.config.vocab_size))
    section, seen = SECTIONS["the authors'"], set()
    for seed in range(3):
        params = weights(seed, model)
        found = generated(params, PROMPTS, section, model=model)
        assert found == [reference(params, prompt, section, END, seen, model) for prompt in PROMPTS]
    assert {"best has ended", "banned", "ended by 5"} <= seen


def test_one_beam_is_the_likeliest_token_each_time():
    for prompt, found in zip(PROMPTS, generated(weights(1), PROMPTS, COMMON), strict=True):
        tokens = []
        while len(tokens) < COMMON.max_tokens and (not tokens or tokens[-1] not in END):
            tokens.append(int(next_logits(weights(1), [prompt + tokens])[0].argmax()))
        assert found == [token for token in tokens if token not in END]


def test_a_prompt_alone_is_a_prompt_in_a_batch():
    section = SECTIONS["ban"]
    together = generated(weights(2), PROMPTS, section)
    assert [
        generated(weights(2), [prompt], dataclasses.replace(section, batch=1))[0] for prompt in PROMPTS
    ] == together
    assert generated(weights(2), PROMPTS[::-1], section) == together[::-1], (
        "results come in the order of the prompts"
    )
    assert generated(weights(2), [], section) == []


def test_scanned_layers_search_as_unrolled_ones():
    section = SECTIONS["ban"]
    scanned = generated(stack_layers(weights(2)), PROMPTS, section, model=MODEL.clone(scan=True))
    assert scanned == generated(weights(2), PROMPTS, section)


def test_weights_may_lie_on_a_mesh():
    placed, _ = sharded.on_mesh(sharded.make_mesh(Mesh(2, 2, 2)), weights(2), GPT2.partition_rules)
    assert generated(placed, PROMPTS, SECTIONS["ban"]) == generated(weights(2), PROMPTS, SECTIONS["ban"])


@pytest.mark.parametrize("scores, expected", [([1.0, 1.0, 0.0], [0]), ([0.0, 1.0, 1.0], [1])])
def test_ties_go_to_the_lower_token(scores, expected):
    params = constant(t0=scores[0], t1=scores[1], t2=scores[2])
    assert generated(params, [[7]], Decode(max_tokens=1, beams=2), end=(12,)) == [expected]


def constant(**logits):
    """Weights under which the next token has these logits, whatever came before; every other has 0."""
    params = jax.tree.map(np.zeros_like, weights(0))
    params["ln_f"]["bias"] = np.eye(8, dtype=np.float32)[0]
    for token, logit in logits.items():
        params["wte"]["embedding"][int(token[1:]), 0] = logit
    return params


@pytest.mark.parametrize(
    "penalty, expected", [(1.0, []), (0.9, []), (1.1, [3])], ids=["equal", "shorter", "longer"]
)
def test_of_equal_texts_the_one_that_ended_first_is_kept(penalty, expected):
    """Token 3 and the end are equally likely: with penalty 1 texts of one and of two tokens have the same
    mean. At the last step the text that ends comes before the one that is cut off.
    """
    section = Decode(max_tokens=2, beams=2, length_penalty=penalty)
    assert generated(constant(t3=9.0, t12=9.0), [[7]], section, end=(12,)) == [expected]


def test_one_program_serves_all_batches_of_a_width():
    section = Decode(max_tokens=3, beams=2, batch=2)
    before = search._cache_size()
    generated(weights(0), PROMPTS, section)
    assert search._cache_size() == before + 1
    generated(weights(1), [prompt + [7] * 6 for prompt in PROMPTS], dataclasses.replace(section))
    assert search._cache_size() == before + 1
    generated(weights(0), [*PROMPTS, [1] * 17, [1] * 30], section)
    assert search._cache_size() == before + 2
    assert [padded_width(length, 37) for length in (1, 16, 17, 32, 33)] == [16, 16, 32, 32, 37]


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 4])
def test_search_is_transformers(torch, tmp_path, beams):
    """No ban, no end and no length penalty: there `generate` keeps and ranks the same beams."""
    import transformers

    hf.save(tmp_path / "model", MODEL, weights(3))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "model").eval()
    theirs.generation_config = transformers.GenerationConfig(
        num_beams=beams,
        do_sample=False,
        max_new_tokens=9,
        length_penalty=0.0,
        early_stopping=False,
        pad_token_id=0,
    )
    width = max(map(len, PROMPTS))
    ids = np.array([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS], np.int32)
    mask = np.array([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS], np.int32)
    with torch.no_grad():
        expected = theirs.generate(torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long())[
            :, width:
        ]
    found = search(MODEL, weights(3), ids, mask, None, section=Decode(max_tokens=9, beams=beams), end=(-1,))
    np.testing.assert_array_equal(found, expected.numpy())


def filtered(logits, section):
    """The distribution that is drawn from, token by token."""
    p = np.exp(logits / section.temperature)
    order = sorted(range(len(p)), key=lambda token: -p[token])[: section.top_k]
    kept, mass = [], 0.0
    for token in order:
        if section.top_p is None or mass < section.top_p * p[order].sum():
            kept.append(token)
        mass += p[token]
    p = np.where(np.isin(np.arange(len(p)), kept), p, 0)
    return p / p.sum()


@pytest.mark.parametrize(
    "section, kept",
    [
        (Sample(), 6),
        (Sample(temperature=0.5), 6),
        (Sample(temperature=3.0, top_k=3), 3),
        (Sample(top_k=1), 1),
        (Sample(top_p=0.8), 3),
        (Sample(top_p=1.0), 6),
        (Sample(top_p=0.001), 1),
        (Sample(temperature=2.0, top_k=4, top_p=0.7), 3),
    ],
)
def test_draws_follow_the_distribution(section, kept):
    logits = np.array([0.5, 2.0, -1.0, 1.5, 1.0, -0.5], np.float32)
    expected = filtered(logits, section)
    assert (expected > 0).sum() == kept
    count = 20_000
    keys = jax.random.split(jax.random.key(0), count)
    found = (
        np.bincount(jax.vmap(lambda key: draw(section, key, jnp.asarray(logits)))(keys), minlength=6) / count
    )
    assert not found[expected == 0].any()
    # Five standard deviations of a frequency.
    np.testing.assert_allclose(found, expected, atol=5 * np.sqrt(0.25 / count))


def test_drawing_depends_on_seed_and_place_alone():
    section = Decode(max_tokens=8, sample=Sample(temperature=1.5), batch=2)
    once = generated(weights(0), PROMPTS, section)
    assert generated(weights(0), PROMPTS, dataclasses.replace(section, batch=4)) == once
    assert (
        generated(weights(0), PROMPTS, dataclasses.replace(section, sample=Sample(temperature=1.5, seed=1)))
        != once
    )
    same = generated(weights(0), [PROMPTS[0]] * 6, section)
    assert len(set(map(tuple, same))) > 1, "each prompt is drawn for on its own"


def test_drawn_sequences_follow_the_model():
    """The second token as often as the model says, given the first: the cache and the keys of later steps
    are right.
    """
    prompts = [[3, 1, 4]] * 4000
    found = generated(weights(1), prompts, Decode(max_tokens=2, sample=Sample(), batch=2000), end=(12,))
    (first,) = next_logits(weights(1), [[3, 1, 4]])
    p = filtered(first, Sample())
    for token in np.argsort(-p)[:2]:
        (second,) = next_logits(weights(1), [[3, 1, 4, int(token)]])
        followers = [tokens[1] for tokens in found if len(tokens) == 2 and tokens[0] == token]
        expected = np.delete(filtered(second, Sample()), 12)
        frequency = np.bincount(followers, minlength=13)[:12] / len(followers)
        np.testing.assert_allclose(
            frequency, expected / expected.sum(), atol=5 * np.sqrt(0.25 / len(followers))
        )
