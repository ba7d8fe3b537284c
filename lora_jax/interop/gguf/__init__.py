"""GGUF files, llama.cpp's format: models of the Llama family, the tokenizers in them, and adapters beside
them.

Everything is read through the `gguf` package (extra `gguf`), which is imported where it is used. Reading is
as strict as `hf.load`: a tensor that is missing, unexpected or of another shape is an error that names it,
and so is a setting in the file that is not known. Left out: files in several parts, files of big-endian
machines, experts.
"""

from ._load import load as load
from ._save_adapter import save_adapter as save_adapter
from ._tokenizer import tokenizer as tokenizer
