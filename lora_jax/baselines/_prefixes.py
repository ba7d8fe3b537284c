"""Prefixes: special tokens in the text whose states are trained (LoRA's paper, section 5.1).

A special token is one beyond the vocabulary, V, V + 1, …, and stands in `input_ids` as any other does. So
masks, positions, labels, segments and caches need nothing of their own: the text is longer by its special
tokens. `insert` puts them around a prompt. The first `prefix` of them stand before it, "prefixing", and
`infix` after it, "infixing", before the completion. A special token is never predicted.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..models._layouts import unstack_layers
from ._baseline import Baseline, New, own
from ._sites import sites_of, size, unwrapped, within_layer


@dataclasses.dataclass(frozen=True)
class _Prefix(Baseline):
    prefix: int
    infix: int = 0
    words: tuple[int, ...] = ()
    std: float = 0.02

    leaf: ClassVar[str] = "prefix"

    def __post_init__(self) -> None:
        if min(self.prefix, self.infix) < 0 or self.tokens < 1:
            raise ValueError(
                f"`prefix` is {self.prefix} and `infix` is {self.infix}; neither may be negative, and "
                "together "
                "they must be at least 1."
            )

    @property
    def tokens(self) -> int:
        """How many special tokens there are."""
        return self.prefix + self.infix

    def insert(self, model: Any, prompt: Sequence[int]) -> list[int]:
        """The tokens of a prompt with the special ones around it.

        >>> import lora_jax
        >>> from lora_jax.models import GPT2, GPT2Config
        >>> lora_jax.baselines.PrefixEmbedding(prefix=2, infix=1).insert(GPT2(GPT2Config()), [5, 6, 7])
        [50257, 50258, 5, 6, 7, 50259]

        An encoder's prompt keeps its first token in front, because the head reads that one.
        """
        start, first = unwrapped(model).config.vocab_size, sites_of(model).first
        special, tokens = list(range(start, start + self.tokens)), list(prompt)
        return tokens[:first] + special[: self.prefix] + tokens[first:] + special[self.prefix :]

    def _drawn(self, width: int) -> Callable:
        return lambda key, dtype: self.std * jax.random.normal(key, (self.tokens, width), dtype)

    def _words(self, model: Any) -> Any:
        """As many of `words` as there are special tokens, again from the first where there are fewer."""
        vocabulary = unwrapped(model).config.vocab_size
        if not all(0 <= word < vocabulary for word in self.words):
            raise ValueError(
                f"`words` are {self.words}; they must be tokens of the vocabulary, {vocabulary}."
            )
        return np.resize(np.asarray(self.words, np.int32), self.tokens)


def _fixed(array: jax.Array) -> Callable:
    return lambda key, dtype: array.astype(dtype)


def _special(model: Any, input_ids: Any) -> tuple[jax.Array, jax.Array]:
    """Where a special token is, (B, T), and its number among them, 0 elsewhere."""
    ids = jnp.asarray(input_ids)
    start = unwrapped(model).config.vocab_size
    return ids >= start, jnp.maximum(ids - start, 0)


def _placed(
    x_BxTxD: jax.Array, states: jax.Array, special_BxT: jax.Array, number_BxT: jax.Array
) -> jax.Array:
    """`x` with the trained states at the special tokens; NaN at one that does not exist."""
    trained_BxTxD = states.astype(x_BxTxD.dtype).at[number_BxT].get(mode="fill", fill_value=jnp.nan)
    return jnp.where(special_BxT[..., None], trained_BxTxD, x_BxTxD)


@dataclasses.dataclass(frozen=True)
class PrefixEmbedding(_Prefix):
    """Prefix-embedding tuning: the special tokens have trained word embeddings. d · (prefix + infix)
    parameters.

    >>> import lora_jax
    >>> lora_jax.baselines.PrefixEmbedding(prefix=256, infix=8).tokens  # of width 12,288: 3.2M in GPT-3
    264

    Args:
      prefix, infix: how many tokens before and after the prompt.
      words: tokens whose embeddings they start from, in turn; otherwise they are normal numbers.
      std: of these.

    Raises:
      ValueError: no special token; `words` beyond the vocabulary.
    """

    def added(self, model: Any, params: Any) -> list[New]:
        path, draw = sites_of(model).words, self._drawn(_embedding_width(model))
        if self.words:
            draw = _fixed(jnp.asarray(_at(params, path)["embedding"])[self._words(model)])
        return [New(f"{path}/prefix", draw)]

    def interceptor(self, model: Any, input_ids: Any) -> Callable:
        words = tuple(sites_of(model).words.split("/"))

        def intercept(next_fun: Callable, args: Any, kwargs: Any, context: Any) -> Any:
            if context.method_name != "__call__" or context.module.path != words:
                return next_fun(*args, **kwargs)
            special, number = _special(model, args[0])
            x = next_fun(jnp.where(special, 0, args[0]), **kwargs)
            return _placed(x, own(context.module, "prefix"), special, number)

        return intercept


@dataclasses.dataclass(frozen=True)
class PrefixLayer(_Prefix):
    """Prefix-layer tuning: at the special tokens, the input of every layer is a trained one in place of what
    the layer before computed. L · d · (prefix + infix) parameters.

    >>> import lora_jax
    >>> lora_jax.baselines.PrefixLayer(prefix=8, infix=8).tokens
    16

    The paper speaks of the activations after every layer, and counts L of them. Those after the last layer
    reach no result, and the input of the first is what its prefix-embedding tuning trains: so these L are the
    embedding and all but the last. The arguments are `PrefixEmbedding`'s; `words` start each layer's states
    from those that the words, as a text, have there.
    """

    def added(self, model: Any, params: Any) -> list[New]:
        layers, width = size(model)
        at, stacked = sites_of(model).layers, unwrapped(model).scan
        paths = [f"{at}/prefix"] if stacked else [f"{at}/{index}/prefix" for index in range(layers)]
        if not self.words:
            return [New(path, self._drawn(width), layers if stacked else None) for path in paths]
        states = _layer_inputs(model, params, self._words(model))
        found = [jnp.stack(states)] if stacked else states
        return [New(path, _fixed(array)) for path, array in zip(paths, found, strict=True)]

    def interceptor(self, model: Any, input_ids: Any) -> Callable:
        special, number = _special(model, input_ids)
        words = tuple(sites_of(model).words.split("/"))

        def intercept(next_fun: Callable, args: Any, kwargs: Any, context: Any) -> Any:
            if context.method_name != "__call__":
                return next_fun(*args, **kwargs)
            if context.module.path == words:  # some embedding; the first layer does not see it
                return next_fun(jnp.where(_special(model, args[0])[0], 0, args[0]), **kwargs)
            if within_layer(model, context.module.path) == "":
                x = _placed(args[0], own(context.module, "prefix"), special, number)
                return next_fun(x, *args[1:], **kwargs)
            return next_fun(*args, **kwargs)

        return intercept


def _layer_inputs(model: Any, params: Any, words: Any) -> list[jax.Array]:
    """The inputs of the layers when the model reads `words`, (tokens, D) each."""
    base, sites = unwrapped(model), sites_of(model)
    if base.scan:
        base, params = base.clone(scan=False), unstack_layers(params, sites.layers)
    found = []

    def keep(next_fun: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name == "__call__" and within_layer(base, context.module.path) == "":
            found.append(args[0][0])
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(keep):
        base.clone(checkpoint=False).apply({"params": params}, words[None])
    return found


def _embedding_width(model: Any) -> int:
    config = unwrapped(model).config
    return getattr(config, "embedding_width", None) or size(model)[1]


def _at(tree: Any, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree
