"""The configurations of Qwen2, Qwen2.5 and dense Qwen3."""

import dataclasses
from typing import ClassVar

from .._rope import Rope
from .family import BiasedConfig, LayeredConfig


@dataclasses.dataclass(frozen=True)
class _QwenConfig(LayeredConfig):
    """With `use_sliding_window`, the layers from `max_window_layers` on have a window."""

    vocab_size: int = 151936
    intermediate_size: int = 22016
    max_position_embeddings: int = 32768
    num_key_value_heads: int | None = 32
    bos_token_id: int | None = None
    eos_token_id: int | tuple | None = None
    use_sliding_window: bool = False
    max_window_layers: int = 28

    @property
    def window(self) -> int | None:
        return self.sliding_window if self.use_sliding_window else None

    def usual_types(self) -> tuple[str, ...]:
        full = self.num_hidden_layers if self.window is None else self.max_window_layers
        return tuple(
            "full_attention" if i < full else "sliding_attention" for i in range(self.num_hidden_layers)
        )


@dataclasses.dataclass(frozen=True)
class Qwen2Config(_QwenConfig):
    """Sizes and choices of a Qwen2 or Qwen2.5. Queries, keys and values have a bias. With
    `use_sliding_window`, the layers from `max_window_layers` on have a window.

    ```python
    Qwen2Config.named("qwen2.5-7b")
    ```
    """

    family: ClassVar = "Qwen2"
    sizes: ClassVar = {
        "qwen2.5-0.5b": dict(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            rope=Rope(1_000_000.0),
            tie_word_embeddings=True,
        ),
        "qwen2.5-7b": dict(
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            max_position_embeddings=131072,
            rope=Rope(1_000_000.0),
        ),
    }

    @property
    def input_bias(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class Qwen3Config(_QwenConfig, BiasedConfig):
    """Sizes and choices of a dense Qwen3. Queries and keys are normalised, head by head. Windows are as in
    Qwen2.

    ```python
    Qwen3Config.named("qwen3-0.6b")
    ```
    """

    head_dim: int | None = 128

    family: ClassVar = "Qwen3"
    sizes: ClassVar = {
        "qwen3-0.6b": dict(
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            max_position_embeddings=40960,
            rope=Rope(1_000_000.0),
            tie_word_embeddings=True,
        )
    }
    norms_heads: ClassVar = True
