"""The methods, one short file each. A method is a value: a frozen dataclass passed as `method=` to
`lorafy`.
"""

from .adalora import AdaLoRA as AdaLoRA, orthogonality as orthogonality
from .delta_lora import DeltaLoRA as DeltaLoRA, start_delta as start_delta
from .dora import DoRA as DoRA
from .dylora import DyLoRA as DyLoRA, truncate as truncate
from .full import Full as Full
from .lora import LoRA as LoRA
from .lora_fa import LoRAFA as LoRAFA
from .pissa import PiSSA as PiSSA
from .vera import VeRA as VeRA
