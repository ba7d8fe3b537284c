"""What texts are worth, as tables of a page: the scores, and the values that they name."""

from collections.abc import Mapping
from typing import Any

from experiments import tasks
from experiments.config import Config
from experiments.tasks import Task


# Whose texts, in words: the reports' keys, in the order of the tables.
WRITERS = {"before": "base, untouched", "after": "this run", "people": "people"}


def of_writers(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a report has under the keys of writers, under their words and in their order."""
    return {words: found[key] for key, words in WRITERS.items() if key in found}


def as_printed(name: str, value: float | None, task: Task) -> str:
    """A score as papers print it: some in percent. "BLEU seen" is as BLEU."""
    percent = any(f"{name} ".startswith(f"{each} ") for each in task.percentages)
    return "-" if value is None else f"{100 * value:.2f}" if percent else f"{value:.4f}"


def scored(scores: dict[str, dict[str, float | None]], config: Config) -> list[str]:
    """The section of the task's metrics; nothing where there are none."""
    if not scores:
        return []
    task = tasks.of(config.data)
    names = list(scores["after"])
    rows = of_writers(scores)
    lines = ["## Scores (test inputs)", "", f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| {words} | {' | '.join(as_printed(name, found[name], task) for name in names)} |"
        for words, found in rows.items()
    ]
    words = " or ".join(part for part in task.parts if f"{names[0]} {part}" in names)
    expected = config.source.expected
    if expected:
        cells = (f"{expected[name]:g}" if name in expected else "-" for name in names)
        lines.append(f"| published | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        f"`python -m experiments score {task.name} {task.scored_again(config.data, names)}` gives these "
        "numbers again. In percent",
        f"here: {', '.join(task.percentages)}."
        + (" A dash under METEOR: java or its package was not there." if "METEOR" in names else "")
        + (f" `--filter` gives a part: {words}." if words else ""),
        "",
    ]


def percent(found: Mapping[str, Any]) -> dict[str, float]:
    """The values named in percent: of all, of each attribute's, and how many texts name all of theirs."""
    shares = {"all values": found["values"], **found["attributes"], "texts with all": found["all_values"]}
    return {name: 100 * share for name, share in shares.items()}


def named(found: Mapping[str, Any]) -> list[str]:
    """The section of the values named; nothing where there are none, or in an older version's report."""
    if not found:
        return []
    rows = {words: percent(shares) for words, shares in of_writers(found).items()}
    names = list(percent(found["after"]))
    lines = [
        "## Values named (test inputs)",
        "",
        f"| | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    lines += [
        f"| {words} | {' | '.join(f'{shares[name]:.1f}' for name in names)} |"
        for words, shares in rows.items()
    ]
    return [
        *lines,
        "",
        "Percent of the values of the records that the texts name, and of texts that name all of theirs: "
        "names by their words, the rest",
        "by the wordings of `experiments/metrics/values.py`. People leave some out. `score` with "
        "`--contexts contexts.txt` gives the first and last number again.",
        "",
        "![values](figures/values.png)",
        "",
    ]
