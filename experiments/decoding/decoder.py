"""From prompts to texts. Faults are found before training, prompts of like length go together, and texts are
cut as the authors cut them.

Each batch is padded to a power of two, so that a data set needs few compiled programs. The search itself is
in `search`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from experiments import tasks
from experiments.config import Config, Decode
from experiments.decoding.search import search
from experiments.tasks import Task
from experiments.tasks.examples import padded_width, Prompt
from lora_jax.processes import on_host


@dataclass(frozen=True)
class Decoder:
    """The prompts of a run, as they go into its model, and how they are continued, whatever the weights.
    `task`: whose prompts they are.
    """

    model: Any
    tokenizer: Any
    section: Decode
    end: tuple[int, ...]
    prompts: tuple[Prompt, ...]
    task: Task

    @classmethod
    def create(cls, config: Config, model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> "Decoder":
        """Where the task cuts what is too long (`data.truncate`), prompts lose their beginning to leave room
        in `data.seq_len`, as the authors cut them.

        Raises `ValueError` for prompts that are too long otherwise, and for end tokens and widths that the
        vocabulary does not have.
        """
        chosen = prompts[: config.decode.prompts]
        task = tasks.of(config.data)
        if chosen and task.cuts(config.data):
            room = config.data.seq_len - config.decode.max_tokens
            if room < 1:
                raise ValueError(
                    f"`decode.max_tokens` ({config.decode.max_tokens}) leaves no room for a prompt in "
                    f"`data.seq_len` ({config.data.seq_len})."
                )
            chosen = [replace(prompt, ids=prompt.ids[-room:]) for prompt in chosen]
        end = end_tokens(config.decode, tokenizer)
        _check(model.config, [prompt.ids for prompt in chosen], config.decode, end)
        return cls(model, tokenizer, config.decode, end, tuple(chosen), task)

    def texts(
        self, params: Any, count: int | None = None, *, tell: Callable[[int], None] = lambda done: None
    ) -> list[str]:
        """The texts that plain `params` (merge first) make of the first `count` prompts, or of all."""
        ids = [prompt.ids for prompt in self.prompts[:count]]
        found = generate(self.model, params, ids, self.section, end=self.end, tell=tell)
        texts = (self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False) for tokens in found)
        marks = boundaries(self.tokenizer)
        return [clean(text, marks) for text in texts]


def generate(
    model: Any,
    params: Any,
    prompts: Sequence[Sequence[int]],
    section: Decode,
    *,
    end: tuple[int, ...],
    tell: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """The continuation of each prompt that `section` asks for, without its end token.

    What a prompt gets depends on the prompt, and its place among `prompts` where it is drawn, but not on its
    batch. `tell` is called with the number of prompts that are done. Raises `ValueError` when a prompt leaves
    no room for `max_tokens` in the model.
    """
    _check(model.config, prompts, section, end)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    results: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), section.batch):
        rows = order[start : start + section.batch]
        filled = rows + rows[-1:] * (section.batch - len(rows))
        width = padded_width(len(prompts[rows[-1]]), model.config.positions - section.max_tokens)
        # The padding is any token at all: the mask keeps it out.
        ids = np.asarray(
            [[end[0]] * (width - len(prompts[row])) + list(prompts[row]) for row in filled], np.int32
        )
        mask = np.asarray(
            [[0] * (width - len(prompts[row])) + [1] * len(prompts[row]) for row in filled], np.int32
        )
        tokens = on_host(search(model, params, ids, mask, _keys(section, filled), section=section, end=end))
        for row, found in zip(rows, tokens.tolist(), strict=False):
            results[row] = found[: next((place for place, token in enumerate(found) if token in end), None)]
        tell(start + len(rows))
    return results


def _keys(section: Decode, rows: Sequence[int]) -> jax.Array | None:
    """A key a prompt, from its place in the input. So neither sorting nor the size of the batch changes the
    draws.
    """
    if section.sample is None:
        return None
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return fold(jax.random.key(section.sample.seed), np.asarray(rows, np.int32))


def _check(config: Any, prompts: Sequence[Sequence[int]], section: Decode, end: tuple[int, ...]) -> None:
    lengths = [len(prompt) for prompt in prompts]
    if lengths and max(lengths) + section.max_tokens > config.positions:
        raise ValueError(
            f"a prompt of {max(lengths)} tokens and `decode.max_tokens` ({section.max_tokens}) exceed the "
            f"model's {config.positions} positions."
        )
    if lengths and min(lengths) == 0:
        raise ValueError(f"prompt {lengths.index(0) + 1} is empty: there is nothing to continue.")
    if section.beams > config.vocab_size:
        raise ValueError(
            f"`decode.beams` ({section.beams}) is more than the vocabulary has tokens ({config.vocab_size})."
        )
    outside = [token for token in end if not 0 <= token < config.vocab_size]
    if outside:
        raise ValueError(
            f"`decode.end` has the token {outside[0]}, which is not in the vocabulary of {config.vocab_size}."
        )


def end_tokens(section: Decode, tokenizer: Any) -> tuple[int, ...]:
    """The tokenizer's end of text, then those of `section.end`."""
    found = [tokenizer.eos_token_id]
    for item in section.end:
        ids = tokenizer(item, add_special_tokens=False)["input_ids"] if isinstance(item, str) else [item]
        if len(ids) != 1:
            raise ValueError(
                f"`decode.end` has {item!r}, which the tokenizer encodes as {len(ids)} tokens ({ids}); an "
                "end must be a single one."
            )
        found += ids
    return tuple(dict.fromkeys(found))


def boundaries(tokenizer: Any) -> tuple[str, ...]:
    """The texts of the tokens that stand between texts and never in one: GPT-2 has the end of text alone, a
    model of chats the ends of turns too. What stands for an unknown word is none of them.
    """
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    unknown = {tokenizer.unk_token} - set(named)
    return tuple(mark for mark in tokenizer.all_special_tokens if mark not in unknown)


def clean(text: str, marks: Iterable[str]) -> str:
    """What the authors keep of a generated text: up to the first of the `marks` and the first blank line,
    stripped; on one line, as predictions are stored.

    >>> clean(" A pub .<|endoftext|>B", ["<|endoftext|>"])
    'A pub .'
    """
    for mark in marks:
        text = text.split(mark)[0]
    return " ".join(text.split("\n\n")[0].split())
