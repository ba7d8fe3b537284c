"""Finished runs, as their work directories have them."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Run(NamedTuple):
    """A finished run: what a table calls it, its `config.json` and its `report.json`."""

    name: str
    workdir: Path
    config: dict[str, Any]
    facts: dict[str, Any]

    @property
    def task(self) -> str:
        """As `data.task` has it."""
        return self.config["data"]["task"]

    @property
    def published(self) -> dict[str, float]:
        """The numbers of the published row that the config reproduces, by metric, as the paper prints
        them.
        """
        return self.config.get("source", {}).get("expected") or {}

    def scores(self, when: str = "after") -> dict[str, float | None]:
        """Of the test inputs. Nothing where there are none, or in an older version's report."""
        return self.facts.get("scores", {}).get(when, {})

    @property
    def examples_per_second(self) -> float:
        return self.config["train"]["batch"] / self.facts["numbers"]["median_seconds_per_step"]

    def peak_memory(self, of: str) -> int | None:
        """Bytes, `of` the "process" or the "device"; None where the report does not have it."""
        return self.facts.get("peak_memory", {}).get(of)


def runs(workdirs: Sequence[Path]) -> list[Run]:
    """Raises `ValueError` for a directory that holds no finished run."""
    found = [facts(workdir) for workdir in workdirs]
    return [
        Run(name, workdir, config(workdir), own)
        for name, workdir, own in zip(names(workdirs), workdirs, found, strict=True)
    ]


def metric_of(found: Sequence[Run]) -> str | None:
    """The metric by which runs of one task are compared: the first that is published, or else their first.
    None: they have no scores.
    """
    names = [name for run in found for name in run.scores()]
    published = [name for name in names if any(name in run.published for run in found)]
    return next(iter([*published, *names]), None)


def score(run: Run, metric: str) -> float:
    """The run's score of the test inputs. Raises `ValueError` where its report does not have that metric."""
    value = run.scores().get(metric)
    if value is None:
        known = ", ".join(name for name, found in run.scores().items() if found is not None) or "none"
        raise ValueError(
            f"`{run.workdir}` has no {metric} in its report: its metrics are {known}. Leave it out, or name "
            "another with `--metric`."
        )
    return value


def by_task(found: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each task, tasks and runs in the order in which they are given."""
    groups: dict[str, list[Run]] = {}
    for run in found:
        groups.setdefault(run.task, []).append(run)
    return groups


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
