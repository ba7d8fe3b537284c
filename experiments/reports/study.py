"""A study in one table, as papers print theirs: a row for each method, a column for each task, the mean over
seeds with its deviation, and beside it the published number where a config names one.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from experiments.reports import finished
from experiments.reports.finished import Run
from experiments.reports.scores import as_printed
from experiments.reports.table import published
from experiments.reports.words import as_table, methods
from experiments.tasks import TASKS


def table(workdirs: Sequence[Path], metric: str | None = None) -> str:
    """The table as Markdown. A task's metric is `metric`, or else the one that is published, or else its
    first.

    Raises:
      ValueError: a directory holds no finished run, or one without that metric; two runs of a method and a
        task have one seed.
    """
    found = finished.runs(workdirs)
    tasks = finished.by_task(found)
    metrics = {task: metric or _metric(runs) for task, runs in tasks.items()}
    rows: dict[str, list[Run]] = {}
    for run, method in zip(found, methods([run.config for run in found]), strict=True):
        rows.setdefault(method, []).append(run)
    lines = []
    for method, own in rows.items():
        line = {"method": method, "trained parameters": _counted([run.facts["trainable"] for run in own])}
        for task, name in metrics.items():
            title = f"{task.removeprefix('glue/')} {name}"
            runs = [run for run in own if run.task == task]
            line[title] = _mean(runs, name) if runs else "-"
            if any(name in run.published for run in tasks[task]):
                line[f"{title}, published"] = published(runs[0], name) if runs else "-"
        lines.append(line)
    seeds = {len(cell) for own in rows.values() for cell in finished.by_task(own).values()}
    return "\n".join([as_table(lines), *_remark(seeds)])


def _metric(runs: Sequence[Run]) -> str:
    found = finished.metric_of(runs)
    if found is None:
        raise ValueError(
            f"`{runs[0].workdir}` has no scores in its report, and a study is of scores: leave it out, or "
            "compare without `--study`."
        )
    return found


def _mean(runs: Sequence[Run], metric: str) -> str:
    seeds = [run.config["seed"] for run in runs]
    for place, seed in enumerate(seeds):
        if seed in seeds[:place]:
            raise ValueError(
                f"`{runs[seeds.index(seed)].workdir}` and `{runs[place].workdir}` are of one method, one "
                f"task and one seed ({seed}), which a mean over seeds cannot have: leave one of them out."
            )
    values = [finished.score(run, metric) for run in runs]
    task = TASKS[runs[0].task]
    mean = as_printed(metric, statistics.fmean(values), task)
    if len(values) == 1:
        return mean
    return f"{mean} ± {as_printed(metric, statistics.stdev(values), task)}"


def _counted(counts: Sequence[int]) -> str:
    """Heads of other labels have other sizes."""
    least, most = min(counts), max(counts)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _remark(seeds: set[int]) -> list[str]:
    if seeds == {1}:
        return ["", "Each number is of one seed."]
    least, most = min(seeds), max(seeds)
    count = str(most) if least == most else f"{least} to {most}"
    return ["", f"Means over {count} seeds; ± is the sample deviation."]
