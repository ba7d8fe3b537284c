"""`attach` brings a baseline to a model: a model that calls it, and parameters that hold its arrays."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from .._lowrank.labels import widened
from .._paths import is_shape, path_seed
from ._baseline import Baseline, New
from ._sites import sites_of


@dataclasses.dataclass(frozen=True)
class Extended:
    """A model with a baseline. `apply`, and all else that the model has, is called as the model's own.

    >>> import jax, jax.numpy as jnp
    >>> from lora_jax import baselines
    >>> from lora_jax.models import GPT2, GPT2Config
    >>> model = GPT2(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2))
    >>> params = model.init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    >>> extended, params = baselines.attach(model, params, baselines.Houlsby(bottleneck=2))
    >>> extended.config.n_layer, extended.apply({"params": params}, jnp.zeros((1, 3), int)).shape
    (2, (1, 3, 11))
    """

    base: Any
    baseline: Baseline

    def apply(self, variables: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """`base.apply`, with the baseline's arrays among the parameters."""
        with nn.intercept_methods(self.baseline.interceptor(self.base, input_ids)):
            return self.base.apply(variables, input_ids, *args, **kwargs)

    def clone(self, **changes: Any) -> "Extended":
        return dataclasses.replace(self, base=self.base.clone(**changes))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("base", "baseline"):
            raise AttributeError(name)
        return getattr(self.base, name)


class Attached(NamedTuple):
    model: Extended
    params: Any


def attach(model: Any, params: Any, baseline: Baseline, *, key: jax.Array | None = None) -> Attached:
    """`model` and `params` with a baseline: `lorafy`, `adapt` and the optimiser take them as any others.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> from lora_jax import baselines
    >>> from lora_jax.models import GPT2, GPT2Config
    >>> model = GPT2(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2))
    >>> params = model.init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    >>> houlsby = baselines.Houlsby(bottleneck=2)
    >>> model, params = baselines.attach(model, params, houlsby)
    >>> frozen, delta = lora_jax.lorafy(params, houlsby.targets)
    >>> lora_jax.count(delta)  # two a layer: 8 · 2 + 2 and 2 · 8 + 8
    168
    >>> combined = lora_jax.combine(frozen, delta)
    >>> lora_jax.adapt(model.apply)({"params": combined}, jnp.zeros((1, 3), int)).shape
    (1, 3, 11)

    Arrays are float32, or float64 beside float64 parameters, and are cast to the dtype of the computation
    where they are used. `params` is not changed. Another baseline may be attached to the result.

    Args:
      model: of `lora_jax.models`, or a result of `attach`.
      params: the model's, a nested dict of arrays or of `jax.ShapeDtypeStruct`; then the new leaves are
        shapes too.
      baseline: `Houlsby(bottleneck=64)`, for example.
      key: for the start; `jax.random.key(0)` if None. Each array's own key is derived from its path.

    Returns:
      `Attached(model, params)`.

    Raises:
      ValueError: a baseline that does not fit the model; parameters that are not the model's, or that have
        such a baseline.
      TypeError: a model that is not of `lora_jax.models`; parameters that are no dict.
    """
    if not isinstance(baseline, Baseline):
        raise TypeError(
            f"`baseline` is {baseline!r}; pass a value of `lora_jax.baselines`, for example "
            "`Houlsby(bottleneck=64)`."
        )
    if not isinstance(params, Mapping):
        raise TypeError(
            f"`params` is a {type(params).__name__}; pass the nested dict that `model.apply` takes."
        )
    sites_of(model)
    key = jax.random.key(0) if key is None else key

    def made(params: Any) -> dict[str, jax.Array]:
        dtype = widened(jnp.result_type(*jax.tree.leaves(params)))
        return {new.path: _drawn(new, key, dtype) for new in baseline.added(model, params)}

    as_shapes = any(map(is_shape, jax.tree.leaves(params)))
    for path, array in (jax.eval_shape(made, params) if as_shapes else made(params)).items():
        params = _with(params, path.split("/"), array, path)
    return Attached(Extended(model, baseline), params)


def _drawn(new: New, key: jax.Array, dtype: Any) -> jax.Array:
    key = jax.random.fold_in(key, path_seed(new.path))
    if new.layers is None:
        return new.draw(key, dtype)
    return jnp.stack([new.draw(each, dtype) for each in jax.random.split(key, new.layers)])


def _with(params: Any, path: list[str], array: Any, whole: str) -> dict:
    """A copy with one more leaf. Of the dicts on the way, only those that a baseline makes may be missing."""
    head, *rest = path
    if not rest:
        if head in params:
            raise ValueError(
                f"`params` already has {whole!r}: it was attached before. Pass the parameters from before."
            )
        return {**params, head: array}
    if head not in params and head not in ("adapter", "down", "up", "norm"):
        raise ValueError(
            f"`params` has no {head!r} of {whole!r}; it has {sorted(params)}. Pass the parameters of this "
            "model: those of stacked layers (`scan=True`) and of single ones differ, `stack_layers(params)`."
        )
    return {**params, head: _with(params.get(head, {}), rest, array, whole)}
