"""The bases that have a name: what each is, where its files come from, and their checksums.

A base is one file `experiments/bases/NAME.json`. Its weights are in no repository: `fetch` puts them into a
directory of the user's, as DIR/NAME/FILE. Only Python's own library is needed here, so that a config can be
checked, and a base fetched, before anything is installed.
"""

import functools
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from experiments.strict_json import build, nearest


DIRECTORY = Path(__file__).resolve().parent / "bases"
# Where `run` looks for fetched bases, unless the command line or the environment says otherwise.
VARIABLE, DEFAULT = "LORA_JAX_BASES", "bases"


@dataclass(frozen=True)
class Package:
    """A Python package that carries the files: `member` is the one of them, or a zip file of all."""

    requirement: str
    member: str


@dataclass(frozen=True)
class File:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """`adapts`: the hub's name of the model, under which adapters name their base. `hub`: the repository that
    has these very files, which may be another. `files`: those that are kept, by their names.
    """

    what: str
    licence: str
    adapts: str
    package: Package
    hub: str
    files: dict[str, File]

    def __post_init__(self):
        for name in self.files:
            if PurePosixPath(name).name != name or name in ("", ".", ".."):
                raise ValueError(f"`files` has {name!r}, which must be a plain name, without a directory.")

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())


def names() -> list[str]:
    """The names of all bases.

    >>> names()
    ['all-minilm-l6-v2', 'smollm2-135m']
    """
    return sorted(path.stem for path in DIRECTORY.glob("*.json"))


def entry(name: str, argument: str) -> Entry:
    """The base of that name. `argument` is what the user gave it as, for the error.

    >>> entry("smollm2-135m", "NAME").adapts
    'HuggingFaceTB/SmolLM2-135M-Instruct'

    Raises:
      ValueError: there is no base of that name.
    """
    known = names()
    if name not in known:
        raise ValueError(
            f"`{argument}` must be one of {', '.join(known)}, got `{name}`{nearest(name, known) or '.'}"
        )
    return build(Entry, json.loads((DIRECTORY / f"{name}.json").read_text("utf-8")))


def directory(argument: str | None) -> Path:
    """Where fetched bases are: `--bases`, else the environment's word, else `bases` here."""
    return Path(argument or os.environ.get(VARIABLE) or DEFAULT)


def fault(file: Path, expected: File) -> str | None:
    """What is wrong with a file, in a word or two; None for the file that the catalogue describes.

    The size is looked at first. A checksum takes 0.3 s for 90 MB, and is computed once a process.
    """
    if not file.is_file():
        return "missing"
    stat = file.stat()
    if stat.st_size != expected.bytes:
        return f"damaged ({stat.st_size:,} bytes of {expected.bytes:,})"
    if _sha256(file, stat.st_mtime_ns, stat.st_size) != expected.sha256:
        return "damaged (another SHA-256)"
    return None


@functools.lru_cache
def _sha256(file: Path, mtime: int, size: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verified(name: str, bases: Path) -> Path:
    """The fetched base below `bases`: its GGUF file, or the directory of its files, whose checksums hold.

    Raises:
      FileNotFoundError, ValueError: it is not there, or damaged. The error has the command that fetches it.
    """
    found, base = entry(name, "base.name"), bases / name
    fix = f"fetch it{{}}: `python -m experiments fetch {name} --to {bases}`"
    for file, expected in found.files.items():
        wrong = fault(base / file, expected)
        if wrong == "missing":
            raise FileNotFoundError(
                f"`base.name` is {name}, and there is no `{name}/{file}` in `{bases}`; {fix.format('')}. "
                f"`--bases DIR`, or {VARIABLE}, names another directory."
            )
        if wrong is not None:
            raise ValueError(
                f"`base.name` is {name}, and `{base / file}` is {wrong}; {fix.format(' again')}."
            )
    only = next(iter(found.files))
    return base / only if only.endswith(".gguf") else base
