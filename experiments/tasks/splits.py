"""What a task makes of its files: examples to train and to validate on, and test inputs.

It is apart from `examples`, because `score` asks the tasks too and needs no package.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TYPE_CHECKING


if TYPE_CHECKING:
    from experiments.tasks.examples import Blocks, Examples
    from experiments.tasks.sentences import Sentences
    from experiments.tasks.windows import Windows


@dataclass(frozen=True)
class Prompt:
    """One test input: its text, its tokens as in training, the wordings people gave it, and the part of the
    test set that it is in, where parts are scored by themselves.
    """

    text: str
    ids: tuple[int, ...]
    references: tuple[str, ...]
    part: str | None = None


@dataclass(frozen=True)
class Splits:
    """`further`: inputs without references that are only predicted, by the name of their file."""

    train: "Examples | Blocks | Sentences | Windows"
    valid: "Examples | Blocks | Sentences | Windows"
    prompts: tuple[Prompt, ...] = ()
    further: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
