"""What the configurations of all models share. Every key of Hugging Face's `config.json` is used, known to be
idle, or refused.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from ._layers import ACTIVATIONS


# Keys that do not change a model's outputs: bookkeeping and defaults of `generate`. Keys that start with an
# underscore are idle too.
IDLE = frozenset(
    """
    architectures attn_implementation bos_token_id chunk_size_feed_forward directionality dtype
    eos_token_id finetuning_task gradient_checkpointing language max_length model_type name_or_path
    output_attentions output_hidden_states output_past problem_type return_dict task_specific_params
    tokenizer_class torch_dtype torchscript transformers_version use_cache use_return_dict
""".split()
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Fields under the names and with the defaults of Hugging Face's `config.json`, declared by subclasses,
    which are frozen dataclasses.
    """

    family: ClassVar[str]  # the model's name in errors
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]]  # the published ones
    idle: ClassVar[frozenset[str]] = IDLE

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, annotation = getattr(self, field.name), field.type
            if not _fits(value, annotation):
                raise TypeError(
                    f"`{field.name}` is {value!r}; it must be {getattr(annotation, '__name__', annotation)}."
                )
            if (
                field.name.endswith(("_pdrop", "dropout", "dropout_prob"))
                and value is not None
                and not 0 <= value < 1
            ):
                raise ValueError(f"`{field.name}` is {value!r}; it must be a probability below 1.")

    def check_positive(self, *names: str) -> None:
        for name in names:
            value: float | None = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` is {value!r}; it must be positive.")

    def check_activation(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value not in ACTIVATIONS:
                raise ValueError(
                    f"`{name}` is {value!r}, which is not supported; choose one of {sorted(ACTIVATIONS)}."
                )

    @classmethod
    def named(cls, name: str, **changes: Any) -> Self:
        """A published size, with `changes` to its other fields.

        Raises:
          ValueError: a `name` that is no published size, or a change that is out of range.
          TypeError: a change of the wrong type, or to a field that does not exist.
        """
        if name not in cls.sizes:
            raise ValueError(
                f"`name` is {name!r}, which is not a published size of {cls.family}; choose one of "
                f"{list(cls.sizes)}."
            )
        return cls(**{**cls.sizes[name], **changes})

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """The configuration that a `config.json` describes.

        A key that is neither a field nor known to be idle is refused, because it may change the computation.
        A key that is null, false or empty is taken for a feature that is switched off.

        Raises:
          ValueError: a key that is not supported, or a value out of range.
          TypeError: a value of the wrong type.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        fields = {}
        for key, value in cls.translated(config).items():
            if key in known:
                fields[key] = tuple(value) if isinstance(value, list) else value
            elif value and key not in cls.idle and not key.startswith("_"):
                raise ValueError(
                    f"`{key}` is {value!r} in config.json, which is not supported for {cls.family}: it may "
                    "change what the model computes; remove the key if it does not."
                )
        return cls(**fields)

    @classmethod
    def translated(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """`config` with our names and values where Hugging Face has others."""
        return config

    def to_hf(self) -> dict[str, Any]:
        """The fields as a JSON-ready dict; `from_hf` undoes it."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }


def numbered_labels(count: int) -> tuple[str, ...]:
    """Hugging Face's names for classes that have none."""
    return tuple(f"LABEL_{i}" for i in range(count))


class LabelledConfig(ModelConfig):
    """The configuration of a model that may have a head of classes. Subclasses have the field `labels`: the
    names of the classes, Hugging Face's `id2label`.
    """

    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.labels or not all(isinstance(label, str) for label in self.labels):
            raise ValueError(
                f"`labels` is {self.labels!r}; it must be the names of the classes, at least one."
            )

    @classmethod
    def translated(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        config = {key: value for key, value in config.items() if key != "label2id"}
        names, count = config.pop("id2label", None), config.pop("num_labels", None)
        if names:
            names = {int(number): str(name) for number, name in names.items()}
            if sorted(names) != list(range(len(names))):
                raise ValueError(
                    f"`id2label` in config.json numbers its labels {sorted(names)}, not from 0 without a gap."
                )
            if count is not None and count != len(names):
                raise ValueError(
                    f"`num_labels` is {count} in config.json, but `id2label` has {len(names)} names."
                )
            config["labels"] = tuple(names[number] for number in range(len(names)))
        elif count is not None:
            config["labels"] = numbered_labels(count)
        return config

    def to_hf(self) -> dict[str, Any]:
        fields = super().to_hf()
        names = fields.pop("labels")
        return {
            **fields,
            "id2label": {str(i): name for i, name in enumerate(names)},
            "label2id": {name: i for i, name in enumerate(names)},
        }

    @property
    def num_labels(self) -> int:
        return len(self.labels)


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a field with this annotation takes the value. An integer is a good float, and a boolean, which
    Python takes for an integer, is not a number.
    """
    if isinstance(value, bool):
        return annotation is bool
    if getattr(annotation, "__origin__", None) is tuple:
        return isinstance(value, tuple)
    accepted: Any = {float: int | float, float | None: int | float | None}.get(annotation, annotation)
    return isinstance(value, accepted)
