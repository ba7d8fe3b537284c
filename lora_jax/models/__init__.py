"""Flax linen models that know nothing of LoRA. They import flax, and the core of `lora_jax` does not import
them.
"""

from .._extras import brought_by


with brought_by("models", "lora_jax.models"):
    from ._cache import Cache as Cache
    from ._encoder import HEADS as HEADS
    from ._layouts import stack_layers as stack_layers, unstack_layers as unstack_layers
    from ._losses import cross_entropy as cross_entropy
    from .bert import Bert as Bert, BertConfig as BertConfig
    from .deberta import DebertaV2 as DebertaV2, DebertaV2Config as DebertaV2Config
    from .gpt2 import GPT2 as GPT2, GPT2Config as GPT2Config
    from .llama import (
        Gemma2Config as Gemma2Config,
        Gemma3TextConfig as Gemma3TextConfig,
        Llama as Llama,
        LlamaConfig as LlamaConfig,
        MistralConfig as MistralConfig,
        Qwen2Config as Qwen2Config,
        Qwen3Config as Qwen3Config,
    )
    from .roberta import Roberta as Roberta, RobertaConfig as RobertaConfig
