"""Plain text for pretraining: documents joined by the end-of-text token and packed into blocks of one length.

Reads `.txt`, `.txt.xz` and `.txt.zst`, as a stream and no further than the limit, so that a large file costs
what is used of it. In a file, documents are separated by a line `<|endoftext|>`; a file without one is one
document.
"""

import contextlib
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TYPE_CHECKING

from experiments.checks import at_least
from experiments.tasks.splits import Splits
from experiments.tasks.task import Task


if TYPE_CHECKING:
    import numpy as np

    from experiments.tasks.examples import Blocks


SEPARATOR = "<|endoftext|>"


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


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    if path.suffix == ".zst":
        import pyarrow

        with pyarrow.input_stream(str(path), compression="zstd") as stream:
            yield stream
    elif path.suffix == ".xz":
        with lzma.open(path) as stream:
            yield stream
    else:
        with path.open("rb") as stream:
            yield stream


def read_file(path: Path, max_bytes: int | None = None) -> str:
    """The text of a file, or of its first `max_bytes` bytes (before compression), cut at a whole
    character.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no data file `{path}`.")
    if path.suffix not in (".txt", ".xz", ".zst"):
        raise ValueError(f"`{path}` is neither .txt nor .txt.xz nor .txt.zst.")
    try:
        with _open(path) as stream:
            content = stream.read() if max_bytes is None else stream.read(max_bytes)
    except (lzma.LZMAError, EOFError, OSError) as error:
        raise ValueError(f"`{path}` cannot be read: {error}") from error
    # Only the limit can cut a character in two, and only at the end: any other bad byte is the file's, and is
    # refused.
    for trim in range(4 if max_bytes is not None else 1):
        with contextlib.suppress(UnicodeDecodeError):
            return content[: len(content) - trim].decode("utf-8")
    raise ValueError(f"`{path}` is not UTF-8 text.")


def documents(text: str) -> list[str]:
    return [document for document in (part.strip("\n") for part in text.split(SEPARATOR)) if document.strip()]


def tokens(parts: list[str], tokenizer: Any) -> "np.ndarray":
    """All documents in one row, each followed by the end-of-text token."""
    # Imported here, because `score` asks the tasks too, and needs no package.
    import numpy as np

    # `verbose=False`: a book is longer than any model, which the tokenizer would warn of and packing takes
    # care of.
    encoded = tokenizer(parts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]
    end = np.asarray([tokenizer.eos_token_id], np.int32)
    return np.concatenate([piece for ids in encoded for piece in (np.asarray(ids, np.int32), end)])


def read(section: TextData, directory: Path) -> dict[str, list[str]]:
    """The documents of each split, before any tokenizer."""
    found = {}
    for split, limit in (("train", section.max_bytes), ("valid", section.max_valid_bytes)):
        name = getattr(section, split)
        files = (name,) if isinstance(name, str) else name
        found[split] = [
            document for file in files for document in documents(read_file(directory / file, limit))
        ]
        if not found[split]:
            raise ValueError(f"the data set `{name}` is empty.")
    return found


def prepare(section: TextData, found: dict[str, list[str]], tokenizer: Any) -> Splits:
    """Blocks of the documents that `read` found."""
    from experiments.tasks.examples import Blocks

    def blocks(split: str) -> "Blocks":
        made = Blocks(tokens(found[split], tokenizer), section.seq_len)
        if not len(made):
            raise ValueError(
                f"the data set `{getattr(section, split)}` is shorter than one block of `data.seq_len` "
                f"({section.seq_len}) tokens."
            )
        return made

    return Splits(blocks("train"), blocks("valid"))


TASK = Task(section=TextData, read=read, prepare=prepare, documents=True, packs=False)
