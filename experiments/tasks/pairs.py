"""Rows of a context and its wording, which several tasks read from their own files, as the authors of LoRA
train on them: enc(context) + [eos] and enc(" " + wording) + [eos], of which the second is counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experiments.checks import at_least
from experiments.tasks.splits import Prompt, Splits


Row = tuple[str, str]


@dataclass(frozen=True)
class PairsData:
    """What the sections of such tasks share; each names its task. `truncate`: cut what is longer than
    `seq_len` as the authors do, instead of refusing it.
    """

    task: str
    train: str
    valid: str
    test: str | None = None
    seq_len: int = 512
    truncate: bool = False
    max_rows: int | None = None
    max_valid_rows: int | None = None

    def __post_init__(self):
        at_least(1, "data", self, "seq_len", "max_rows", "max_valid_rows")


def short(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")


def checked(rows: list[Row], split: str, name: str) -> list[Row]:
    """The rows of a split, which are some, and have wordings where it trains."""
    if not rows:
        raise ValueError(f"the data set `{name}` is empty.")
    missing = next((number for number, (_, reference) in enumerate(rows, 1) if not reference), None)
    if missing and split != "test":
        raise ValueError(
            f"example {missing} of `{name}` has no reference, which training and validation need."
        )
    return rows


def encode(rows: list[Row], tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """enc(context) + [eos] and enc(" " + reference) + [eos] of every row; each distinct context is
    encoded once.
    """
    end = tokenizer.eos_token_id
    contexts = list(dict.fromkeys(context for context, _ in rows))
    ids = dict(zip(contexts, _encode_texts(contexts, tokenizer), strict=True))
    completions = _encode_texts([" " + reference for _, reference in rows], tokenizer)
    return [
        ([*ids[context], end], [*completion, end])
        for (context, _), completion in zip(rows, completions, strict=True)
    ]


def _encode_texts(texts: list[str], tokenizer: Any) -> list[list[int]]:
    return (
        tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"] if texts else []
    )


def prepare(
    section: PairsData,
    rows: Mapping[str, list[Row]],
    tokenizer: Any,
    *,
    most: int | None = None,
    parts: Mapping[str, str] | None = None,
) -> Splits:
    """Examples and prompts of the rows of each split.

    `most`: no more references than these, the first, are kept of a context. `parts`: of the test set, by
    context.
    """
    # Imported here, because `score` asks the tasks too, and needs no package.
    from experiments.tasks.examples import Examples

    def examples(split: str, limit: int | None) -> Examples:
        pairs = encode(rows[split][:limit], tokenizer)
        if not section.truncate:
            _refuse_long(pairs, getattr(section, split), section.seq_len, tokenizer)
        return Examples(pairs, section.seq_len)

    train, valid = examples("train", section.max_rows), examples("valid", section.max_valid_rows)
    return Splits(train, valid, _prompts(rows.get("test", []), tokenizer, most, parts or {}))


def _refuse_long(pairs: list[tuple[list[int], list[int]]], split: str, seq_len: int, tokenizer: Any) -> None:
    for number, (context, completion) in enumerate(pairs, 1):
        length = len(context) + len(completion)
        if length > seq_len:
            raise ValueError(
                f"example {number} of `{split}` ({short(tokenizer.decode(context[:-1]))}) has {length} "
                f"tokens, more than `data.seq_len` ({seq_len}); "
                "raise it, or set `data.truncate` to cut the end as the authors do."
            )


def _prompts(
    rows: list[Row], tokenizer: Any, most: int | None, parts: Mapping[str, str]
) -> tuple[Prompt, ...]:
    """One prompt a distinct context, in the order of the file, with its references."""
    references: dict[str, list[str]] = {}
    for context, reference in rows:
        references.setdefault(context, []).append(reference)
    ids = _encode_texts(list(references), tokenizer)
    end = tokenizer.eos_token_id
    return tuple(
        Prompt(context, (*tokens, end), tuple(filter(None, found))[:most], parts.get(context))
        for (context, found), tokens in zip(references.items(), ids, strict=True)
    )
