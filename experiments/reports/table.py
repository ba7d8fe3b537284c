"""Several finished runs in one table, a line each, beside the published numbers of the rows that they
reproduce.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.reports import finished
from experiments.reports.finished import Run
from experiments.reports.scores import as_printed, percent
from experiments.reports.words import as_table, megabytes
from experiments.tasks import TASKS


def table(workdirs: Sequence[Path]) -> str:
    """One line a finished run, as Markdown. Raises `ValueError` for a directory that holds none."""
    found = finished.runs(workdirs)
    # Of each run's scores the first, which is what its task is known by, and those that are published.
    metrics = dict.fromkeys(
        name
        for run in found
        for place, name in enumerate(run.scores())
        if place == 0 or name in run.published
    )
    columns = Columns(
        list(metrics) or ["BLEU"],
        tuple(name for name in metrics if any(name in run.published for run in found)),
        tuple(of for of in ("process", "device") if any(run.peak_memory(of) for run in found)),
    )
    return as_table([_row(run, columns) for run in found])


class Columns(NamedTuple):
    """What of several runs is shown: `published` and `memory` are of those that some run has."""

    metrics: Sequence[str]
    published: tuple[str, ...]
    memory: tuple[str, ...]


def _row(run: Run, columns: Columns) -> dict[str, str]:
    """A dash for what the run has not: pretraining has no scores, and older reports have no values."""
    facts, task = run.facts, TASKS[run.task]
    found, values = facts["numbers"], facts.get("values", {})
    named = percent(values["after"]) if values else {}
    row = {
        "run": run.name,
        "trainable": f"{facts['trainable']:,}",
        "rate": f"{run.config['train']['lr']:g}",
        "steps": f"{found['steps']:,}",
        "validation loss before": f"{found['first_valid_loss']:.4f}",
        "after": f"{found['valid_loss']:.4f}",
    }
    for metric in columns.metrics:
        row |= {
            f"{metric} {when}": as_printed(metric, run.scores(when).get(metric), task)
            for when in ("before", "after")
        }
        if metric in columns.published:
            row[f"{metric} published"] = published(run, metric)
    return row | {
        "values named": f"{named['all values']:.1f}" if named else "-",
        "texts with all": f"{named['texts with all']:.1f}" if named else "-",
        "s/step": f"{found['median_seconds_per_step']:.3f}",
        "examples/s": f"{run.examples_per_second:.1f}",
        **{f"peak memory of the {of}": megabytes(run.peak_memory(of)) for of in columns.memory},
        "merged - adapted": f"{facts['comparison']['max_difference']:.1e}",
    }


def published(run: Run, metric: str) -> str:
    """As the paper prints it; a dash where no paper has this row."""
    return f"{run.published[metric]:g}" if metric in run.published else "-"
