"""PEFT's adapter directories: `adapter_config.json` and `adapter_model.safetensors`, both ways, without
PyTorch.
"""

from ._load import head_of as head_of, load as load
from ._save import save as save
