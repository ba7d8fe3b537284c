"""PEFT's adapter directories, `adapter_config.json` and `adapter_model.safetensors`: read and written without
PyTorch.
"""

from ._load import head_of as head_of, load as load
from ._save import save as save
