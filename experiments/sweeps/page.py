"""The page of a finished sweep, `sweep.md`."""

from collections.abc import Sequence
from typing import Any

from experiments.reports.provenance import commits
from experiments.reports.words import what_trains
from experiments.sweeps import compared
from experiments.sweeps.figures import label


def render(facts: dict[str, Any]) -> str:
    """The page, as Markdown."""
    base, own, memory = facts["base"], facts["bytes"], facts["memory"]
    over = "; ".join(f"`{key}` {', '.join(map(label, values))}" for key, values in facts["over"].items())
    rows = {
        "swept": f"{over}: {facts['adapters']} adapters in one program",
        "method": what_trains(
            facts["method"], facts["targets"], facts.get("baseline"), remark=" (of the first)"
        ),
        "base": f"{base['origin']}, fingerprint `{base['fingerprint']}`",
        "steps": f"{facts['steps']:,} of {facts['batch']} examples for each adapter",
        "time": f"{facts['median_seconds_per_step']:.3f} s for a step of all (median) on {facts['device']}, "
        f"jax {facts['jax']}",
        "memory": _memory(base["bytes"], own, memory, facts["adapters"]),
        "command": f"`{facts['command']}`",
        "commit, date": commits(facts["processes"]),
    }
    lines = [f"# {facts['name']}: a sweep", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    lines += ["", *(f"- {note}" for note in facts["notes"])] if facts["notes"] else []
    lines += ["", f"## {_compared(facts).capitalize()}", "", *table(facts), ""]
    lines += [f"![{name}](figures/{name}.png)\n" for name in facts["figures"]]
    lines += _best(facts)
    return "\n".join(lines)


def table(facts: dict[str, Any]) -> list[str]:
    """A line for each combination, the best in bold; the mean over its seeds, and their sample deviation. Of
    a metric also the best of each adapter's evaluations, as papers choose it.
    """
    metric = facts.get("metric")
    keys = [key for key in facts["over"] if key != "seed"]
    remarks = [_remark(line) for line in facts["table"]]
    more = ["remark"] if any(remarks) else []
    head = [*(f"`{key}`" for key in keys), "adapters", _compared(facts)]
    head += [*([] if metric is None else ["at the best evaluation"]), *more]
    ended = [line for line in facts["table"] if line["mean"] is not None and line["dropped"] is None]
    best = min(ended, key=compared.by(metric), default=None)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for line, remark in zip(facts["table"], remarks, strict=True):
        loss = mean_and_deviation(line)
        if best is not None and line["mean"] == best["mean"] and line["dropped"] is None:
            loss = f"**{loss}**"
        cells = [*(label(line["values"][key]) for key in keys), str(line["adapters"]), loss]
        cells += [] if metric is None else [mean_and_deviation(line["best"])]
        cells += [remark] if more else []
        lines.append(f"| {' | '.join(cells)} |")
    if any(line["deviation"] is not None for line in facts["table"]):
        lines += ["", "± is the sample deviation over the seeds."]
    return lines


def _compared(facts: dict[str, Any]) -> str:
    """What the table shows, in words."""
    metric = facts.get("metric")
    return compared.LOSS if metric is None else f"{metric} in validation"


def mean_and_deviation(line: dict[str, Any]) -> str:
    if line["mean"] is None:
        return "-"
    spread = "" if line["deviation"] is None else f" ± {line['deviation']:.4f}"
    return f"{line['mean']:.4f}{spread}"


def _remark(line: dict[str, Any]) -> str:
    said = [] if line["dropped"] is None else [f"dropped after step {line['dropped']}"]
    return "; ".join([*said, *(f"not finite: {name}" for name in line["lost"])])


def _memory(base: int, own: dict[str, int], memory: dict[str, int] | None, adapters: int) -> str:
    words = (
        f"the base once, {_megabytes(base)}, and of all adapters {_megabytes(own['adapters'])} with "
        f"{_megabytes(own['optimiser'])} of the optimiser's"
    )
    if memory is None:
        return words
    return (
        f"{words}; the compiled step takes {_megabytes(memory['argument'])} of arguments and "
        f"{_megabytes(memory['temp'])} of temporaries"
    )


def _best(facts: dict[str, Any]) -> Sequence[str]:
    if facts.get("baseline") is None:
        kept = "`adapters/` has each adapter in PEFT's format, which `convert` merges."
        finishes = "This merges it, decodes the test inputs and writes its report. `export` then takes it:"
    else:
        kept = "`adapters/` has what each one trained, in `trained.safetensors`."
        finishes = "This decodes the test inputs and writes its report:"
    lines = [
        f"{kept} `sweep.json` has the numbers of each, and `metrics.jsonl` those of every step that was "
        "logged.",
        "",
    ]
    for name, words in facts["best"].items():
        lines += [
            f"The best is `{name}`. {finishes}",
            "",
            "```bash",
            words["run"],
            "```",
            "",
        ]
    return lines


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.2f} MB"
