"""Reads and writes other tools' files. Each room imports what it needs, and none needs PyTorch."""

from .._extras import brought_by


with brought_by("models", "lora_jax.interop"):
    from . import gguf as gguf, hf as hf, loralib as loralib, peft as peft
    from ._imports import OneSided as OneSided
