"""What `plan` says of GPT-3 175B, and how long it takes to say it.

    python -m benchmarks.plan_gpt3_175b

On what: LoRA of rank 4 on query and value, a batch of 64 x 2,048 tokens in bfloat16, beside full fine-tuning,
on 64 and on 512 virtual devices. Nothing is allocated, and nothing is run. Bound (exit status 1 if missed):
each command ends in less than a minute, with its four compilations: both steps, as asked for and in 32 bits.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.reports.provenance import provenance, REPOSITORY

from . import record


MESHES = {64: "fsdp=64", 512: "fsdp=64,tensor=8"}
SECONDS = 60


def plan(devices: int, mesh: str) -> tuple[dict[str, Any], str]:
    """A row, and what the command prints."""
    words = ["-m", "experiments", "plan", "gpt3-175b", "--mesh", mesh, "--rank", "4", "--compare-full"]
    with tempfile.TemporaryDirectory() as directory:
        file, started = Path(directory) / "plan.json", time.perf_counter()
        printed = subprocess.run(
            [sys.executable, *words, "--json", str(file)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
        took, found = time.perf_counter() - started, json.loads(file.read_text())
    row = {
        "devices": devices,
        "seconds": round(took),
        "bytes a device, stored": found["step"]["bytes"]["static"],
        "with temporaries": found["step"]["bytes"]["total"],
    }
    return row, f"## On {devices} devices\n\n```bash\npython {' '.join(words)}\n```\n\n" + printed.replace(
        "## ", "### "
    )


def main() -> int:
    rows, texts = zip(*(plan(*item) for item in MESHES.items()), strict=True)
    record.save(
        "plan_gpt3_175b",
        "python -m benchmarks.plan_gpt3_175b",
        provenance(),
        list(rows),
        "\n" + "\n".join(texts),
    )
    print(record.table(list(rows)))
    return 1 if any(row["seconds"] > SECONDS for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
