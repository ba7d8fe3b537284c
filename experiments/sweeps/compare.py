"""Several finished sweeps beside each other: the best of each, as of LoRA and of full fine-tuning, or of
other targets.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.sweeps import compared, figures
from experiments.sweeps.figures import label
from experiments.sweeps.page import mean_and_deviation


def are_sweeps(workdirs: Sequence[Path]) -> bool:
    """Whether these are finished sweeps, and not runs.

    Raises `ValueError` where some are the one and some the other.
    """
    found = [(workdir / "sweep.md").is_file() for workdir in workdirs]
    if any(found) and not all(found):
        raise ValueError(
            f"`{workdirs[found.index(False)]}` is no finished sweep, and `{workdirs[found.index(True)]}` is "
            "one: compare sweeps with sweeps and runs with runs."
        )
    return all(found)


def table(workdirs: Sequence[Path]) -> str:
    """A line for each sweep, as Markdown: the values of its best combination, and the loss."""
    sweeps = _read(workdirs)
    words = _words(sweeps)
    lines = [f"| sweep | method | targets | best of | values | {words} |", "|---" * 6 + "|"]
    for name, facts in sweeps.items():
        ended = [line for line in facts["table"] if line["mean"] is not None and line["dropped"] is None]
        best = min(ended, key=compared.by(facts.get("metric")), default=None)
        values = (
            "-" if best is None else ", ".join(f"{key} {label(of)}" for key, of in best["values"].items())
        )
        loss = "-" if best is None else mean_and_deviation(best)
        # A method without targets trains nothing beside the baseline.
        kinds = [facts.get("baseline"), facts["method"] if facts["targets"] else None]
        method = " and ".join(kind.partition("(")[0] for kind in kinds if kind is not None)
        targets = ", ".join(f"`{pattern}`" for pattern in facts["targets"]) or "-"
        cells = [name, method, targets, str(len(facts["table"])), values, loss]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _words(sweeps: Mapping[str, dict[str, Any]]) -> str:
    """What all are compared by.

    Raises `ValueError` where that differs.
    """
    found = {facts.get("metric") or compared.LOSS: name for name, facts in sweeps.items()}
    if len(found) > 1:
        raise ValueError(
            f"sweeps of one measure are compared, and these have {', '.join(found)}: compare those of one "
            "task."
        )
    return next(iter(found))


def draw(workdirs: Sequence[Path], path: Path) -> None:
    """Their losses against rates, in one picture."""
    figures.draw_rates(_read(workdirs), path)


def _read(workdirs: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """By name; with the directory where two have the same."""
    found = [json.loads((workdir / "sweep.json").read_text("utf-8")) for workdir in workdirs]
    count = Counter(facts["name"] for facts in found)
    return {
        facts["name"] if count[facts["name"]] == 1 else str(workdir): facts
        for workdir, facts in zip(workdirs, found, strict=True)
    }
