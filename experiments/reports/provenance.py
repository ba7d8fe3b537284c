"""Where a result came from: enough to repeat it, and to know whether the committed code gave it.

`provenance.jsonl` in a work directory has a line for each process whose steps are in the result, as a run may
go on at another commit.
"""

import datetime
import functools
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.progress import read_metrics


REPOSITORY = Path(__file__).resolve().parents[2]
FILE = "provenance.jsonl"


def begin(workdir: Path, step: int) -> None:
    """Says in `workdir` that what comes after `step` is of this process. What was said of steps that are now
    done again is left out.
    """
    kept = [line for line in said(workdir) if line["step"] < step]
    fresh = workdir / f"{FILE}.tmp"
    lines = [*kept, {"step": step, **provenance()}]
    fresh.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    fresh.replace(workdir / FILE)


def said(workdir: Path) -> list[dict[str, Any]]:
    """The provenance of each process, and the `step` after which it went on."""
    return read_metrics(workdir / FILE)


def commits(lines: Sequence[dict[str, Any]]) -> str:
    """Each commit with its date, and after which step it took over.

    >>> first = {"step": 0, "commit": "1a2b", "date": "2026-11-29"}
    >>> commits([first, {**first, "step": 40}, {"step": 60, "commit": None, "date": "2026-11-30"}])
    '1a2b, 2026-11-29; after step 60 outside of a clone, 2026-11-30'
    """
    words, before = [], ""
    for line in lines:
        commit = line["commit"] or "outside of a clone"
        if commit != before:
            after = f"after step {line['step']:,} " if words else ""
            words.append(f"{after}{commit}, {line['date']}")
        before = commit
    return "; ".join(words)


def provenance() -> dict[str, Any]:
    """The commit (with `+changes` where the code differs from it, None outside of a clone), jax, the
    device and the date.
    """
    return {
        "commit": commit(),
        "jax": jax.__version__,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "date": datetime.date.today().isoformat(),
    }


@functools.cache
def commit() -> str | None:
    """That of the first call: the files may change while a process goes on with what it has read."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], capture_output=True, text=True, check=True, cwd=REPOSITORY
        ).stdout.strip()

    try:
        changed = git(
            "status",
            "--porcelain",
            "--untracked-files=no",
            "--",
            "lora_jax",
            "experiments",
            "benchmarks",
            ":(exclude,glob)*/results/**",
        )
        return git("rev-parse", "--short=10", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def command() -> str:
    """The command line of this process, as it would be typed from the repository."""
    program = Path(sys.argv[0])
    words = ["python", "-m", program.parent.name] if program.name == "__main__.py" else [program.name]
    return shlex.join([*words, *sys.argv[1:]])
