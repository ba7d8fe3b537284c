"""`gguf.tokenizer` reads the tokenizer in a GGUF file."""

from pathlib import Path
from typing import Any

from ..._extras import brought_by
from ._reader import GGUFFile, open_gguf


# The names of `transformers` for what it makes a tokenizer of, and llama.cpp's, under `tokenizer.ggml.`.
_PARTS = {
    "tokenizer_type": "model",
    "pre_tokenizer_type": "pre",
    "tokens": "tokens",
    "scores": "scores",
    "token_type": "token_type",
    "merges": "merges",
    "precompiled_charsmap": "precompiled_charsmap",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "unk_token_id": "unknown_token_id",
    "pad_token_id": "padding_token_id",
    "add_prefix_space": "add_space_prefix",
}


def tokenizer(file: str | Path) -> Any:
    """The tokenizer in a GGUF file, as `transformers` makes it, with its special tokens and its chat
    template.

    ```python
    tokenizer = gguf.tokenizer("SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer("The capital of France is")["input_ids"]
    ```

    That of `AutoTokenizer.from_pretrained(dir, gguf_file=...)`, which needs PyTorch to read the file. This
    does not. Nothing is downloaded.

    Raises:
      ValueError: not a GGUF file of a model; no tokenizer in it, or one that `transformers` cannot make.
      ModuleNotFoundError: without `transformers` or the `gguf` package.
    """
    source = open_gguf(file)
    if not source.length("tokenizer.ggml.tokens"):
        raise ValueError(
            f"{source.path} has no tokenizer (`tokenizer.ggml.tokens`); take that of the model's Hugging "
            "Face directory."
        )
    with brought_by("experiments", "lora_jax.interop.gguf.tokenizer"):
        import transformers
        from transformers.integrations.gguf import convert_gguf_tokenizer
    parts = _parts(source)
    try:
        backend, more = convert_gguf_tokenizer(source.value("general.architecture"), parts)
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, **_settings(source, parts), **more
        )
    except Exception as error:  # of whatever class: it meets the file's own words
        raise ValueError(
            f"{source.path} has a tokenizer that transformers {transformers.__version__} cannot make "
            f"({error}); take that of the model's Hugging Face directory."
        ) from error


def _parts(source: GGUFFile) -> dict[str, Any]:
    found = {name: source.value(f"tokenizer.ggml.{theirs}") for name, theirs in _PARTS.items()}
    return {name: value for name, value in found.items() if value is not None}


def _settings(source: GGUFFile, parts: dict[str, Any]) -> dict[str, Any]:
    """Special tokens, the chat template, and whether texts begin and end with tokens of their own."""
    found = {
        f"{name}_token": parts["tokens"][parts[f"{name}_token_id"]]
        for name in ("bos", "eos", "unk", "pad")
        if f"{name}_token_id" in parts
    }
    # llama.cpp begins texts of a SentencePiece vocabulary with BOS where the file does not say.
    usual = {"add_bos_token": True if parts.get("tokenizer_type") == "llama" else None}
    for name in ("add_bos_token", "add_eos_token"):
        found[name] = source.value(f"tokenizer.ggml.{name}", usual.get(name))
    found["chat_template"] = source.value("tokenizer.chat_template")
    return {name: value for name, value in found.items() if value is not None}
