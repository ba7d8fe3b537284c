"""`data` and `generate`: what a run trains on."""

from dataclasses import dataclass
from typing import Literal

from experiments.config.checks import at_least


@dataclass(frozen=True)
class E2EData:
    """Meanings and their wordings. `dataset`: a directory or hub name for `datasets`, whose splits `train`,
    `valid`, `test` then name; without it they are files. `truncate`: cut what is longer than `seq_len` as the
    authors do, instead of refusing it."""

    task: Literal["e2e"]
    train: str
    valid: str
    test: str | None = None
    dataset: str | None = None
    seq_len: int = 512
    truncate: bool = False
    max_rows: int | None = None
    max_valid_rows: int | None = None

    def __post_init__(self):
        at_least(1, "data", self, "seq_len", "max_rows", "max_valid_rows")


@dataclass(frozen=True)
class TextData:
    """Plain text, packed into blocks of `seq_len` tokens. `train`: one file or several; `max_bytes`
    limits what is read of each.
    """

    task: Literal["text"]
    train: str | tuple[str, ...]
    valid: str
    seq_len: int
    max_bytes: int | None = None
    max_valid_bytes: int | None = None

    def __post_init__(self):
        at_least(1, "data", self, "seq_len", "max_bytes", "max_valid_bytes")


@dataclass(frozen=True)
class Generate:
    """The project's own data set in E2E's form, made in the work directory; `data` then names files of it.

    `meanings` to train on and `held_out` ones for validation and for test, each in `references` wordings."""

    seed: int
    meanings: int
    held_out: int
    references: int
