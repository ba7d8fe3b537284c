"""The pictures of a sweep: loss against rate, against rank and against steps; and rates of several sweeps in
one.
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.reports.figures import new_figure
from experiments.sweeps.halving import combination


# The picture of a key, what stands below it, and the base of its logarithmic axis.
AXES = {
    "train.lr": ("rate", "learning rate", 10),
    "method.rank": ("rank", "rank", 2),
    "method.alpha": ("alpha", "alpha", 2),
    "optimizer.weight_decay": ("decay", "weight decay", None),
}

_WORSE = "worse than the untouched base"


def label(value: Any) -> str:
    if isinstance(value, int | float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def draw(facts: dict[str, Any], metrics: list[dict[str, Any]], directory: Path) -> None:
    """All pictures that the swept keys give; their names come into `facts`."""
    directory.mkdir(exist_ok=True)
    drawn = []
    for key, (name, words, base) in AXES.items():
        if len(facts["over"].get(key, ())) > 1:
            _draw_against(key, words, base, {"": facts}, facts["name"], directory / f"{name}.png")
            drawn.append(name)
    _draw_steps(facts, metrics, directory / "steps.png")
    facts["figures"] = [*drawn, "steps"]


def draw_rates(sweeps: Mapping[str, dict[str, Any]], path: Path) -> None:
    """The U-curves of several sweeps in one picture.

    Raises `ValueError` for a sweep of one rate.
    """
    for name, facts in sweeps.items():
        if len(facts["over"].get("train.lr", ())) < 2:
            raise ValueError(f"`--figure` draws losses against rates, and {name} is a sweep of one rate.")
    _draw_against("train.lr", "learning rate", 10, sweeps, "sweeps over rates", path)


def _draw_against(
    key: str, words: str, base: int | None, sweeps: Mapping[str, dict[str, Any]], title: str, path: Path
) -> None:
    """The last loss, or metric, against the values of `key`, a curve for each of the other values. What was
    dropped is hollow, as its loss is of an earlier step. Losses above that of the untouched base are at the
    upper edge, so that the others can be told apart.
    """
    figure, axes = new_figure()
    tables = {name: facts["table"] for name, facts in sweeps.items()}
    highest = {name: _untouched(facts) for name, facts in sweeps.items()}
    for prefix, table in tables.items():
        for name, lines in _curves(table, lambda line: _without(line["values"], key)).items():
            known = [line for line in lines if line["mean"] is not None]
            shown = [line for line in known if line["mean"] <= highest[prefix]]
            worse = [line["values"][key] for line in known if line not in shown]
            axes.plot(
                worse,
                [1.0] * len(worse),
                "^",
                color="black",
                clip_on=False,
                transform=axes.get_xaxis_transform(),
                label=_WORSE if worse and _WORSE not in axes.get_legend_handles_labels()[1] else None,
            )
            if not shown:
                continue
            points = [(line["values"][key], line["mean"], line["deviation"] or 0.0) for line in shown]
            x, y, spread = zip(*sorted(points), strict=True)
            words_of = ", ".join(filter(None, (prefix, name)))
            bars = axes.errorbar(x, y, spread, fmt="o-", linewidth=1, markersize=4, capsize=2, label=words_of)
            early = [(line["values"][key], line["mean"]) for line in shown if line["dropped"] is not None]
            if early:
                colour = bars.lines[0].get_color()
                axes.plot(*zip(*early, strict=True), "o", markerfacecolor="white", color=colour, markersize=5)
    if base is not None and all(value > 0 for value in _values(key, tables)):
        axes.set_xscale("log", base=base)
        if base == 2:
            axes.set_xticks(_values(key, tables), [label(value) for value in _values(key, tables)])
    axes.set(xlabel=words, ylabel=_measure(next(iter(sweeps.values()))), title=title)
    if any(axes.get_legend_handles_labels()[1]):
        axes.legend()
    figure.savefig(path, dpi=120)


def _untouched(facts: dict[str, Any]) -> float:
    """The validation loss before the first step; of a metric nothing is too high."""
    if facts.get("metric") is not None:
        return math.inf
    return max(row["first_valid_loss"] for row in facts["rows"])


def _measure(facts: dict[str, Any]) -> str:
    metric = facts.get("metric")
    return "validation loss (nats a token)" if metric is None else f"{metric} in validation"


def _values(key: str, tables: Mapping[str, Sequence[Any]]) -> list[Any]:
    return sorted({line["values"][key] for table in tables.values() for line in table})


def _curves(lines: Sequence[Any], name_of: Callable[[Any], str]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for line in lines:
        found.setdefault(name_of(line), []).append(line)
    return found


def _without(values: Mapping[str, Any], key: str) -> str:
    return ", ".join(
        f"{other.rpartition('.')[2]} {label(value)}" for other, value in values.items() if other != key
    )


def _draw_steps(facts: dict[str, Any], metrics: list[dict[str, Any]], path: Path) -> None:
    """What each combination is compared by over the steps, the mean over its seeds."""
    from matplotlib import colormaps

    figure, axes = new_figure()
    curves = _curves(facts["rows"], lambda row: combination(row["values"]))
    for place, rows in enumerate(curves.values()):
        points = []
        for line in metrics:
            values = [line.get(facts.get("metric") or "valid_loss", {}).get(row["name"]) for row in rows]
            if all(value is not None for value in values):
                points.append((line["step"], statistics.fmean(values)))
        if points:
            colour = colormaps["viridis"](place / max(len(curves) - 1, 1))
            name = _without(rows[0]["values"], "seed")
            axes.plot(*zip(*points, strict=True), "o-", linewidth=1, markersize=3, color=colour, label=name)
    axes.set(xlabel="step", ylabel=_measure(facts), title=facts["name"])
    if math.isfinite(_untouched(facts)):  # or those that diverge leave no room for the others
        axes.set_ylim(top=1.02 * _untouched(facts))
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120, bbox_inches="tight")
