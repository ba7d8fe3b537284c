"""The progress of a run: `metrics.jsonl`, one JSON object a line, and a bar on a terminal or plain lines
elsewhere.
"""

import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO


# Seconds between two plain lines about a training loss: a log file should be readable, not a copy of
# metrics.jsonl.
QUIET = 20.0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`. A last line that a crash cut short is left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text("utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


class _Bar:
    """A bar on a terminal; nothing elsewhere, where `shown` is False."""

    def __init__(self, out: TextIO, name: str, total: int, done: int = 0):
        self._out, self.shown = out, out.isatty()
        if not self.shown:
            return
        from rich import progress
        from rich.console import Console

        columns = [
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[numbers]}"),
        ]
        self._progress = progress.Progress(*columns, console=Console(file=out))
        self._task = self._progress.add_task(name, total=total, completed=done, numbers="")

    def start(self) -> None:
        if self.shown:
            self._progress.start()

    def stop(self) -> None:
        if self.shown:
            self._progress.stop()

    def above(self, text: str) -> None:
        """A line of text, above the bar where there is one."""
        if self.shown:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._out, flush=True)

    def update(self, done: int, **fields: Any) -> None:
        if self.shown:
            self._progress.update(self._task, completed=done, **fields)


class Count:
    """Shows how many of `total` are done: on a bar or, elsewhere, on a line now and then."""

    def __init__(self, name: str, total: int, out: TextIO | None = None, *, silent: bool = False):
        self._out = io.StringIO() if silent else sys.stdout if out is None else out
        self._name, self._total = name, total
        self._spoke = time.monotonic()
        self._bar = _Bar(self._out, name, total)

    def __enter__(self) -> "Count":
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def update(self, done: int) -> None:
        self._bar.update(done)
        if not self._bar.shown and time.monotonic() - self._spoke >= QUIET:
            self._spoke = time.monotonic()
            print(f"{self._name}: {done}/{self._total}", file=self._out, flush=True)


class Record:
    """The metrics of a work directory, opened at `step`: later lines of an interrupted run are removed.

    `out`: what the user reads, standard output by default. `silent`: nothing is written or shown, as in all
    but the first of several processes.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        steps: int,
        step: int,
        out: TextIO | None = None,
        *,
        silent: bool = False,
    ):
        self.directory = directory
        self._name, self._steps = name, steps
        self._spoke = -QUIET
        if silent:
            self._evaluated: set[int] = set()
            self._noted: set[tuple[int, str]] = set()
            self._file: TextIO = open(os.devnull, "a", encoding="utf-8")
            self._out: TextIO = self._file
            self._bar = _Bar(self._out, name, steps, step)
            return
        self._out = sys.stdout if out is None else out
        path = directory / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= step] if step else []
        # In one move, so that a crash here leaves the old file or the new one.
        fresh = path.with_suffix(".tmp")
        fresh.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")
        fresh.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self._evaluated = {line["step"] for line in kept if "valid_loss" in line}
        self._noted = {(line["step"], line["note"]) for line in kept if "note" in line}
        self._bar = _Bar(self._out, name, steps, step)

    def __enter__(self) -> "Record":
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()
        self._file.close()

    def note(self, step: int, text: str) -> None:
        """Writes and shows a remark on this step. The report repeats it. What was said before the run was
        stopped is not written again.
        """
        if (step, text) not in self._noted:
            self._write(step, note=text)
        self._noted.add((step, text))
        self._bar.above(f"{self._name}: {text}")

    def _write(self, step: int, **values: Any) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def evaluated(self, step: int) -> bool:
        """Whether the run has come to the evaluation of this step, before it was stopped too."""
        return step in self._evaluated

    def advance(self, step: int) -> None:
        self._bar.update(step)

    def log(self, step: int, **numbers: Any) -> None:
        """Writes a line of metrics, which is on the disk when this returns, and shows it to the user. Of
        several adapters, a number is an object with the number of each.
        """
        self._write(step, **numbers)
        if "valid_loss" in numbers:
            self._evaluated.add(step)
        names = list(numbers) if "valid_loss" in numbers else ["loss"]
        shown = [f"{name} {_shown(numbers[name])}" for name in names if name in numbers]
        if "seconds_per_step" in numbers:
            shown.append(f"{numbers['seconds_per_step']:.3f} s/step")
        self._bar.update(step, numbers=", ".join(shown))
        if self._bar.shown:
            return
        now = time.monotonic()
        if "valid_loss" in numbers or now - self._spoke >= QUIET:
            self._spoke = now
            print(f"{self._name}: step {step}/{self._steps}, {', '.join(shown)}", file=self._out, flush=True)


def _shown(number: float | dict[str, float | None]) -> str:
    """A number, or the smallest and the largest of several; None is one that is not finite."""
    if not isinstance(number, dict):
        return f"{number:.4f}"
    finite = [value for value in number.values() if value is not None]
    return f"{min(finite):.4f} to {max(finite):.4f}" if finite else "not finite"
