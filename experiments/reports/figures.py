"""The pictures of finished runs: losses, and the values that texts name; of one run or of several."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.config import Config
from experiments.progress import read_metrics
from experiments.reports import finished
from experiments.reports.scores import percent, WRITERS
from experiments.reports.words import without_common_start


def draw(metrics: list[dict[str, Any]], config: Config, path: Path) -> None:
    """Training and validation loss over the steps, with what only the former has."""
    only = of_training_only(config)
    training = f"training, with {' and '.join(only)}" if only else "training"
    _plot({training: _curve(metrics, "loss"), "validation": _curve(metrics, "valid_loss")}, config.name, path)


def of_training_only(config: Config) -> list[str]:
    """What raises the training loss and is not in the validation loss."""
    smoothing, dropout = config.train.label_smoothing, config.method.get("dropout")
    found = {f"label smoothing {smoothing:g}": smoothing, f"dropout {dropout}": dropout}
    return [words for words, value in found.items() if value]


def draw_values(writers: Mapping[str, Mapping[str, Any]], title: str, path: Path) -> None:
    """Groups of bars: all values, each attribute, and texts with all. `writers`: whose texts, in words, and
    what `metrics.values.score` has of them.
    """
    shares = {writer: percent(found) for writer, found in writers.items()}
    first, *attributes, last = dict.fromkeys(name for found in shares.values() for name in found)
    groups = [first, *(name for name in attributes if name != last), last]
    width, middle = 0.8 / len(writers), (len(writers) - 1) / 2
    figure, axes = new_figure(max(7, 3 + 0.12 * len(groups) * len(writers)))
    colours = _colours(writers)
    for place, (writer, found) in enumerate(shares.items()):
        bars = {
            group + (place - middle) * width: found[name]
            for group, name in enumerate(groups)
            if name in found
        }
        axes.bar(bars.keys(), bars.values(), width, label=writer, color=colours[writer])
    axes.set(ylabel="named (%)", title=title, ylim=(0, 101))
    axes.set_xticks(range(len(groups)), [textwrap.fill(name, 9) for name in groups])
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.5, alpha=0.5)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def draw_values_together(workdirs: Sequence[Path], path: Path) -> None:
    """The values that the texts of several finished runs name, in one picture; the untouched base and people
    once each, from the first run that has them.

    Raises `ValueError` for a run whose report has no values.
    """
    reports = [finished.facts(workdir).get("values", {}) for workdir in workdirs]
    for workdir, values in zip(workdirs, reports, strict=True):
        if not values:
            raise ValueError(
                f"`{workdir}` has no values named in its report: it is of an older version, or its "
                "test inputs are no records with a name. Leave it out of `--values`."
            )
    once = {key: found for values in reversed(reports) for key, found in values.items()}
    writers: dict[str, Any] = {}
    for key, words in WRITERS.items():
        if key == "after":
            names = without_common_start(finished.names(workdirs))
            writers |= zip(names, (values[key] for values in reports), strict=True)
        elif key in once:
            writers[words] = once[key]
    draw_values(writers, "values named", path)


def _colours(writers: Iterable[str]) -> dict[str, Any]:
    """Greys for the base and for people, and a colour of its own for each run."""
    greys = {WRITERS["before"]: "0.75", WRITERS["people"]: "0.25"}
    return greys | colours_of(writer for writer in writers if writer not in greys)


def colours_of(names: Iterable[str]) -> dict[str, Any]:
    """A colour for each name, in the order in which they come; none is grey."""
    from matplotlib import colormaps

    distinct = list(dict.fromkeys(names))
    few = [colormaps["tab10"](place) for place in range(10) if place != 7]  # its grey
    many = [colormaps["turbo"](place / len(distinct)) for place in range(len(distinct))]
    return dict(zip(distinct, few if len(distinct) <= len(few) else many, strict=False))


def draw_together(workdirs: Sequence[Path], path: Path) -> None:
    """The validation losses of several finished runs in one picture, named in the order in which they end."""
    names = without_common_start(finished.names(workdirs))
    curves = {
        name: _curve(read_metrics(workdir / "metrics.jsonl"), "valid_loss")
        for name, workdir in zip(names, workdirs, strict=True)
    }
    trained = {
        name: after_the_start(points)
        for name, points in sorted(curves.items(), key=lambda curve: curve[1][-1][1], reverse=True)
    }
    figure, axes = new_figure(8)
    _add(axes, trained, colours_of(names))
    axes.set(ylabel="validation loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.5, alpha=0.5)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=120)


def after_the_start(points: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """The points without the one before the first step, where others follow: it is far from them."""
    return [point for point in points if point[0] > 0] or points


def _curve(metrics: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in metrics if name in line]


def _plot(curves: dict[str, list[tuple[int, float]]], title: str, path: Path) -> None:
    figure, axes = new_figure()
    _add(axes, curves, colours_of(curves))
    axes.set(ylabel="loss", title=title)
    axes.legend()
    figure.savefig(path, dpi=120)


def _add(axes: Any, curves: Mapping[str, Sequence[tuple[int, float]]], colours: Mapping[str, Any]) -> None:
    """A line over the steps for each curve."""
    for label, points in curves.items():
        # Few points, as of a validation loss, are shown as such.
        look = {"color": colours[label], "linewidth": 1, "markersize": 3}
        axes.plot(*zip(*points, strict=True), "o-" if len(points) < 30 else "-", label=label, **look)
    axes.set(xlabel="step")


def new_figure(width: float = 7) -> tuple[Any, Any]:
    figure = _canvas(width, 4)
    return figure, figure.subplots()


def new_panels(count: int) -> tuple[Any, list[Any]]:
    """A figure of so many panels, two beside each other."""
    columns, rows = min(count, 2), -(-count // 2)
    figure = _canvas(max(6.5, 4.5 * columns), 0.6 + 3.4 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[count:]:
        unused.set_visible(False)
    return figure, panels[:count]


def new_grid(rows: int, columns: int) -> tuple[Any, Any]:
    """A figure of small panels in rows and columns, as an array."""
    figure = _canvas(0.8 + 2.6 * columns, 0.5 + 2.2 * rows)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _canvas(width: float, height: float) -> Any:
    # The object interface: no display, no global state, whatever backend the user has chosen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
