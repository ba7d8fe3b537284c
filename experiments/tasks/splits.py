"""What a task makes of its files: examples to train and to validate on, and test inputs.

It is apart from `examples`, because `score` asks the tasks too and needs no package.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from experiments.tasks.examples import Blocks, Examples


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
    train: "Examples | Blocks"
    valid: "Examples | Blocks"
    prompts: tuple[Prompt, ...] = ()
