"""loralib's checkpoints (microsoft/LoRA): a state dict with `lora_A` and `lora_B` beside the names of the
model, in one `.pt` or `.bin` file.

Left out: methods other than LoRA, for which loralib has no layout. They are written as the LoRA that computes
the same, or refused.
"""

from ._load import head_of as head_of, load as load
from ._save import save as save
