"""Finished runs, as their work directories have them."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def facts(workdir: Path) -> dict[str, Any]:
    """The run's `report.json`. Raises `ValueError` for a directory that holds no finished run."""
    if not (workdir / "report.md").is_file():
        raise ValueError(f"`{workdir}` holds no finished run.")
    return json.loads((workdir / "report.json").read_text("utf-8"))


def config(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "config.json").read_text("utf-8"))


def names(workdirs: Sequence[Path]) -> list[str]:
    """The names of the runs' configs; with the directory where two runs have the same."""
    found = [config(workdir)["name"] for workdir in workdirs]
    count = Counter(found)
    return [
        name if count[name] == 1 else f"{name} ({workdir})"
        for name, workdir in zip(found, workdirs, strict=True)
    ]
