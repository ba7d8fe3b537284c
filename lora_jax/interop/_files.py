"""Files as such: JSON, directories that appear complete or not at all, and the checksum that a file carries
of itself.

The checksum finds accidents: a flipped bit, an unfinished copy, an edit that nobody remembers. Left out:
signatures. Whoever changes a file on purpose can write a new checksum into it.
"""

import contextlib
import fnmatch
import hashlib
import json
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


# What stands in the place of a file's own SHA-256 while that is computed.
NO_DIGITS = "0" * 64


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, or a `ValueError` that says what is wrong with the file or what lies in its place."""
    if not file.is_file():
        if file.parent.is_file():
            raise ValueError(f"{file.parent} is a file; pass the directory that it is in")
        found = (
            sorted(entry.name for entry in file.parent.iterdir())
            if file.parent.is_dir()
            else "no such directory"
        )
        raise ValueError(f"{file} is missing; found there: {found}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}, not an object")
    return content


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_directory(dir: Path, *, overwrite: bool, mark: str, files: Iterable[str]) -> Iterator[Path]:
    """A directory to fill, which takes the name `dir` when the block ends and vanishes if the block raises.

    `overwrite` replaces an earlier export, recognised by the file `mark` in it and by holding nothing but
    what exports hold, `files` (as in `fnmatch`): with a wrong path, what would be lost is somebody's training
    run, or home.
    """
    dir = Path(dir).resolve()
    if dir.is_file():
        raise ValueError(f"{dir} is a file; choose a directory")
    if dir.is_dir() and any(dir.iterdir()):
        if not overwrite:
            raise ValueError(
                f"{dir} is not empty; choose another directory, or replace it with `overwrite=True`"
            )
        if not (dir / mark).is_file():
            raise ValueError(
                f"{dir} is not empty and has no {mark}: not an earlier export, so it is not replaced"
            )
        patterns = [mark, *files]
        other = sorted(
            entry.name
            for entry in dir.iterdir()
            if entry.is_dir() or not any(fnmatch.fnmatch(entry.name, pattern) for pattern in patterns)
        )
        if other:
            raise ValueError(
                f"{dir} holds {other[0]!r}, which no export writes, so it is not replaced: move that away, "
                "or choose another directory"
            )
    dir.parent.mkdir(parents=True, exist_ok=True)
    new = dir.with_name(f".{dir.name}.{uuid.uuid4().hex}")
    old = new.with_name(new.name + ".old")
    new.mkdir()
    try:
        yield new
        if overwrite and dir.exists():
            dir.rename(old)
        try:
            new.rename(dir)  # the system refuses it where something came to be meanwhile
        except OSError as error:
            if not dir.exists():
                raise
            raise ValueError(f"{dir} appeared while this was being written: nothing is replaced") from error
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not dir.exists():
            old.rename(dir)
        raise
    shutil.rmtree(old, ignore_errors=True)


def digest(file: Path, *, digits_at: int | None = None) -> str:
    """The SHA-256 of a file in hexadecimal digits; the 64 bytes at `digits_at` count as zeros: the file's
    own digest goes there.
    """
    hashed = hashlib.sha256()
    with open(file, "rb") as stream:
        if digits_at is not None:
            hashed.update(stream.read(digits_at))
            hashed.update(NO_DIGITS.encode()[: len(stream.read(len(NO_DIGITS)))])
        while chunk := stream.read(1 << 20):
            hashed.update(chunk)
    return hashed.hexdigest()


def json_of(facts: dict[str, Any]) -> str:
    """The facts that a file carries, in the one spelling that they have: equal facts, equal files."""
    try:
        return json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"`facts`={facts!r} cannot be written as JSON: {error}") from error


def checked_facts(
    file: Path, facts: str | None, digits: str | None, digits_at: int, *, verify: bool
) -> dict[str, Any] | None:
    """The facts in a file that carries them and its digest; None for one that carries neither.

    A file with one of the two had both: a flipped bit hides one mark and cannot hide two.
    """
    if facts is None and digits is None:
        return None
    if facts is None or digits is None:
        there, gone = ("a checksum", "facts") if facts is None else ("facts", "checksum")
        raise ValueError(
            f"{file} is damaged: it carries {there} of lora_jax and no {gone}, which belong together; copy "
            "it again"
        )
    if verify and digest(file, digits_at=digits_at) != digits:
        raise ValueError(
            f"{file} is damaged: its contents do not have the checksum that it carries; copy it again, or, "
            "if you changed it "
            "on purpose, pass `verify=False`"
        )
    try:
        content = json.loads(facts)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is damaged: the facts that it carries are not JSON ({error}); copy it again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} is damaged: the facts that it carries are a JSON {type(content).__name__}, not an "
            "object; copy it again"
        )
    for name in ("base", "beside"):
        digests = content.get(name, {})
        if not isinstance(digests, dict) or not all(isinstance(text, str) for text in digests.values()):
            raise ValueError(
                f"{file} is damaged: {name!r} of the facts that it carries is no mapping from names to "
                "digests; copy it again"
            )
    return content
