"""Greedy decoding with the model's KV cache: many prompts at a time, one compiled program.

Prompts are padded on the left, so that all rows write their next token in the same slot; the mask keeps padding out. Left out:
beam search, which is how the paper decodes and will stand beside this.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.jit, static_argnames=("model", "end", "max_tokens"))
def _generate(model: Any, params: Any, prompt: jax.Array, mask: jax.Array, *, end: int, max_tokens: int) -> jax.Array:
    """The next `max_tokens` tokens of each row of `prompt`; after `end` a row repeats it."""
    cache = model.init_cache(batch=prompt.shape[0], slots=prompt.shape[1] + max_tokens)
    logits, cache = model.apply({"params": params}, prompt, mask, cache=cache, last_only=True)
    first = jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32)

    def one(carry: tuple, _: None) -> tuple:
        token, cache = carry
        logits, cache = model.apply({"params": params}, token[:, None], cache=cache, last_only=True)
        following = jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32)
        return (jnp.where(token == end, end, following), cache), token

    _, tokens = jax.lax.scan(one, (first, cache), None, length=max_tokens)
    return tokens.T


def greedy(
    model: Any, params: Any, prompts: Sequence[Sequence[int]], *, end: int, max_tokens: int, batch: int = 32
) -> list[list[int]]:
    """The most likely continuation of each prompt, token by token, without the end token.

    `params` are plain: merge first. Raises `ValueError` when a prompt leaves no room for `max_tokens` in the model.
    """
    if not prompts:
        return []
    width = max(len(prompt) for prompt in prompts)
    if width + max_tokens > model.config.n_positions:
        raise ValueError(f"a prompt of {width} tokens and `decode.max_tokens` ({max_tokens}) exceed the model's {model.config.n_positions} positions")
    results = []
    for start in range(0, len(prompts), batch):
        rows = [prompts[min(row, len(prompts) - 1)] for row in range(start, start + batch)]
        ids = np.asarray([[end] * (width - len(row)) + list(row) for row in rows], np.int32)
        mask = np.asarray([[0] * (width - len(row)) + [1] * len(row) for row in rows], np.int32)
        tokens = np.asarray(_generate(model, params, ids, mask, end=end, max_tokens=max_tokens))
        results += [list(map(int, row[: int(np.argmax(row == end)) if (row == end).any() else None])) for row in tokens]
    return results[: len(prompts)]


def clean(text: str) -> str:
    """What the authors keep of a generated text: up to the first blank line, stripped; on one line, as predictions are stored."""
    return " ".join(text.split("\n\n")[0].split())


def texts(model: Any, params: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, max_tokens: int, batch: int) -> list[str]:
    found = greedy(model, params, prompts, end=tokenizer.eos_token_id, max_tokens=max_tokens, batch=batch)
    return [clean(tokenizer.decode(ids)) for ids in found]
