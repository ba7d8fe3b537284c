"""The configuration of GPT-2: Hugging Face's `config.json`, every key of it honoured, known to be idle, or refused."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ._layers import ACTIVATIONS

_SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
}

# Keys found in GPT-2's configurations that leave the logits as they are: bookkeeping, heads this model has not,
# defaults of `generate`. Names that start with an underscore are idle too.
_IDLE = frozenset(
    """architectures attn_implementation chunk_size_feed_forward dtype finetuning_task gradient_checkpointing id2label
    label2id language max_length model_type n_ctx n_special name_or_path num_labels output_attentions
    output_hidden_states output_past predict_special_tokens problem_type return_dict
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj task_specific_params
    tokenizer_class torch_dtype torchscript transformers_version use_cache use_return_dict""".split()
)


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """Sizes and choices of a GPT-2, under the names and with the defaults of Hugging Face's `config.json`.

    ```python
    GPT2Config.named("gpt2-medium")                    # 24 layers of width 1,024
    GPT2Config.named("gpt2", scale_attn_by_inverse_layer_idx=True)
    GPT2Config.from_hf(json.loads(text))               # what a config.json says, or an error that names the key
    ```

    `reorder_and_upcast_attn` asks for attention scores in float32; they always are here, so both values are honoured.
    The token ids take no part in the computation and are carried for tokenizers and generation.
    Raises `ValueError` or `TypeError`, naming the key, for a value that cannot be.
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

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # bool is an int to Python and an int is a good float; neither the other way round.
            kind = int | float if field.type is float else field.type
            if not isinstance(value, kind) or (isinstance(value, bool) and field.type is not bool):
                raise TypeError(f"`{field.name}`={value!r} must be {getattr(field.type, '__name__', field.type)}")
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "layer_norm_epsilon", "n_inner"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`{name}`={value!r} must be positive")
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}`={getattr(self, name)!r} must be a probability below 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"`n_embd`={self.n_embd} must be a multiple of `n_head`={self.n_head}")
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(
                f"`activation_function`={self.activation_function!r} is not supported; choose one of {sorted(ACTIVATIONS)}"
            )

    @classmethod
    def named(cls, name: str, **changes) -> "GPT2Config":
        """One of the four published sizes (Radford et al. 2019, table 2), with `changes` to its other fields."""
        if name not in _SIZES:
            raise ValueError(f"`name`={name!r} is not a published size of GPT-2; choose one of {list(_SIZES)}")
        return cls(**{**_SIZES[name], **changes})

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "GPT2Config":
        """The configuration that a `config.json` describes.

        A key that is neither a field nor known to be idle is refused, because it may change the computation; if it is
        null, false or empty it is taken as a feature that is switched off.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        fields = {}
        for key, value in config.items():
            if key in known:
                fields[key] = tuple(value) if key == "eos_token_id" and isinstance(value, list) else value
            elif value and key not in _IDLE and not key.startswith("_"):
                raise ValueError(
                    f"`{key}`={value!r} in config.json is not supported for GPT-2: it may change what the model "
                    "computes; if it does not, remove the key"
                )
        return cls(**fields)

    def to_hf(self) -> dict[str, Any]:
        """The fields as a JSON-ready dict; `from_hf` undoes it."""
        fields = dataclasses.asdict(self)
        if isinstance(fields["eos_token_id"], tuple):
            fields["eos_token_id"] = list(fields["eos_token_id"])
        return fields
