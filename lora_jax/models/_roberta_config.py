"""The configuration of RoBERTa."""

import dataclasses
from typing import ClassVar

from ._bert_layers import BertLayersConfig


@dataclasses.dataclass(frozen=True)
class RobertaConfig(BertLayersConfig):
    """Sizes and choices of a RoBERTa, under the names and with the defaults of Hugging Face's `config.json`.

    ```python
    RobertaConfig.named("roberta-base")  # 12 layers of width 768 (Liu et al. 2019)
    RobertaConfig.named("roberta-large", labels=("no", "yes"))
    RobertaConfig.from_hf(json.loads(text))                             # what a config.json says
    ```

    Positions are counted from `pad_token_id` + 1, so that 514 of them hold 512 tokens. `problem_type` and the
    token ids other than padding take no part in the computation; they are kept for other tools.

    Raises:
      ValueError: a value out of range.
      TypeError: a value of the wrong type.
    """

    vocab_size: int = 50265
    pad_token_id: int = 1
    bos_token_id: int | None = 0
    eos_token_id: int | tuple | None = 2

    family: ClassVar = "RoBERTa"
    sizes: ClassVar = {
        "roberta-base": dict(max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5),
        "roberta-large": dict(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            max_position_embeddings=514,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
        ),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.pad_token_id < min(self.vocab_size, self.max_position_embeddings - 1):
            raise ValueError(
                f"`pad_token_id` is {self.pad_token_id}; it must be a token, and leave positions after it."
            )

    @property
    def positions(self) -> int:
        return self.max_position_embeddings - self.pad_token_id - 1
