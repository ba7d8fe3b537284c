"""Pictures of several finished runs beside each other, a panel for each task: what they reach with how many
trained parameters (the paper's figure 2), what they reach after each epoch, and what they cost.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.progress import read_metrics
from experiments.reports import finished
from experiments.reports.figures import after_the_start, colours_of, new_panels
from experiments.reports.finished import Run
from experiments.reports.words import method, methods, without_common_start
from experiments.tasks import TASKS


LOSS = "valid_loss"


def draw_parameters(workdirs: Sequence[Path], path: Path, metric: str | None = None) -> None:
    """A point for each run: its score against its trained parameters. A published number is hollow.

    The metric is `metric`, "valid_loss" too, or else the one that is published, or the first. Raises
    `ValueError` for a run whose report does not have it.
    """
    found = finished.runs(workdirs)
    colours = colours_of([method(run.config) for run in found])
    figure, panels = new_panels(len(finished.by_task(found)))
    named = []
    for axes, (task, runs) in zip(panels, finished.by_task(found).items(), strict=True):
        name = metric or finished.metric_of(runs) or LOSS
        names = without_common_start([run.config["name"] for run in runs])
        points: list[tuple[str, float, float]] = []
        for words, run in zip(names, runs, strict=True):
            colour, count = colours[method(run.config)], run.facts["trainable"]
            value = run.facts["numbers"][LOSS] if name == LOSS else finished.score(run, name)
            shown = _in_print(value, name, task)
            axes.plot(count, shown, "o", color=colour, markersize=5)
            points.append((words, count, shown))
            if name in run.published:
                axes.plot(
                    count, run.published[name], "o", color=colour, markerfacecolor="white", markersize=7
                )
        axes.set_xscale("log")
        axes.margins(0.15)
        axes.set(xlabel="trained parameters", ylabel=_label(name, task), title=task)
        named.append((axes, points))
    _legend(figure, colours, hollow=any(run.published for run in found))
    figure.canvas.draw()  # the layout, which moves every point
    for axes, points in named:
        _name(axes, points)
    figure.savefig(path, dpi=120)


def _name(axes: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """Writes each point's name beside it, at the first place where it covers no other name and no point."""
    from matplotlib.transforms import Bbox

    dots = axes.transData.transform([point[1:] for point in points])
    taken = [Bbox([dot - 3, dot + 3]) for dot in dots]
    for words, *point in points:
        look = {"textcoords": "offset points", "fontsize": "x-small", "va": "center", "in_layout": False}
        text = axes.annotate(words, point, xytext=_PLACES[0], **look)
        free = (
            place for place in _PLACES if not any(_placed(text, place).overlaps(other) for other in taken)
        )
        taken.append(_placed(text, next(free, _PLACES[0])))


def _placed(text: Any, place: tuple[int, int]) -> Any:
    """Moves an annotation to a place, and returns the box of its words there."""
    text.set_position(place)
    text.set_horizontalalignment("left" if place[0] > 0 else "right")
    return text.get_window_extent()


# Where a name stands from its point, in points of print; the best first.
_PLACES = [(6, 0), (-6, 0), (5, 8), (5, -8), (-5, 8), (-5, -8), (5, 16), (5, -16), (-5, 16), (-5, -16)]


def draw_epochs(workdirs: Sequence[Path], path: Path, metric: str | None = None) -> None:
    """What each evaluation found, against the epochs before it; a curve for each run, and a colour for each
    method.

    Raises `ValueError` for a run whose evaluations do not have the metric, which is the first of a task that
    is judged, or else the loss.
    """
    found = finished.runs(workdirs)
    told = methods([run.config for run in found])
    colours = colours_of(told)
    words = dict(zip([run.workdir for run in found], told, strict=True))
    figure, panels = new_panels(len(finished.by_task(found)))
    for axes, (task, runs) in zip(panels, finished.by_task(found).items(), strict=True):
        first = _evaluations(runs[0])[-1]
        name = metric or next((key for key in first if key not in ("step", LOSS)), LOSS)
        for run in runs:
            lines = _evaluations(run)
            if not all(name in line for line in lines):
                known = ", ".join(key for key in lines[-1] if key != "step")
                raise ValueError(
                    f"`{run.workdir}` has no {name} in its evaluations, which have {known}: leave it out, "
                    "or name another with `--metric`."
                )
            epoch = run.facts["examples"]["train"] / run.config["train"]["batch"]
            points = [(line["step"] / epoch, _in_print(line[name], name, task)) for line in lines]
            places = zip(*after_the_start(points), strict=True)
            axes.plot(*places, "o-", color=colours[words[run.workdir]], linewidth=1, markersize=3)
        of = "" if name == LOSS else ", validation"
        axes.set(xlabel="epoch", ylabel=f"{_label(name, task)}{of}", title=task)
        axes.locator_params(axis="x", integer=axes.get_xlim()[1] > 2)  # a short run has parts of an epoch
    _legend(figure, colours)
    figure.savefig(path, dpi=120)


def draw_costs(workdirs: Sequence[Path], path: Path) -> None:
    """Two panels of bars, of examples a second and of the peak memory; a group for each task, a bar for each
    run.

    Memory is that of the device where all runs have it, and otherwise that of the process. Raises
    `ValueError` for a run whose report has neither.
    """
    found = finished.runs(workdirs)
    told = methods([run.config for run in found])
    of = "device" if all(run.peak_memory("device") for run in found) else "process"
    for run in found:
        if run.peak_memory(of) is None:
            raise ValueError(
                f"`{run.workdir}` has no peak memory in its report, which is of an older version: leave it "
                "out, or run it again."
            )
    colours, tasks = colours_of(told), list(finished.by_task(found))
    words = dict(zip([run.workdir for run in found], told, strict=True))
    figure, panels = new_panels(2)
    heights = {
        "examples a second, in training": lambda run: run.examples_per_second,
        f"peak memory of the {of} (MB)": lambda run: run.peak_memory(of) / 1e6,
    }
    for axes, (label, height) in zip(panels, heights.items(), strict=True):
        for group, runs in enumerate(finished.by_task(found).values()):
            width = 0.8 / len(runs)
            for place, run in enumerate(runs):
                middle = group + (place - (len(runs) - 1) / 2) * width
                axes.bar(middle, height(run), width, color=colours[words[run.workdir]], edgecolor="white")
        axes.set_xticks(range(len(tasks)), tasks)
        axes.set(ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.5, alpha=0.5)
        axes.set_axisbelow(True)
    _legend(figure, colours)
    figure.savefig(path, dpi=120)


def _evaluations(run: Run) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run.workdir / "metrics.jsonl") if LOSS in line]


def _in_print(value: float, metric: str, task: str) -> float:
    """In percent where papers print it so."""
    return 100 * value if metric in TASKS[task].percentages else value


def _label(metric: str, task: str) -> str:
    words = "validation loss" if metric == LOSS else metric
    return f"{words} (%)" if metric in TASKS[task].percentages else words


def _legend(figure: Any, colours: Mapping[str, Any], *, hollow: bool = False) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], marker="o", linestyle="", color=colour) for colour in colours.values()]
    labels = list(colours)
    if hollow:
        handles.append(Line2D([], [], marker="o", linestyle="", color="0.3", markerfacecolor="white"))
        labels.append("published")
    columns = min(len(labels), math.ceil(len(labels) / math.ceil(len(labels) / 6)))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize="small")
