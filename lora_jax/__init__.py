"""LoRA for JAX: a pure parameter transform and a pure function transform. See README.md."""

import importlib as _importlib
import importlib.util as _importlib_util

from . import (
    arithmetic as arithmetic,
    drop as drop,
    methods as methods,
    optim as optim,
    processes as processes,
    quant as quant,
    sharding as sharding,
    subspaces as subspaces,
)
from ._adapt import adapt as adapt
from ._explain import explain as explain
from ._interpret.interpreter import MaterializeError as MaterializeError
from ._lorafy import combine as combine, Lorafied as Lorafied, lorafy as lorafy, partition as partition
from ._merge import merge as merge, merge_report as merge_report, unmerge as unmerge
from ._stack import stack as stack, take as take
from ._summary import count as count, summary as summary
from ._tree.nodes import Adapter as Adapter
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

# Rooms that are imported when they are first asked for, and what each needs. They say themselves which extra
# brings it.
_LAZY = {"baselines": "flax", "checkpoint": "orbax", "interop": "safetensors", "models": "flax"}

# What users of PEFT look for first.
_OF_PEFT = {
    "get_peft_model": "`frozen, delta = lorafy(params, targets=...)` and `adapt(fn)`",
    "LoraConfig": "`LoRA(rank=..., alpha=...)`",
    "PeftModel": "the two trees of `lorafy`; `interop.peft.load(dir, model, params)` reads an adapter",
}

__all__ = sorted(
    [
        *(name for name in globals() if not name.startswith("_")),
        *(name for name, needed in _LAZY.items() if _importlib_util.find_spec(needed) is not None),
    ]
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    if name in _OF_PEFT:
        raise AttributeError(f"`{name}` is PEFT's. Here it is {_OF_PEFT[name]}.")
    if name not in _LAZY:
        raise AttributeError(f"module 'lora_jax' has no attribute {name!r}")
    return _importlib.import_module(f"lora_jax.{name}")
