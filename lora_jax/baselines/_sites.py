"""Where in a model a baseline acts: which module's call it changes, and beside whose parameters its arrays
lie.
"""

import dataclasses
from typing import Any

from ..models import Bert, DebertaV2, GPT2, Llama, Roberta


@dataclasses.dataclass(frozen=True)
class Site:
    """The call of a module in a layer. `holder`: the module beside whose parameters the arrays lie, "" being
    the layer itself. `call`: the module in the holder that is called, "" being the holder.
    """

    holder: str
    call: str = ""

    @property
    def called(self) -> str:
        return "/".join(filter(None, (self.holder, self.call)))


@dataclasses.dataclass(frozen=True)
class Sites:
    """`words`: the embedding of tokens. `layers`: what holds the layers. `attention`, `feed_forward`: the two
    halves of a layer, after their dropout and before the residual sum. `norm`: the norm of the sum after the
    second half, of layers that have it there. `width`, `count`: the config's fields. `first`: how many tokens
    a text must begin with, because the head reads the first.
    """

    words: str
    layers: str
    attention: Site
    feed_forward: Site
    norm: Site | None
    width: str
    count: str
    first: int


_ENCODER = Sites(
    words="embeddings/word_embeddings",
    layers="encoder/layer",
    attention=Site("attention/output", "Dropout_0"),
    feed_forward=Site("output", "Dropout_0"),
    norm=Site("output", "LayerNorm"),
    width="hidden_size",
    count="num_hidden_layers",
    first=1,
)
_SITES: dict[type, Sites] = {
    GPT2: Sites("wte", "h", Site("attn"), Site("mlp"), None, "n_embd", "n_layer", first=0),
    Llama: Sites(
        *("embed_tokens", "layers", Site("self_attn"), Site("mlp"), None),
        *("hidden_size", "num_hidden_layers"),
        first=0,
    ),
    Bert: _ENCODER,
    Roberta: _ENCODER,
    DebertaV2: _ENCODER,
}
WHOLE = Site("")


def sites_of(model: Any) -> Sites:
    """
    Raises:
      TypeError: no model of `lora_jax.models`.
    """
    found = next((sites for kind, sites in _SITES.items() if isinstance(unwrapped(model), kind)), None)
    if found is None:
        raise TypeError(
            f"`model` is a {type(model).__name__}; pass a model of `lora_jax.models`, "
            f"{', '.join(kind.__name__ for kind in _SITES)}."
        )
    return found


def unwrapped(model: Any) -> Any:
    """The Flax module in as many baselines as there are."""
    while hasattr(model, "baseline"):
        model = model.base
    return model


def size(model: Any) -> tuple[int, int]:
    """How many layers, and their width."""
    sites, config = sites_of(model), unwrapped(model).config
    return getattr(config, sites.count), getattr(config, sites.width)


def within_layer(model: Any, path: tuple[str, ...]) -> str | None:
    """The path in its layer of the module at `path`, "" for the layer itself; None outside of the layers."""
    layers = tuple(sites_of(model).layers.split("/"))
    if path[: len(layers)] != layers:
        return None
    rest = path[len(layers) :]
    if unwrapped(model).scan:
        return "/".join(rest)
    return "/".join(rest[1:]) if rest else None  # the first names the layer
