"""Training steps of this library and of its peers, timed in turn.

    python -m benchmarks.peers [--rounds 9] [--models gpt2 ...] [--only "gpt2, 8 x 64, all-linear, LoRA" ...]

Each way of a row is a process with the same weights, tokens, rank and AdamW, and may use all cores. Once
those in JAX are ready, and then ours again with those in PyTorch, every round asks each for one step, one
after the other, in an order that turns. A ratio is the median of the rounds' own: the seconds of a way over
those of lora_jax in the same round. "Spread" is half the distance of its quartiles. The first losses of all
ways must agree to 1e-3, which shows that they compute the same (of a quantised base, those that have it). A
way that has no such row says why. Peak memory is that of the whole process, its weights and its compiler
included. A run measures the rows that it is asked for. The result keeps the others as they were, each with
its commit, date and rounds.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import in_turn, record
from experiments.reports.provenance import provenance

from . import figure, models
from .rows import is_torch, MODELS, Row, ROWS, WAYS


FILE = record.RESULTS / f"peers-jax-{jax.__version__}.json"


def measure(
    row: Row, rounds: int, directory: Path, ways: Sequence[str] = WAYS, platform: str = "cpu"
) -> list[dict[str, Any]]:
    """The lines of the table of one row, one for each way. `platform`: where JAX computes."""
    found: dict[str, Any] = {}
    for group in _groups(ways, platform):
        for way, said in _timed(row, rounds, directory, group, platform).items():
            found.setdefault(way, said)
    check_losses(row, found, 1e-3 if platform == "cpu" else 1e-2)  # of products in TF32 or bfloat16
    return [_line(row, way, found[way], found[WAYS[0]]) for way in ways]


def _groups(ways: Sequence[str], platform: str) -> list[list[str]]:
    """The ways that are in memory together: each in JAX, and then ours again beside each in PyTorch. All at
    once would leave no memory for the files that PyTorch maps. A TPU serves one process at a time: there each
    way takes all of its steps before the next.
    """
    if platform == "tpu":
        return [[way] for way in ways]
    others = [way for way in ways if is_torch(way)]
    return [[way for way in ways if way not in others], *([[WAYS[0], *others]] if others else [])]


def _timed(row: Row, rounds: int, directory: Path, ways: Sequence[str], platform: str) -> dict[str, Any]:
    """What the workers say, the seconds of their steps in turn, and those of the first way in the same
    rounds.
    """
    workers: dict[str, Any] = {}
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as started:
        for way in ways:
            worker = started.enter_context(_started(way, row, directory, platform))
            found[way] = _said(worker, row, way)
            print(f"{row.name}: {way}: {found[way]}", file=sys.stderr, flush=True)
            if "cannot" not in found[way]:
                workers[way] = worker
        step = lambda way: lambda: _step(workers[way], row, way)
        seconds = in_turn.taken({way: step(way) for way in workers}, rounds)
        for way, worker in workers.items():
            worker.stdin.close()
            found[way] |= {"peak MB": _said(worker, row, way) / 1e6, "seconds": seconds[way]}
            found[way]["beside"] = seconds.get(WAYS[0])
    return found


def _step(worker: Any, row: Row, way: str) -> float:
    worker.stdin.write("\n")
    worker.stdin.flush()
    return float(_said(worker, row, way))


def _said(worker: Any, row: Row, way: str) -> Any:
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"{way} of {row.name!r} has ended; its error is above")
    return json.loads(line)


def _started(way: str, row: Row, directory: Path, platform: str) -> Any:
    command = [sys.executable, "-m", "benchmarks.peers.worker", way, json.dumps(dataclasses.asdict(row))]
    return subprocess.Popen(
        [*command, str(directory), platform], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def check_losses(row: Row, found: dict[str, Any], tolerance: float) -> None:
    """Raises `RuntimeError` where the first losses differ. Full fine-tuning has no quantised base: beside
    QLoRA its ways are compared with each other.
    """
    losses = {way: said["first loss"] for way, said in found.items() if "cannot" not in said}
    whole = {way for way in losses if way.startswith("full") and row.method == "QLoRA"}
    for ways in (whole, losses.keys() - whole):
        own = [losses[way] for way in ways]
        if own and max(own) - min(own) > tolerance:
            raise RuntimeError(
                f"the first losses of {row.name!r} differ, so that not the same is timed: {losses}"
            )


def _line(row: Row, way: str, found: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    line: dict[str, Any] = {"row": row.name, "way": way}
    if "cannot" in found:
        return line | {"note": found["cannot"]}
    over = in_turn.ratio(found["seconds"], found["beside"] or ours["seconds"])
    median = statistics.median(found["seconds"])
    line |= {"s": round(median, 5), "over lora_jax": round(over.median, 3), "spread": round(over.spread, 3)}
    line |= {"tokens/s": round(row.batch * row.tokens / median)}
    digits = {"GFLOP": 1, "temporary MB": 0, "peak MB": 0, "compile s": 1, "optimizer MB": 1}
    return line | {
        name: None if found.get(name) is None else round(found[name], count) for name, count in digits.items()
    }


def earlier() -> dict[str, Any]:
    """The result of earlier runs, if there is one."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def in_order(kept: list[dict], found: list[dict], measured: dict[str, Any]) -> list[dict]:
    """All lines in the order of `ROWS`, those that were found with how they were measured."""
    names = [row.name for row in ROWS]
    lines = [*kept, *({**line, **measured} for line in found)]
    return sorted((line for line in lines if line["row"] in names), key=lambda line: names.index(line["row"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="steps of each way (default: 9)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows by name")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds is {options.rounds}: a spread needs 2 at least")
    rows = [row for row in ROWS if row.model in options.models]
    if options.only:
        unknown = set(options.only) - {row.name for row in rows}
        if unknown:
            parser.error(f"--only: no row is named {sorted(unknown)}; rows are {[row.name for row in rows]}")
        rows = [row for row in rows if row.name in options.only]
    kept, about = earlier(), provenance()
    if kept and kept["device"] != about["device"]:
        parser.error(f"the result is of {kept['device']}, not of {about['device']}: move {FILE} away")
    lines = kept.get("rows", [])
    measured = {"rounds": options.rounds, "commit": about.pop("commit"), "date": about.pop("date")}
    with tempfile.TemporaryDirectory() as directory:
        for name in options.models:
            models.write(name, Path(directory) / name)
        for row in rows:
            found = measure(row, options.rounds, Path(directory) / row.model)
            lines = in_order([line for line in lines if line["row"] != row.name], found, measured)
            # After every row, since a run takes long.
            record.save(
                "peers", "python -m benchmarks.peers [--rounds ROUNDS] [--only ROW ...]", about, lines
            )
            figure.draw(lines, FILE.with_suffix(".png"))
    print(record.table([line for line in lines if line["row"] in {row.name for row in rows}]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
