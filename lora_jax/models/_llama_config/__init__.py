"""The configurations of the Llama family: one class for each `model_type`."""

from .family import FamilyConfig as FamilyConfig
from .gemma import Gemma2Config as Gemma2Config, Gemma3TextConfig as Gemma3TextConfig
from .llama import LlamaConfig as LlamaConfig, MistralConfig as MistralConfig
from .qwen import Qwen2Config as Qwen2Config, Qwen3Config as Qwen3Config
