"""Adapters: small networks between the layers of a model (LoRA's paper, section 5.1).

One maps x to x + up(activation(down(x))), with `down` from the model's width to the bottleneck, `up` back,
and biases. So r of bottleneck and d of width make 2·d·r + r + d parameters each.

Left out: AdapterFusion's sum over tasks, and AdapterDrop's robust training, which drops other layers in each
step.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ..models._layers import ACTIVATIONS, layer_norm
from ._baseline import Baseline, New, own
from ._sites import Site, Sites, sites_of, size, unwrapped, WHOLE, within_layer


_EPSILON = 1e-5  # of a norm of its own


@dataclasses.dataclass(frozen=True)
class _Adapters(Baseline):
    bottleneck: int
    activation: str = "relu"
    dropped: int = 0
    std: float = 0.01
    up_std: float = 0.0

    leaf: ClassVar[str] = "adapter/.*"
    normed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.bottleneck < 1:
            raise ValueError(f"`bottleneck` is {self.bottleneck}; it must be at least 1.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"`activation` is {self.activation!r}; choose one of {sorted(ACTIVATIONS)}.")
        if self.dropped < 0:
            raise ValueError(
                f"`dropped` is {self.dropped}; it must be 0, or how many layers have no adapter."
            )
        for name in ("std", "up_std"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must not be negative.")

    @abc.abstractmethod
    def sites(self, sites: Sites) -> tuple[Site, ...]:
        """Those of one layer."""

    def added(self, model: Any, params: Any) -> list[New]:
        found, (layers, width) = sites_of(model), size(model)
        stacked = unwrapped(model).scan
        if self.dropped >= layers:
            raise ValueError(
                f"`dropped` is {self.dropped}, and the model has {layers} layers: no adapter would be left. "
                f"Pass at most {layers - 1}."
            )
        if stacked and self.dropped:
            raise ValueError(
                f"`dropped` is {self.dropped}, and the model's layers are stacked (`scan=True`), so that all "
                "are alike. Take single ones: `model.clone(scan=False)` and `unstack_layers(params)`."
            )
        numbers = [""] if stacked else [str(index) for index in range(self.dropped, layers)]
        return [
            New("/".join(filter(None, (found.layers, number, site.holder, "adapter", part))), draw, many)
            for many in [layers if stacked else None]
            for number in numbers
            for site in self.sites(found)
            for part, draw in self._parts(width).items()
        ]

    def _parts(self, width: int) -> dict[str, Callable]:
        zeros = lambda size: lambda key, dtype: jnp.zeros(size, dtype)
        parts = {
            "down/kernel": _normal((width, self.bottleneck), self.std),
            "down/bias": zeros(self.bottleneck),
            "up/kernel": _normal((self.bottleneck, width), self.up_std),
            "up/bias": zeros(width),
        }
        if self.normed:
            ones = lambda key, dtype: jnp.ones(width, dtype)
            parts |= {"norm/scale": ones, "norm/bias": zeros(width)}
        return parts

    def interceptor(self, model: Any, input_ids: Any) -> Callable:
        found = sites_of(model)
        by_call = {site.called: site for site in self.sites(found)}

        def intercept(next_fun: Callable, args: Any, kwargs: Any, context: Any) -> Any:
            called = within_layer(model, context.module.path)
            site = None if called is None or context.method_name != "__call__" else by_call.get(called)
            holder = context.module.parent if site is not None and site.call else context.module
            arrays = None if site is None else own(holder, "adapter")
            if arrays is None:  # another module, or a layer without an adapter
                return next_fun(*args, **kwargs)
            if site == found.norm:
                (x,) = args
                return next_fun(x + self._added_to(next_fun(x), arrays))
            result = next_fun(*args, **kwargs)
            if isinstance(result, tuple):  # beside the slots of a cache
                return result[0] + self._added_to(result[0], arrays), *result[1:]
            return result + self._added_to(result, arrays)

        return intercept

    def _added_to(self, x: jax.Array, arrays: Any) -> jax.Array:
        if self.normed:
            x = layer_norm(x, arrays["norm"]["scale"], arrays["norm"]["bias"], _EPSILON, x.dtype)
        return _dense(ACTIVATIONS[self.activation](_dense(x, arrays["down"])), arrays["up"])


def _normal(shape: tuple[int, ...], std: float) -> Callable:
    """Normal numbers that are cut off at two standard deviations, as Houlsby et al. draw them (section
    3.6).
    """
    if std == 0:
        return lambda key, dtype: jnp.zeros(shape, dtype)
    return lambda key, dtype: std * jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)


def _dense(x: jax.Array, arrays: Any) -> jax.Array:
    bias = arrays["bias"].astype(x.dtype)
    return x @ arrays["kernel"].astype(x.dtype) + bias.reshape((1,) * (x.ndim - 1) + (-1,))


@dataclasses.dataclass(frozen=True)
class Houlsby(_Adapters):
    """The paper's Adapter^H: one after attention and one after the feed-forward half, each before its
    residual sum (Houlsby et al., ICML 2019, figure 2).

    >>> import lora_jax
    >>> lora_jax.baselines.Houlsby(bottleneck=64).targets
    {'adapter/.*': Full()}

    Their paper trains the layers' norms too, LoRA's does not count them: `{**houlsby.targets,
    "ln_1/.*|ln_2/.*": Full()}` does in GPT-2.

    Args:
      bottleneck: r.
      activation: a name of `transformers`; theirs is the tanh form of gelu.
      dropped: AdapterDrop (Rücklé et al., EMNLP 2021): so many of the first layers have none.
      std: of `down` at the start. Biases start at zero.
      up_std: of `up`. At 0 the model starts as it was, exactly; theirs is 0.01 for both.

    Raises:
      ValueError: an argument out of range.
    """

    activation: str = "gelu_new"

    def sites(self, sites: Sites) -> tuple[Site, ...]:
        return sites.attention, sites.feed_forward


@dataclasses.dataclass(frozen=True)
class Pfeiffer(_Adapters):
    """The paper's Adapter^P: one in each layer, after the feed-forward half (Pfeiffer et al., EACL 2021).

    >>> import lora_jax
    >>> lora_jax.baselines.Pfeiffer(bottleneck=48, dropped=8)  # with AdapterDrop
    Pfeiffer(bottleneck=48, activation='relu', dropped=8, std=0.01, up_std=0.0)

    In BERT's layers, where a norm follows the residual sum, h being the sum, the result is `norm(h +
    adapter(norm(h)))` with the model's own norm, and where no norm follows it is h + adapter(h). The
    arguments are `Houlsby`'s.
    """

    def sites(self, sites: Sites) -> tuple[Site, ...]:
        return (sites.norm or WHOLE,)


@dataclasses.dataclass(frozen=True)
class Lin(_Adapters):
    """The paper's Adapter^L: one after each layer, of a norm of its own: h + up(relu(down(norm(h)))) (Lin et
    al., Findings of EMNLP 2020).

    >>> import lora_jax
    >>> lora_jax.baselines.Lin(bottleneck=6).bottleneck  # 0.37M parameters in GPT-2 medium
    6

    The norm is trained, which makes 2·d parameters more. The arguments are `Houlsby`'s.
    """

    normed: ClassVar[bool] = True

    def sites(self, sites: Sites) -> tuple[Site, ...]:
        return (WHOLE,)
