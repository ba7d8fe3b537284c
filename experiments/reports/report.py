"""What a finished run leaves: `report.json`, the figures, and `report.md`.

`report.json` holds what the page says as numbers; the page is a rendering of it, of `config.json` and of
`metrics.jsonl`.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from experiments.config import Config
from experiments.progress import read_metrics
from experiments.reports import card, figures, page, provenance, scores


def write(workdir: Path, config: Config, facts: dict[str, Any]) -> None:
    """Draws the figure, then writes `report.json`, then `report.md`, whose presence says that the run is
    finished.
    """
    metrics = read_metrics(workdir / "metrics.jsonl")
    facts = {
        **facts,
        "numbers": numbers(metrics),
        "notes": [line["note"] for line in metrics if "note" in line],
        "command": provenance.command(),
        **provenance.provenance(),
        "processes": provenance.said(workdir),
    }
    (workdir / "figures").mkdir(exist_ok=True)
    figures.draw(metrics, config, workdir / "figures" / "loss.png")
    if facts.get("values"):
        figures.draw_values(
            scores.of_writers(facts["values"]), config.name, workdir / "figures" / "values.png"
        )
    (workdir / "report.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", "utf-8")
    if (workdir / "adapter").is_dir():
        (workdir / "adapter" / "README.md").write_text(
            card.render(config, facts, page.prompt(facts["prompt"])), "utf-8"
        )
    fresh = workdir / "report.tmp"
    fresh.write_text(page.render(config, facts), "utf-8")
    fresh.replace(workdir / "report.md")


def numbers(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """What a table of runs shows of a run's metrics."""
    valid = [line["valid_loss"] for line in metrics if "valid_loss" in line]
    train = [line["loss"] for line in metrics if "loss" in line]
    seconds = [line["seconds_per_step"] for line in metrics if "seconds_per_step" in line]
    return {
        "steps": metrics[-1]["step"],
        "first_valid_loss": valid[0],
        "valid_loss": valid[-1],
        "best_valid_loss": min(valid),
        "train_loss": train[-1],
        "median_seconds_per_step": statistics.median(seconds),
    }
