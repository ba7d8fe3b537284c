"""Hugging Face directories: `config.json`, safetensors in one file or in shards, and the files of the
tokenizer.

Strict both ways: a tensor that is missing, unexpected or of another shape is an error that names it, nothing
is cast, and nothing is written over. PyTorch is not needed. Left out: quantised checkpoints.
"""

from ._load import load as load
from ._save import save as save
