"""Flax linen models that know nothing of LoRA. They import flax; the core of `lora_jax` does not import them."""

from ._layers import stack_layers as stack_layers
from ._layers import unstack_layers as unstack_layers
from .gpt2 import GPT2 as GPT2
from ._cache import Cache as Cache
from .gpt2 import GPT2Config as GPT2Config
