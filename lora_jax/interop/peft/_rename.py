"""The names that other tools give to PEFT's tensors, for `rename="auto"`.

Compilers, FSDP and trainers wrap modules and leave their own components in the names; some tools leave the
adapter's name in, or PEFT's prefix out. Kohya's and MLX's files have names of their own. A name is only taken
for another where the two pair one to one.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ._layout import PREFIX


_BEFORE = re.compile(
    r"((_orig_mod|_fsdp_wrapped_module|module|model(?=\.base_model\.))\.|base_model\.model\.|base_model\.(?=vera_))+"
)
_WITHIN = re.compile(r"\.(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
# The adapter's own name, which PEFT leaves out.
_ADAPTER = re.compile(
    r"(\.lora_[ABE]|\.lora_embedding_[AB]|\.lora_magnitude_vector|\.vera_lambda_[bd]|^vera_[AB])\.(?!weight$|bias$)[^.]+"
)
_SHORT = {"lora_a": "lora_A", "lora_b": "lora_B", "lora_down": "lora_A", "lora_up": "lora_B"}
_OF_KOHYA = re.compile(r"lora_(unet_|te[12]?_)?([^.]+)\.(lora_A\.weight|lora_B\.weight|alpha)")


class Turned(NamedTuple):
    """A tensor whose axes a file has in the other order, as MLX's do. Its interface is that of `Stored`."""

    tensor: Any

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(reversed(self.tensor.shape))

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    def read(self) -> np.ndarray:
        return self.tensor.read().T


def unwrapped(name: str) -> str:
    """PEFT's name for a tensor that another tool has wrapped.

    >>> unwrapped("module._orig_mod.base_model.model.h.0._fsdp_wrapped_module.c_fc.lora_A.default.weight")
    'base_model.model.h.0.c_fc.lora_A.weight'
    """
    before = _BEFORE.match(name)
    name = _WITHIN.sub("", name[before.end() if before else 0 :])
    name = _ADAPTER.sub(r"\1", name)
    module, _, last = name.rpartition(".")
    if last in ("lora_a", "lora_b"):  # MLX's
        name = f"{module}.{_SHORT[last]}.weight"
    elif last == "weight" and module.rpartition(".")[2] in _SHORT:
        module, _, middle = module.rpartition(".")
        name = f"{module}.{_SHORT[middle]}.weight"
    return f"base_model.{name}" if name.startswith("vera_") else PREFIX + name


def unwrapped_tensors(directory: Path, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors under PEFT's names. Raises `ValueError` where two of them get the same."""
    found: dict[str, Any] = {}
    for name, tensor in stored.items():
        own = unwrapped(name)
        if own in found:
            raise ValueError(
                f"{directory} holds {found[own].name!r} and {name!r}, which are one name without what other "
                "tools add to it: keep the one that is meant."
            )
        found[own] = Turned(tensor) if re.search(r"\.lora_[ab]$", name) else tensor
    return found


def paired(
    directory: Path,
    stored: Mapping[str, Any],
    expected: Mapping[str, tuple[int, ...]],
    alphas: Mapping[str, float],
) -> dict[str, Any]:
    """`stored`, with Kohya's names and those of PEFT's own wrapper in place of the expected names that are
    missing, where they pair one to one. `alphas`: of each module, which Kohya's files repeat.
    """
    missing = expected.keys() - stored.keys()
    flat: dict[str, list[str]] = {}
    for name in missing:
        flat.setdefault(name.removeprefix(PREFIX).replace(".", "_"), []).append(name)
    by_flat_module: dict[str, list[str]] = {}
    for module in alphas:
        by_flat_module.setdefault(module.replace(".", "_"), []).append(module)
    found: dict[str, Any] = {}
    for name, tensor in stored.items():
        kohya = _OF_KOHYA.fullmatch(name.removeprefix(PREFIX))
        inner = re.sub(r"\.modules_to_save(\.[^.]+)?(?=\.(weight|bias)$)", "", name)
        if kohya and kohya[3] == "alpha" and len(modules := by_flat_module.get(kohya[2], [])) == 1:
            _check_alpha(directory, tensor, alphas[modules[0]])
            continue
        candidates = flat.get(f"{kohya[2]}_{kohya[3].replace('.', '_')}", []) if kohya else []
        if inner != name and inner in missing:
            candidates = [inner]
        own = candidates[0] if len(candidates) == 1 and candidates[0] not in found else name
        found[own] = tensor
    return found


def _check_alpha(directory: Path, tensor: Any, alpha: float) -> None:
    value = float(tensor.read())
    if value != np.float32(alpha):
        raise ValueError(
            f"{tensor.name!r} in {directory} is {value:g}, and adapter_config.json says {alpha:g} for that "
            "module: set `lora_alpha` or `alpha_pattern` to what the adapter was trained with."
        )
