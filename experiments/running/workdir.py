"""The work directory of a run. `config.json` marks it as a run's own; `report.md`, written last, marks it as
finished.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from experiments import config as configs
from experiments.running import processes


# The entries that a work directory may have before its run begins: the base's own run, generated data, a
# tokenizer trained for it, and what a crash has left of these.
BEFOREHAND = {"base", "data", "tokenizer", "tokenizer.tmp", "config.json.tmp"}


def is_finished(workdir: Path, resolved: dict[str, Any], page: str = "report.md") -> bool:
    """Whether `workdir` holds the finished run of this config, whose `page` is there.

    Raises:
      ValueError: it holds another config's run, or other files.
    """
    kept = workdir / "config.json"
    if kept.is_file():
        try:
            old = json.loads(kept.read_text("utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"`{kept}` is not valid JSON: {error}") from error
        before, now = (configs.without_mesh(tree) for tree in (configs.with_defaults(old), resolved))
        found = configs.difference(before, now)
        if found:
            raise ValueError(
                f"`{workdir}` holds a run of another config: {found}; use another --workdir, or the config "
                "it was started with."
            )
        return (workdir / page).is_file()
    if workdir.exists() and (
        not workdir.is_dir()
        or {entry.name for entry in workdir.iterdir() if not entry.name.startswith(processes.MARK)}
        - BEFOREHAND
    ):
        raise ValueError(f"`{workdir}` is not empty and holds no run: use another --workdir.")
    return False


def check_writable(workdir: Path) -> None:
    """Raises `ValueError` where nothing can be written to `workdir`. It leaves nothing there."""
    workdir = workdir.absolute()
    there = next(directory for directory in (workdir, *workdir.parents) if directory.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        reason = f"{there} is a file" if there.is_file() else f"{there}: {error.strerror}"
        raise ValueError(
            f"`--workdir` {workdir} cannot be written to ({reason}): choose another directory."
        ) from error


def mark(workdir: Path, resolved: dict[str, Any]) -> None:
    """Makes `workdir` the run's own. Where the mesh has changed, the new one is written."""
    workdir.mkdir(parents=True, exist_ok=True)
    text, file = json.dumps(resolved, indent=2) + "\n", workdir / "config.json"
    if not file.is_file() or file.read_text("utf-8") != text:
        fresh = workdir / "config.json.tmp"
        fresh.write_text(text, "utf-8")
        fresh.replace(file)
