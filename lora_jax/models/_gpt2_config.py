"""The configuration of GPT-2."""

import dataclasses
from typing import Any, ClassVar

from ._config import IDLE, LabelledConfig, numbered_labels


@dataclasses.dataclass(frozen=True)
class GPT2Config(LabelledConfig):
    """Sizes and choices of a GPT-2, under the names and with the defaults of Hugging Face's `config.json`.

    ```python
    GPT2Config.named("gpt2-medium")  # 24 layers of width 1,024 (Radford et al. 2019, table 2)
    GPT2Config.named("gpt2", scale_attn_by_inverse_layer_idx=True)
    GPT2Config.from_hf(json.loads(text))  # what a config.json says, or an error that names the key
    ```

    `reorder_and_upcast_attn` asks for attention scores in float32. They always are here, so that both values
    do the same. The token ids are kept for tokenizers and generation. Of them `pad_token_id` takes part in
    the computation with a head of classes, which reads the last token before the padding.

    Raises:
      ValueError: a value out of range.
      TypeError: a value of the wrong type.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # None: 4 · n_embd
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple | None = 50256
    pad_token_id: int | None = None
    labels: tuple[str, ...] = numbered_labels(2)

    family: ClassVar = "GPT-2"
    sizes: ClassVar = {
        "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
        "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
        "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
        "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
    }
    # The further keys are of heads that this model does not have.
    idle: ClassVar = IDLE | frozenset(
        """
        n_ctx n_special predict_special_tokens summary_activation
        summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    """.split()
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive(
            "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "layer_norm_epsilon", "n_inner"
        )
        self.check_activation("activation_function")
        if self.n_embd % self.n_head:
            raise ValueError(f"`n_embd` is {self.n_embd}; it must be a multiple of `n_head`={self.n_head}.")

    @property
    def positions(self) -> int:
        """How many tokens a sequence may have."""
        return self.n_positions

    def to_hf(self) -> dict[str, Any]:
        fields = super().to_hf()
        if self.labels == numbered_labels(2):  # what Hugging Face takes where nothing is said
            del fields["id2label"], fields["label2id"]
        return fields
