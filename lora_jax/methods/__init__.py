"""The methods, one short file each. A method is a value: a frozen dataclass passed as `method=` to `lorafy`."""

from .full import Full as Full
from .lora import LoRA as LoRA
