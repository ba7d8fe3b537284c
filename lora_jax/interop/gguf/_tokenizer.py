"""`gguf.tokenizer` reads the tokenizer in a GGUF file."""

from pathlib import Path
from typing import Any

from ..._extras import brought_by
from ._reader import open_gguf


def tokenizer(file: str | Path) -> Any:
    """The tokenizer in a GGUF file, as `transformers` makes it, with its special tokens and its chat
    template.

    ```python
    tokenizer = gguf.tokenizer("SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer("The capital of France is")["input_ids"]
    ```

    Nothing is downloaded.

    Raises:
      ValueError: not a GGUF file of a model; no tokenizer in it, or one that `transformers` cannot make.
      ModuleNotFoundError: without `transformers` or the `gguf` package.
    """
    source = open_gguf(file)
    if "tokenizer.ggml.tokens" not in source.fields:
        raise ValueError(
            f"{source.path} has no tokenizer (`tokenizer.ggml.tokens`); take that of the model's Hugging "
            "Face "
            "directory."
        )
    with brought_by("experiments", "lora_jax.interop.gguf.tokenizer"):
        import transformers
    path = source.path.resolve()
    try:
        return transformers.AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True
        )
    except Exception as error:  # of whatever class: it meets the file's own words
        raise ValueError(
            f"{source.path} has a tokenizer that transformers {transformers.__version__} cannot make "
            f"({error}); take that of the model's Hugging Face directory."
        ) from error
