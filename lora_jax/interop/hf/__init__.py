"""Hugging Face directories: `config.json`, safetensors in one file or in shards, and the files of the
tokenizer.

Reading and writing are strict: a tensor that is missing, unexpected or of another shape is an error that
names it, nothing is cast, and nothing is overwritten. PyTorch is not needed. Left out: quantised checkpoints.
"""

from ._load import load as load
from ._save import save as save
