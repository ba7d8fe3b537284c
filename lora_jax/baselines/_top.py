"""Fine-tuning of the last layers only (FT-Top2: Li & Liang, ACL 2021)."""

from typing import Any

from ..methods import Full
from ._sites import sites_of, size, unwrapped


def top_layers(model: Any, count: int = 2) -> dict[str, Any]:
    """The targets of a run that trains the last layers: `lorafy(params, top_layers(model))`.

    >>> import lora_jax
    >>> from lora_jax.models import GPT2, GPT2Config
    >>> lora_jax.baselines.top_layers(GPT2(GPT2Config.named("gpt2-medium")))
    {'h/(22|23)/.*': Full()}

    The final norm and the head stay frozen, as in the paper's 25.19M of GPT-2 medium.

    Raises:
      ValueError: not between 1 and the number of layers; layers that are stacked.
    """
    layers, _ = size(model)
    if not 1 <= count <= layers:
        raise ValueError(f"`count` is {count}; it must be between 1 and {layers}, the model's layers.")
    if unwrapped(model).scan:
        raise ValueError(
            "`model` has stacked layers (`scan=True`), which train or stay together. Take single ones: "
            "`model.clone(scan=False)` and `unstack_layers(params)`."
        )
    numbers = "|".join(map(str, range(layers - count, layers)))
    return {f"{sites_of(model).layers}/({numbers})/.*": Full()}
