"""Flax linen models that know nothing of LoRA. They import flax; the core of `lora_jax` does not import them."""

from ._cache import Cache as Cache
from ._layers import stack_layers as stack_layers
from ._layers import unstack_layers as unstack_layers
from ._encoder import HEADS as HEADS
from .deberta import DebertaV2 as DebertaV2
from .deberta import DebertaV2Config as DebertaV2Config
from .gpt2 import GPT2 as GPT2
from .gpt2 import GPT2Config as GPT2Config
from .roberta import Roberta as Roberta
from .roberta import RobertaConfig as RobertaConfig
