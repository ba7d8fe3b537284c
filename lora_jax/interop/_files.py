"""JSON files, directories that appear complete or not at all, and the checksum that a file carries of
itself.

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


# Stands in the place of a file's own SHA-256 while the digest is computed.
NO_DIGITS = "0" * 64


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. The `ValueError` for any other file says what is wrong with it, or what lies
    in its place.
    """
    if not file.is_file():
        if file.parent.is_file():
            raise ValueError(f"{file.parent} is a file; pass the directory that holds it.")
        if not file.parent.is_dir():
            raise ValueError(f"{file} is missing; found there: no such directory.{_from_hub(file.parent)}")
        raise ValueError(
            f"{file} is missing; found there: {sorted(entry.name for entry in file.parent.iterdir())}."
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}); copy or download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}, not an object; copy it again.")
    return content


def _from_hub(directory: Path) -> str:
    """What to do where a directory that is not there has the form of a name on Hugging Face's hub."""
    if len(directory.parts) not in (1, 2) or directory.is_absolute() or directory.parts[0].startswith("."):
        return ""
    name = directory.as_posix()
    return (
        f" If {name!r} is a name on Hugging Face's hub, download it first, and pass the directory that this "
        f"returns: `huggingface_hub.snapshot_download({name!r})`, after `pip install huggingface_hub`."
    )


def read_weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index of shards says."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(shard, str) for shard in files.values()):
        raise ValueError(f"{index} has no `weight_map` from tensors to files; copy or download it again.")
    for shard in sorted(set(files.values())):
        # The index is a stranger's: it may name files beside it and no others.
        if Path(shard).name != shard or not (index.parent / shard).is_file():
            raise ValueError(
                f"{index} names the file {shard!r}, which is not in {index.parent}; copy or download that "
                "too."
            )
    return files


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_directory(directory: Path, *, overwrite: bool, mark: str, files: Iterable[str]) -> Iterator[Path]:
    """A directory to fill, which takes the name `directory` when the block ends and vanishes if the block
    raises.

    `overwrite` replaces an earlier export. An export holds the file `mark` and otherwise only files that
    match the patterns `files` (as in `fnmatch`). Anything else is not replaced: a wrong path would cost
    somebody a training run, or a home directory.
    """
    directory = Path(directory).resolve()
    if directory.is_file():
        raise ValueError(f"{directory} is a file; choose a directory.")
    if directory.is_dir() and any(directory.iterdir()):
        if not overwrite:
            raise ValueError(
                f"{directory} is not empty; choose another directory, or replace it with `overwrite=True`."
            )
        if not (directory / mark).is_file():
            raise ValueError(
                f"{directory} is not empty and has no {mark}: not an earlier export, so it is not replaced. "
                "Choose another directory."
            )
        patterns = [mark, *files]
        other = sorted(
            entry.name
            for entry in directory.iterdir()
            if entry.is_dir() or not any(fnmatch.fnmatch(entry.name, pattern) for pattern in patterns)
        )
        if other:
            raise ValueError(
                f"{directory} holds {other[0]!r}, which no export writes, so it is not replaced; move that "
                "file away, or choose another directory."
            )
    directory.parent.mkdir(parents=True, exist_ok=True)
    new = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    old = new.with_name(new.name + ".old")
    new.mkdir()
    try:
        yield new
        if overwrite and directory.exists():
            directory.rename(old)
        try:
            new.rename(directory)  # the system refuses this where something has appeared meanwhile
        except OSError as error:
            if not directory.exists():
                raise
            raise ValueError(
                f"{directory} appeared while this was being written: nothing is replaced. Choose another "
                "name."
            ) from error
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not directory.exists():
            old.rename(directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


def digest(file: Path, *, digits_at: int | None = None) -> str:
    """The SHA-256 of a file in hexadecimal digits. The 64 bytes at `digits_at`, where the file has its own
    digest, count as zeros.
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
    """The facts that a file carries, in one spelling, so that equal facts give equal files."""
    try:
        return json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"`facts` is {facts!r}, which cannot be written as JSON ({error}); pass what JSON can hold."
        ) from error


def checked_facts(
    file: Path, facts: str | None, digits: str | None, digits_at: int, *, verify: bool
) -> dict[str, Any] | None:
    """The facts in a file that carries them and its digest; None for a file that carries neither.

    A file with only one of the two is damaged: a flipped bit can hide one mark, and not both.
    """
    if facts is None and digits is None:
        return None
    if facts is None or digits is None:
        there, gone = ("a checksum", "facts") if facts is None else ("facts", "checksum")
        raise ValueError(
            f"{file} is damaged: it carries {there} of lora_jax and no {gone}, which belong together; copy "
            "it again."
        )
    if verify and digest(file, digits_at=digits_at) != digits:
        raise ValueError(
            f"{file} is damaged: its contents do not have the checksum that it carries; copy it again, or "
            "pass `verify=False` if you changed it on purpose."
        )
    try:
        content = json.loads(facts)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is damaged: the facts that it carries are not JSON ({error}); copy it again."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} is damaged: the facts that it carries are a JSON {type(content).__name__}, not an "
            "object; copy it again."
        )
    for name in ("base", "beside"):
        digests = content.get(name, {})
        if not isinstance(digests, dict) or not all(isinstance(text, str) for text in digests.values()):
            raise ValueError(
                f"{file} is damaged: {name!r} of the facts that it carries is no mapping from names to "
                "digests; copy it again."
            )
    return content
