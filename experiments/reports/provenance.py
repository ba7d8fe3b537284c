"""Where a result came from: enough to repeat it, and to know whether the committed code gave it."""

import datetime
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax


REPOSITORY = Path(__file__).resolve().parents[2]


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


def commit() -> str | None:
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
