"""Runs that are killed, told to stop, starved of disk, and whose checkpoints are damaged: do they end bit for
bit?

    python -m benchmarks.preemption --faults 50 12

On what: LoRA with dropout on a small GPT-2, through the command line, in processes of its own, one and then
two that run as one. A fault is drawn, happens at a random moment, and the same command is started again; a
run that comes to its end is compared with one that nothing happened to, and the next begins. A full disk is a
limit on the size of files (RLIMIT_FSIZE). Bounds (exit status 1 if one is missed): every run ends, with the
same bytes in its metrics, its adapter and its merged model. 20 minutes on two cores.
"""

import argparse
import collections
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.reports.provenance import provenance

from . import record
from .ports import free_port


CONFIG = {
    "name": "preempted",
    "source": {"paper": None, "note": "a benchmark of what a run survives"},
    "generate": {"seed": 0, "meanings": 60, "held_out": 10, "references": 2},
    "base": {"architecture": {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64}, "vocabulary": 400},
    "data": {"task": "text", "train": "train.txt", "valid": "valid.txt", "seq_len": 64},
    "method": {"name": "LoRA", "rank": 4, "alpha": 8, "dropout": 0.1},
    "targets": ["attn/c_attn/kernel", "mlp/c_fc/kernel"],
    "train": {
        "steps": 1000,
        "batch": 8,
        "lr": 0.005,
        "log_every": 1,
        "eval_every": 100,
        "eval_batches": 1,
        "checkpoint_every": 10,
        "keep_checkpoints": 3,
    },
}
# Each with how often it is drawn.
KINDS = {
    "SIGKILL at any moment": 2,
    "SIGKILL while it trains": 2,
    "SIGKILL while a checkpoint is written": 3,
    "SIGTERM while it trains": 2,
    "newest checkpoint cut short": 2,
    "a bit of the newest checkpoint flipped": 2,
    "disk full": 2,
}
COMPARED = ("merged/model.safetensors", "adapter/adapter_model.safetensors")
# Seconds after which a process that should have ended has not. One waits 300 for another that was killed
# before they had found each other.
TIMEOUT = 400


class Run:
    """The command line of one run, in `count` processes, and its work directory."""

    def __init__(self, config: Path, workdir: Path, count: int):
        self.config, self.workdir, self.count = config, workdir, count

    def start(self, limit: int | None = None) -> list[subprocess.Popen]:
        """`limit`: bytes beyond which no file grows, as on a disk that is full."""
        words = [sys.executable, "-m", "experiments", "run", str(self.config), "--workdir", str(self.workdir)]
        told: list[list[str]] = [[]]
        if self.count > 1:
            address = [
                "--coordinator",
                f"localhost:{free_port()}",
                "--num-processes",
                str(self.count),
                "--process-id",
            ]
            told = [[*address, str(index)] for index in range(self.count)]
            words += ["--set", f"mesh.data={self.count}"]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        # Each start would compile the same programs.
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(self.config.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        restrict = (
            None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        )
        options = {
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.PIPE,
            "text": True,
            "env": environment,
            "preexec_fn": restrict,
        }
        return [subprocess.Popen([*words, *more], **options) for more in told]

    def finished(self) -> bool:
        return (self.workdir / "report.md").is_file()

    def step(self) -> int:
        """Of the last line of metrics."""
        file = self.workdir / "metrics.jsonl"
        if not file.is_file():
            return 0
        lines = file.read_bytes().splitlines()
        try:
            return json.loads(lines[-1])["step"] if lines else 0
        except json.JSONDecodeError:
            return json.loads(lines[-2])["step"] if len(lines) > 1 else 0

    def told(self) -> tuple[int, int]:
        """Which file of metrics it is, since each start makes its own, and how long it is."""
        try:
            found = (self.workdir / "metrics.jsonl").stat()
        except FileNotFoundError:
            return 0, 0
        return found.st_ino, found.st_size

    def checkpoints(self) -> list[int]:
        directory = self.workdir / "checkpoints"
        return (
            sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdecimal())
            if directory.is_dir()
            else []
        )

    def being_written(self) -> bool:
        directory = self.workdir / "checkpoints"
        return directory.is_dir() and any("tmp" in entry.name for entry in directory.iterdir())


def wait(processes: list[subprocess.Popen]) -> list[int]:
    """The exit status of each. Of those that have not ended after `TIMEOUT`, all are killed, and what
    they wrote is in the error.
    """
    end = time.monotonic() + TIMEOUT
    try:
        for process in processes:
            process.communicate(timeout=max(end - time.monotonic(), 1))
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
        said = [f"{process.returncode}: {process.communicate()[1][-2000:]}" for process in processes]
        raise AssertionError(f"a process has not ended after {TIMEOUT} s:\n" + "\n".join(said)) from None
    return [process.returncode for process in processes]


def until(condition: Callable[[], bool], processes: list[subprocess.Popen]) -> None:
    """Waits for it, or for the end of a process."""
    end = time.monotonic() + TIMEOUT
    while not condition() and all(process.poll() is None for process in processes) and time.monotonic() < end:
        time.sleep(0.002)


def strike(run: Run, kind: str, chance: random.Random) -> dict[str, Any]:
    """One fault, from a fresh start of the command to the end of its processes."""
    before, began = run.step(), time.monotonic()
    processes = run.start(limit=int(2 ** chance.uniform(8, 15)) if kind == "disk full" else None)
    victim = chance.choice(processes)
    if kind == "SIGKILL at any moment":
        time.sleep(chance.uniform(0, 20))
        victim.kill()
    elif kind != "disk full":
        old = run.told()[0]
        until(lambda: run.told()[0] != old, processes)
        begun = run.told()[1]
        until(lambda: run.told()[1] > begun, processes)
        if kind == "SIGKILL while a checkpoint is written":
            until(run.being_written, processes)
            time.sleep(chance.uniform(0, 0.05))
        else:
            time.sleep(chance.uniform(0, 2))
        victim.send_signal(signal.SIGTERM if kind.startswith("SIGTERM") else signal.SIGKILL)
    codes = wait(processes)
    found = {
        "kind": kind,
        "processes": run.count,
        "exit": codes,
        "after step": run.step(),
        "since": run.step() - before,
        "seconds": round(time.monotonic() - began),
    }
    newest = run.checkpoints()[-1:]
    if newest and "newest checkpoint" in kind:
        found["damaged"] = damage(
            run.workdir / "checkpoints" / str(newest[0]), chance, cut=kind.endswith("short")
        )
    return found


def damage(directory: Path, chance: random.Random, *, cut: bool) -> str:
    """Cuts a file short, or flips one of its bits; the larger it is, the likelier."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size)
    file = chance.choices(files, [path.stat().st_size for path in files])[0]
    content = bytearray(file.read_bytes())
    place = chance.randrange(len(content))
    if cut:
        content = content[:place]
    else:
        content[place] ^= 1 << chance.randrange(8)
    file.write_bytes(content)
    return f"{file.relative_to(directory)} at {place}"


def same(run: Run, reference: Run) -> list[str]:
    """The names of what differs from the run that nothing happened to."""
    differing = [
        name
        for name in COMPARED
        if (run.workdir / name).read_bytes() != (reference.workdir / name).read_bytes()
    ]
    return differing + (["metrics.jsonl"] if _numbers(run) != _numbers(reference) else [])


def _numbers(run: Run) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds_per_step"} for line in lines]


def campaign(
    root: Path, config: Path, count: int, faults: int, chance: random.Random, tell: Callable[[str], None]
) -> tuple[list[dict], list[dict]]:
    """The faults, and the runs that came to an end."""
    reference = Run(config, root / f"reference_{count}", count)
    assert wait(reference.start()) == [0] * count, "the run that nothing happens to does not end"
    drawn = list(KINDS) + chance.choices(list(KINDS), list(KINDS.values()), k=max(faults - len(KINDS), 0))
    chance.shuffle(drawn)
    happened: list[dict] = []
    ended: list[dict] = []
    while drawn:
        run, first = Run(config, root / f"struck_{count}_{len(ended)}", count), len(happened)
        while drawn and not run.finished():
            tell(f"{count} process(es), fault {len(happened) + 1}: {drawn[-1]}")
            happened.append(strike(run, drawn.pop(), chance))
            tell(f"    {happened[-1]}")
        for _ in range(
            3
        ):  # a process that is already going when the disk is full again has an end of its own
            if not run.finished():
                wait(run.start())
        differing = same(run, reference) if run.finished() else ["it has not ended"]
        aside = len([path for path in (run.workdir / "checkpoints").iterdir() if ".damaged" in path.name])
        ended.append(
            {
                "processes": count,
                "run": len(ended) + 1,
                "faults": len(happened) - first,
                "put aside": aside,
                "differs in": ", ".join(differing) or "nothing",
            }
        )
        tell(str(ended[-1]))
        shutil.rmtree(run.workdir)
    return happened, ended


def table_of(happened: list[dict]) -> list[dict]:
    """How often each kind struck, and what the processes said at their end."""
    rows = []
    for count in sorted({fault["processes"] for fault in happened}):
        for kind in KINDS:
            struck = [fault for fault in happened if (fault["processes"], fault["kind"]) == (count, kind)]
            if struck:
                codes = collections.Counter(code for fault in struck for code in fault["exit"])
                exits = ", ".join(f"{code} ({number}x)" for code, number in sorted(codes.items()))
                rows.append(
                    {
                        "processes": count,
                        "fault": kind,
                        "times": len(struck),
                        "exit status": exits,
                        "damaged files": sum("damaged" in fault for fault in struck) or None,
                    }
                )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--faults",
        type=int,
        nargs=2,
        default=(50, 12),
        metavar=("ONE", "TWO"),
        help="of a run of one process, and of one of two; default: 50 12",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of what is drawn; when it happens depends on the machine as well"
    )
    args = parser.parse_args()
    started, chance = time.monotonic(), random.Random(args.seed)
    tell = lambda text: print(text, flush=True)
    happened, ended = [], []
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "config.json"
        config.write_text(json.dumps(CONFIG))
        for count, faults in enumerate(args.faults, start=1):
            if faults == 0:
                continue
            struck, runs = campaign(Path(directory), config, count, faults, chance, tell)
            happened, ended = happened + struck, ended + runs
    rows = table_of(happened)
    about = {
        **provenance(),
        "faults": len(happened),
        "runs that ended": len(ended),
        "minutes": round((time.monotonic() - started) / 60),
    }
    notes = (
        "\nRuns, beside one that nothing happened to, bytes of metrics, adapter and merged "
        f"model:\n\n{record.table(ended)}\n"
    )
    record.save(
        "preemption",
        f"python -m benchmarks.preemption --faults {args.faults[0]} {args.faults[1]} --seed {args.seed}",
        about,
        rows,
        notes,
    )
    print(record.table(rows) + "\n\n" + record.table(ended))
    return 1 if any(run["differs in"] != "nothing" for run in ended) else 0


if __name__ == "__main__":
    sys.exit(main())
