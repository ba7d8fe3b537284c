"""Rotary positions (Su et al. 2021) and the ways to stretch them over longer texts.

The two halves of a head are the two coordinates of its K/2 planes, as in Hugging Face's files: plane i turns
the numbers i and i + K/2 by the angle position · frequency_i. (Meta's own files and GGUF have neighbours
there.)
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ._layers import accumulator


# A number, or None where the kind has none of it, as `__post_init__` checks.
Setting = Any


@dataclasses.dataclass(frozen=True)
class Rope:
    """How fast each plane of a head turns, under Hugging Face's names.

    ```python
    Rope(theta=500_000.0)                # frequencies theta^(-2i/K)
    Rope(kind="linear", factor=4.0)      # all of them divided by the factor (Chen et al. 2023)
    Rope(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
         original_max_position_embeddings=8192)
    ```

    `kind`: "default"; "linear"; "dynamic", a base that grows with the text beyond the model's positions;
    "llama3", slow planes divided, fast ones kept, and a ramp between (Llama 3.1); "yarn", the same with a
    ramp over the planes and sharper attention (Peng et al. 2023).

    Raises:
      ValueError: a kind that does not exist, a number out of range, or a setting that the kind lacks or does
        not have.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: Setting = None
    original_max_position_embeddings: Setting = None
    low_freq_factor: Setting = None
    high_freq_factor: Setting = None
    attention_factor: Setting = None
    beta_fast: Setting = None
    beta_slow: Setting = None
    mscale: Setting = None
    mscale_all_dim: Setting = None
    truncate: bool | None = None

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(
                f"`rope_type` is {self.kind!r}, which is not supported; choose one of {list(_KINDS)}."
            )
        needed, further = _KINDS[self.kind]
        for field in dataclasses.fields(self)[2:]:
            value = getattr(self, field.name)
            if value is None and field.name in needed:
                raise ValueError(f"`rope_type` is {self.kind!r}, which needs `{field.name}`; add it.")
            if value is not None and field.name not in (*needed, *further):
                raise ValueError(
                    f"`{field.name}` is {value!r}, and `rope_type` {self.kind!r} has none; remove it."
                )
        for name in ("theta", "factor", "original_max_position_embeddings", "low_freq_factor"):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float) or not value > 0
            ):
                raise ValueError(f"`{name}` of the rotary positions is {value!r}; it must be positive.")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"`high_freq_factor` is {self.high_freq_factor}; it must be above "
                f"`low_freq_factor`={self.low_freq_factor}."
            )

    @classmethod
    def from_hf(cls, settings: Mapping[str, Any], theta: float) -> "Rope":
        """What a `rope_scaling` or a `rope_parameters` says; `theta` holds where it names none.

        Raises:
          ValueError: a key that is not known, or as the class does.
        """
        settings = {key: value for key, value in settings.items() if value is not None}
        names = {settings.pop(key) for key in ("type", "rope_type") if key in settings} or {"default"}
        if len(names) > 1:
            raise ValueError(f"`type` and `rope_type` name two kinds of rotary positions: {sorted(names)}.")
        if settings.get("partial_rotary_factor") == 1.0:
            del settings["partial_rotary_factor"]
        theta = settings.pop("rope_theta", theta)
        known = {field.name for field in dataclasses.fields(cls)} - {"theta", "kind"}
        strangers = sorted(settings.keys() - known)
        if strangers:
            raise ValueError(
                f"`{strangers[0]}` is {settings[strangers[0]]!r} among the rotary positions in config.json, "
                "which is not supported: it may change what the model computes; remove the key if it does "
                "not."
            )
        (kind,) = names
        if kind in ("default", "linear", "dynamic"):
            # Hugging Face's own writers leave it there, and nothing reads it.
            settings.pop("original_max_position_embeddings", None)
        return cls(theta=float(theta), kind=kind, **settings)

    def to_hf(self) -> dict[str, Any] | None:
        """The `rope_scaling` of a `config.json`, without the base: `None` where nothing is scaled."""
        if self.kind == "default":
            return None
        fields = dataclasses.asdict(self)
        del fields["theta"]
        return {
            "rope_type": fields.pop("kind"),
            **{key: value for key, value in fields.items() if value is not None},
        }

    @property
    def sharpness(self) -> float:
        """The factor of cosines and sines: the square root of that of the attention scores."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return float(self.attention_factor)

        def grown(by: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * by * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return grown(self.mscale) / grown(self.mscale_all_dim)
        return grown(1.0)

    def frequencies(self, width: int, positions: int, length: Any) -> Any:
        """Radians a position, (K/2,). `width` is K, `positions` the model's, and `length` that of the text, a
        traced number, on which only "dynamic" depends.
        """
        exponents = np.arange(0, width, 2) / width
        plain = self.theta**-exponents
        if self.kind == "linear":
            return plain / self.factor
        if self.kind == "dynamic":
            over = self.factor * jnp.maximum(length, positions) / positions - (self.factor - 1)
            return (self.theta * over ** (width / (width - 2))) ** -jnp.asarray(exponents, over.dtype)
        if self.kind == "llama3":
            return self._llama3(plain)
        return self._yarn(plain, width) if self.kind == "yarn" else plain

    def _llama3(self, plain: np.ndarray) -> np.ndarray:
        turns = self.original_max_position_embeddings * plain / (2 * math.pi)  # over the original length
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0, 1)
        return (1 - kept) * plain / self.factor + kept * plain

    def _yarn(self, plain: np.ndarray, width: int) -> np.ndarray:
        def plane(turns: float) -> float:
            """The plane that makes so many turns over the original length, as a fraction."""
            ratio = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return width * math.log(ratio) / (2 * math.log(self.theta))

        low, high = plane(self.beta_fast or 32), plane(self.beta_slow or 1)
        if self.truncate is not False:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        stretched = np.clip((np.arange(width // 2) - low) / (high - low or 0.001), 0, 1)
        return stretched * plain / self.factor + (1 - stretched) * plain


# The settings that each kind needs, and those it may have.
_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        (),
    ),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


def turns(rope: Rope, width: int, positions: int, position_BxT: Any, dtype: Any) -> tuple[Any, Any]:
    """Cosines and sines of the angles, each (B, T, K/2), in float32 or wider."""
    wide = accumulator(dtype)
    length = jnp.max(position_BxT) + 1
    radians = jnp.asarray(rope.frequencies(width, positions, length.astype(wide)), wide)
    angles_BxTxK = position_BxT[..., None].astype(wide) * radians[None, None]
    return rope.sharpness * jnp.cos(angles_BxTxK), rope.sharpness * jnp.sin(angles_BxTxK)


def turned(x_BxTxHxK: Any, cos_BxTxK: Any, sin_BxTxK: Any) -> Any:
    """Queries or keys, each plane turned by its angle, in their own dtype."""
    first, second = jnp.split(x_BxTxHxK.astype(cos_BxTxK.dtype), 2, axis=-1)
    cos, sin = cos_BxTxK[:, :, None], sin_BxTxK[:, :, None]
    both = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return both.astype(x_BxTxHxK.dtype)
