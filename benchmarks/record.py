"""The file of a result: `results/NAME-jax-VERSION.json`, and the same as a table in `.md`."""

import json
from pathlib import Path
from typing import Any

import jax


RESULTS = Path(__file__).parent / "results"


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; ratios are printed to four decimals."""
    columns = list(dict.fromkeys(column for row in rows for column in row))

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)

    lines = [
        columns,
        ["---"] * len(columns),
        *([cell(row.get(column)) for column in columns] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def save(name: str, command: str, about: dict[str, Any], rows: list[dict[str, Any]], notes: str = "") -> None:
    stem = f"{name}-jax-{jax.__version__}"
    RESULTS.mkdir(exist_ok=True)
    document = {"command": command, **about, "rows": rows}
    (RESULTS / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
    head = "\n".join(f"- {key}: {value}" for key, value in {"command": f"`{command}`", **about}.items())
    (RESULTS / f"{stem}.md").write_text(f"# {name}\n\n{head}\n\n{table(rows)}\n{notes}")
