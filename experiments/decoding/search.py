"""The compiled search for continuations: beam search as LoRA's authors do it, of which greedy decoding and
drawing are cases.

The beams of a context stand in one row of the cache and are the tokens of one call of the model: each step
appends a slot a beam, and a beam sees the prompt's slots and those of its own ancestors. So a prompt's keys
and values are stored and read once for all beams, and when beams are reordered only that record of ancestors
moves. Letters: B contexts, P prompt tokens, N beams (one before the first token, then `beams`), T
`max_tokens`, S slots, V vocabulary, C candidates of a beam.

Differences from `transformers`: the ban looks at generated tokens only, and the places of ended beams are not
filled from beyond the top `beams`. Ties go to the lower beam, then to the lower token.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import Decode
from experiments.decoding.sample import draw


class Beams(NamedTuple):
    """The beams of every context, and the best text that has ended so far."""

    tokens: jax.Array  # (B, N, T) int32: generated so far, then the first end token
    scores: jax.Array  # (B, N) float32: summed log-probability; -inf once ended
    best: jax.Array  # (B, T) int32
    best_score: jax.Array  # (B,) float32: summed log-probability / length ** length_penalty; -inf without one


@functools.partial(jax.jit, static_argnames=("model", "section", "end"))
def search(
    model: Any,
    params: Any,
    prompt_BxP: jax.Array,
    mask_BxP: jax.Array,
    keys_B: jax.Array | None,
    *,
    section: Decode,
    end: tuple[int, ...],
) -> jax.Array:
    """The best continuation of each row of `prompt`, (B, max_tokens), its end token included and then
    repeated.

    Prompts are padded on the left, where `mask` is 0, so that all rows write their next tokens in the same
    slots. `keys`: a random key a row, where `section.sample` is given.
    """
    batch, width = prompt_BxP.shape
    most, count = section.max_tokens, section.beams
    logits_Bx1xV, cache = model.apply(
        {"params": params}, prompt_BxP, mask_BxP, cache=model.init_cache(batch, width), last_only=True
    )
    cache = cache.extended(count * most)
    length_Bx1 = mask_BxP.astype(jnp.int32).sum(-1, keepdims=True)
    penalties = _penalties(section)
    blank = jnp.full((batch, 1, most), end[0], jnp.int32)
    beams = Beams(blank, jnp.zeros((batch, 1)), blank[:, 0], jnp.full((batch,), -jnp.inf))
    beams, parents_BxN = _extend(beams, logits_Bx1xV, 0, keys_B, section, end)
    visible_BxNxS = _of_parents(cache.mask[:, None], parents_BxN)

    def undecided(carry: tuple) -> jax.Array:
        # No score grows, so what lives can at most be divided by the largest penalty left; where that does
        # not beat the best, nothing will.
        step, beams = carry[:2]
        reachable_B = beams.scores.max(-1) / jnp.maximum(penalties[step], penalties[-1])
        return (step < most) & jnp.any(reachable_B > beams.best_score)

    def another(carry: tuple) -> tuple:
        step, beams, visible_BxNxS, cache = carry
        own_NxS = cache.length + jnp.arange(count)[:, None] == jnp.arange(visible_BxNxS.shape[-1])[None]
        visible_BxNxS = visible_BxNxS | own_NxS[None]
        positions_BxN = jnp.broadcast_to(length_Bx1 + step - 1, (batch, count))
        last_BxN = jax.lax.dynamic_index_in_dim(beams.tokens, step - 1, axis=-1, keepdims=False)
        logits_BxNxV, cache = model.apply(
            {"params": params}, last_BxN, position_ids=positions_BxN, cache=cache, visible=visible_BxNxS
        )
        beams, parents_BxN = _extend(beams, logits_BxNxV, step, keys_B, section, end)
        return step + 1, beams, _of_parents(visible_BxNxS, parents_BxN), cache

    _, beams, *_ = jax.lax.while_loop(
        undecided, another, (jnp.ones((), jnp.int32), beams, visible_BxNxS, cache)
    )
    return _keep_best(beams, jnp.ones((batch, count), bool), penalties[-1]).best


def _penalties(section: Decode) -> jax.Array:
    """length ** length_penalty for the lengths 1 to `max_tokens`, rounded once."""
    return jnp.asarray(
        np.arange(1, section.max_tokens + 1, dtype=np.float64) ** section.length_penalty, jnp.float32
    )


def _of_parents(x_BxMxE: jax.Array, parents_BxN: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BxMxE, parents_BxN[..., None], axis=1)


def _extend(
    beams: Beams,
    logits_BxMxV: jax.Array,
    step: jax.Array | int,
    keys_B: jax.Array | None,
    section: Decode,
    end: tuple[int, ...],
) -> tuple[Beams, jax.Array]:
    """Every context's beams with a token more, its number being `step`, and which beam each comes from,
    (B, N).
    """
    logits_BxMxV = logits_BxMxV.astype(jnp.float32)
    if section.no_repeat_ngram is not None:
        logits_BxMxV = _ban_repeats(logits_BxMxV, beams.tokens, step, section.no_repeat_ngram)
    if section.sample is not None:
        keys_B = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys_B)
        token_BxMxC = jax.vmap(functools.partial(draw, section.sample))(keys_B, logits_BxMxV[:, 0])
        token_BxMxC = token_BxMxC[:, None, None]
        logit_BxMxC = jnp.take_along_axis(logits_BxMxV, token_BxMxC, axis=-1)
    else:
        # Of a beam no more than the likeliest `beams` tokens can go on.
        logit_BxMxC, token_BxMxC = jax.lax.top_k(logits_BxMxV, section.beams)
    # After the ban: what is left shares the whole probability. Without a token left a beam ends, rather than
    # become NaN.
    most_BxMx1 = logits_BxMxV.max(-1, keepdims=True)
    log_sum_BxMx1 = jnp.log(jnp.exp(logits_BxMxV - most_BxMx1).sum(-1, keepdims=True))
    log_p_BxMxC = jnp.where(jnp.isneginf(logit_BxMxC), -jnp.inf, logit_BxMxC - most_BxMx1 - log_sum_BxMx1)
    totals_BxMC = (beams.scores[..., None] + log_p_BxMxC).reshape(len(log_p_BxMxC), -1)
    scores_BxN, place_BxN = jax.lax.top_k(totals_BxMC, section.beams)
    parents_BxN = place_BxN // token_BxMxC.shape[-1]
    chosen_BxN = jnp.take_along_axis(token_BxMxC.reshape(totals_BxMC.shape), place_BxN, axis=-1)
    tokens_BxNxT = _of_parents(beams.tokens, parents_BxN).at[:, :, step].set(chosen_BxN)
    ended_BxN = jnp.isin(chosen_BxN, jnp.asarray(end, jnp.int32))
    return _keep_best(
        beams._replace(tokens=tokens_BxNxT, scores=scores_BxN), ended_BxN, _penalties(section)[step]
    ), parents_BxN


def _keep_best(beams: Beams, ended_BxN: jax.Array, penalty: jax.Array) -> Beams:
    """Ends the given beams: the best of them is kept where it beats the best before, and none of them
    goes on.
    """
    final_BxN = jnp.where(ended_BxN, beams.scores / penalty, -jnp.inf)
    score_B = final_BxN.max(-1)
    tokens_BxT = _of_parents(beams.tokens, final_BxN.argmax(-1)[:, None])[:, 0]
    better_B = score_B > beams.best_score
    return Beams(
        beams.tokens,
        jnp.where(ended_BxN, -jnp.inf, beams.scores),
        jnp.where(better_B[:, None], tokens_BxT, beams.best),
        jnp.where(better_B, score_B, beams.best_score),
    )


def _ban_repeats(
    logits_BxMxV: jax.Array, tokens_BxMxT: jax.Array, step: jax.Array | int, size: int
) -> jax.Array:
    """-inf for each token that would end the beam's `step` tokens with `size` of them that it holds
    already.
    """
    starts = tokens_BxMxT.shape[-1] - size + 1
    if starts < 1:
        return logits_BxMxV
    # With fewer than `size` tokens there is no earlier one: the slice is then somewhere, and `whole` nowhere
    # true.
    recent_BxMxR = jax.lax.dynamic_slice_in_dim(tokens_BxMxT, step - (size - 1), size - 1, axis=-1)
    whole_W = jnp.arange(starts) + size <= step
    found_BxMxW = jnp.broadcast_to(whole_W, (*tokens_BxMxT.shape[:2], starts))
    for i in range(size - 1):
        found_BxMxW &= tokens_BxMxT[..., i : i + starts] == recent_BxMxR[..., i : i + 1]
    limit_BxMxW = jnp.where(found_BxMxW, -jnp.inf, jnp.inf)
    lower = jax.vmap(jax.vmap(lambda logits, tokens, limits: logits.at[tokens].min(limits)))
    return lower(logits_BxMxV, tokens_BxMxT[..., size - 1 :], limit_BxMxW)
