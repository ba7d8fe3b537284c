"""Several finished runs in one table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.reports import finished
from experiments.reports.scores import as_printed, percent
from experiments.tasks import TASKS


def table(workdirs: Sequence[Path]) -> str:
    """One line a finished run, as Markdown. Raises `ValueError` for a directory that holds none."""
    reports = [finished.facts(workdir) for workdir in workdirs]
    # Of each run's scores the first, which is what its task is known by.
    metrics = dict.fromkeys(name for facts in reports for name in list(_scores(facts, "after"))[:1])
    rows = [
        _row(name, finished.config(workdir), facts, list(metrics) or ["BLEU"])
        for name, workdir, facts in zip(finished.names(workdirs), workdirs, reports, strict=True)
    ]
    lines = [rows[0].keys(), *(row.values() for row in rows)]
    head, *body = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def _scores(facts: dict[str, Any], when: str) -> dict[str, float | None]:
    return facts.get("scores", {}).get(when, {})


def _row(name: str, config: dict[str, Any], facts: dict[str, Any], metrics: Sequence[str]) -> dict[str, str]:
    """A dash for what the run has not: pretraining has no scores, and older reports have no values."""
    found, values, task = facts["numbers"], facts.get("values", {}), TASKS[config["data"]["task"]]
    named = percent(values["after"]) if values else {}
    return {
        "run": name,
        "trainable": f"{facts['trainable']:,}",
        "rate": f"{config['train']['lr']:g}",
        "steps": f"{found['steps']:,}",
        "validation loss before": f"{found['first_valid_loss']:.4f}",
        "after": f"{found['valid_loss']:.4f}",
        **{
            f"{metric} {when}": as_printed(metric, _scores(facts, when).get(metric), task)
            for metric in metrics
            for when in ("before", "after")
        },
        "values named": f"{named['all values']:.1f}" if named else "-",
        "texts with all": f"{named['texts with all']:.1f}" if named else "-",
        "s/step": f"{found['median_seconds_per_step']:.3f}",
        "merged - adapted": f"{facts['comparison']['max_difference']:.1e}",
    }
