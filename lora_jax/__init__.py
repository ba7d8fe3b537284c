"""LoRA for JAX: a pure parameter transform and a pure function transform. See README.md."""

from . import arithmetic as arithmetic, drop as drop, methods as methods, optim as optim, quant as quant
from ._adapt import adapt as adapt, explain as explain
from ._interpret import MaterializeError as MaterializeError
from ._lorafy import combine as combine, Lorafied as Lorafied, lorafy as lorafy, partition as partition
from ._merge import (
    count as count,
    merge as merge,
    merge_report as merge_report,
    summary as summary,
    unmerge as unmerge,
)
from ._stack import stack as stack, take as take
from .methods import (
    AdaLoRA as AdaLoRA,
    DeltaLoRA as DeltaLoRA,
    DoRA as DoRA,
    DyLoRA as DyLoRA,
    Full as Full,
    LoRA as LoRA,
    LoRAFA as LoRAFA,
    PiSSA as PiSSA,
    VeRA as VeRA,
)
from .quant import quantize as quantize


__version__ = "0.1.0"
