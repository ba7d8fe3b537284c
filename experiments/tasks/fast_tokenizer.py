"""A tokenizer read by `tokenizers` alone: a start of a run without `transformers`, whose import takes
seconds, and PyTorch's with it where that is installed.

`read` takes a directory only where the file `tokenizer.json` says all that `transformers` would make of it.
It makes tokenizers of some classes anew, from the words in the file and the class's own rules, and so `read`
knows GPT-2's class and the one that takes the file as it is. Left out: every other directory, special tokens
around a text, and padding.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


# The special tokens that have names, in the order of `transformers`' `all_special_tokens`.
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# It takes `tokenizer.json` as it is.
_AS_IT_IS = ("TokenizersBackend", "PreTrainedTokenizerFast")
_GPT2 = ("GPT2Tokenizer", "GPT2TokenizerFast")
# Types of models beside which these classes are what they say; beside others, `transformers` may take
# another.
_MODELS = ("gpt2", "llama", None)
# What a `tokenizer_config.json` may say beside the names above: nothing of it changes which ids a text has.
# The first two are about special tokens around a text.
_HARMLESS = {
    *("add_bos_token", "add_eos_token", "backend", "chat_template", "errors", "is_local"),
    *("local_files_only", "model_max_length", "name_or_path", "padding_side", "tokenizer_class"),
}
# Of earlier versions, which say more.
_FURTHER = ("special_tokens_map.json", "added_tokens.json")
# Above this number of tokens `transformers` looks for a fault of Mistral's files, and mends it.
_MOST = 100_000


@dataclass(frozen=True)
class FastTokenizer:
    """What a run needs of a tokenizer, under `transformers`' names. `named`: the special tokens."""

    backend: Any
    named: dict[str, str]

    def __call__(
        self,
        text: str | list[str],
        *,
        add_special_tokens: bool,
        return_attention_mask: bool = False,
        verbose: bool = False,
    ) -> dict[str, Any]:
        """`input_ids` of a text, or of each of several, and nothing around them."""
        if add_special_tokens or return_attention_mask:
            raise ValueError("`add_special_tokens` and `return_attention_mask` must be False here.")
        several = [text] if isinstance(text, str) else text
        ids = [found.ids for found in self.backend.encode_batch(several, add_special_tokens=False)]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def decode(self, ids: Any, *, clean_up_tokenization_spaces: bool = False) -> str:
        """The text, special tokens included."""
        if clean_up_tokenization_spaces:
            raise ValueError("`clean_up_tokenization_spaces` must be False here.")
        return self.backend.decode(list(ids), skip_special_tokens=False)

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys(self.named[name] for name in _NAMES if name in self.named))

    @property
    def bos_token(self) -> str | None:
        return self.named.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.named.get("eos_token")

    @property
    def pad_token(self) -> str | None:
        return self.named.get("pad_token")

    @property
    def unk_token(self) -> str | None:
        return self.named.get("unk_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._id("pad_token")

    def _id(self, name: str) -> int | None:
        return self.backend.token_to_id(self.named[name]) if name in self.named else None


def read(directory: Path) -> FastTokenizer | None:
    """The tokenizer in a directory, or None where only `transformers` knows what it is."""
    if any((directory / name).exists() for name in _FURTHER):
        return None
    try:
        config, file = (_json(directory / name) for name in ("tokenizer_config.json", "tokenizer.json"))
        beside = directory / "config.json"
        model = _json(beside).get("model_type") if beside.is_file() else None
        named = _named(config, file)
        if named is None or model not in _MODELS or not _as_the_file_says(config, file):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no such file, or not of this form
        return None
    import tokenizers

    return FastTokenizer(tokenizers.Tokenizer.from_str(json.dumps(file)), named)


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text("utf-8"))


def _named(config: dict[str, Any], file: dict[str, Any]) -> dict[str, str] | None:
    """The special tokens that have names; None where `transformers` would add to what the file has, or knows
    of more.
    """
    plain = ("single_word", "lstrip", "rstrip")
    added = file["added_tokens"]
    if any(token[flag] for token in added for flag in plain):
        return None
    special = {token["content"] for token in added if token["special"]}
    named = {name: config[name] for name in _NAMES if config.get(name) is not None}
    # GPT-2's class would name its own.
    said = config["tokenizer_class"] in _AS_IT_IS or {"bos_token", "eos_token", "unk_token"} <= set(named)
    return named if said and set(named.values()) <= special else None


def _as_the_file_says(config: dict[str, Any], file: dict[str, Any]) -> bool:
    """Whether `transformers` would make a tokenizer that is `file`."""
    kind, prefix = config["tokenizer_class"], config.get("add_prefix_space", False)
    known = set(config) <= _HARMLESS | set(_NAMES) | {"add_prefix_space", "clean_up_tokenization_spaces"}
    if (
        not known
        or config.get("clean_up_tokenization_spaces", False)
        or config.get("backend", "tokenizers") != "tokenizers"
        or file["truncation"] is not None
        or file["padding"] is not None
        or len(file["model"]["vocab"]) + len(file["added_tokens"]) > _MOST
    ):
        return False
    return (kind in _AS_IT_IS and not prefix) or (kind in _GPT2 and _is_gpt2s(file, prefix, config))


def _is_gpt2s(file: dict[str, Any], prefix: bool, config: dict[str, Any]) -> bool:
    """Whether the file has what `transformers`' class of GPT-2 makes of its words."""
    model, before = file["model"], file["pre_tokenizer"]
    rules = ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "fuse_unk", "byte_fallback")
    return (
        model["type"] == "BPE"
        and not any(model.get(rule) for rule in (*rules, "ignore_merges", "unk_token"))
        and file["normalizer"] is None
        and before["type"] == file["decoder"]["type"] == "ByteLevel"
        and before["add_prefix_space"] == prefix
        and before.get("use_regex", True)
        and {token["content"] for token in file["added_tokens"]} <= {config.get(name) for name in _NAMES}
    )
