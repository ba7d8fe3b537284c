"""The configurations of Llama and Mistral."""

import dataclasses
from typing import ClassVar

from .._rope import Rope
from .family import BiasedConfig, FamilyConfig


_LLAMA_3 = dict(
    vocab_size=128256,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope=Rope(500_000.0),
    bos_token_id=128000,
    eos_token_id=128001,
)
_LLAMA_3_1 = {
    **_LLAMA_3,
    "max_position_embeddings": 131072,
    "rope": Rope(
        500_000.0,
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
}
_8B = dict(intermediate_size=14336)
_70B = dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)


@dataclasses.dataclass(frozen=True)
class LlamaConfig(BiasedConfig):
    """Sizes and choices of a Llama 1 to 3 or a SmolLM2, under the names and with the defaults of Hugging
    Face's `config.json`, but for `rope`.

    ```python
    LlamaConfig.named("llama-3-8b")
    LlamaConfig.named("smollm2-135m", attention_dropout=0.1)
    LlamaConfig.from_hf(json.loads(text))  # what a config.json says, or an error that names the key
    ```

    Raises:
      ValueError: a value out of range.
      TypeError: a value of the wrong type.
    """

    mlp_bias: bool = False

    family: ClassVar = "Llama"
    sizes: ClassVar = {
        "llama-7b": dict(),
        "llama-2-7b": dict(max_position_embeddings=4096, rms_norm_eps=1e-5),
        "llama-3-8b": {**_LLAMA_3, **_8B},
        "llama-3-70b": {**_LLAMA_3, **_70B},
        "llama-3.1-8b": {**_LLAMA_3_1, **_8B},
        "llama-3.1-70b": {**_LLAMA_3_1, **_70B},
        "smollm2-135m": dict(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope=Rope(100_000.0),
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        ),
    }

    @property
    def inner_bias(self) -> bool:
        return self.mlp_bias


@dataclasses.dataclass(frozen=True)
class MistralConfig(FamilyConfig):
    """Sizes and choices of a Mistral. All of its layers look back on `sliding_window` tokens; None: on all.

    ```python
    MistralConfig.named("mistral-7b")
    ```
    """

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096

    family: ClassVar = "Mistral"
    sizes: ClassVar = {"mistral-7b": dict(max_position_embeddings=32768, rms_norm_eps=1e-5)}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("sliding_window")

    @property
    def windows(self) -> tuple[int | None, ...]:
        return (self.sliding_window,) * self.num_hidden_layers
