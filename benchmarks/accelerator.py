"""What a GPU or a TPU makes of the table of peers, of many adapters, and of the paper's E2E run: one script.

    python -m benchmarks.accelerator --base GPT2_MEDIUM --data DATA [--workdir runs/e2e_gpt2_medium]
    python -m benchmarks.accelerator --parts table [--rounds 9] [--models gpt2 ...] [--ways PEFT ...]
    python -m benchmarks.accelerator --layers 1 --rounds 2 --steps 5

The first part is the table of `benchmarks.peers` on JAX's device: the same rows, ways, weights and tokens. A
GPU is shared by all ways of a row, whose processes take memory as they need it; on a TPU one way comes after
the other. "Utilisation" is the matrix products' FLOPs of the step, over its time, over the device's peak
(`experiments/plan/accelerators.py`): those of lora_jax for all ways of LoRA, and those of full fine-tuning in
JAX for both ways of that. With `checkpoint` they have the repeated forward pass in them.

The second is `benchmarks.many_adapters`, whose bound is half of the time of separate steps here. Where it is
missed, the exit status is 1.

The third is `experiments/configs/e2e_gpt2_medium.json`: 26,290 steps of 8 examples, 5 epochs, then beam
search and the metrics. It is `python -m experiments run`, so that the same command goes on after an
interruption, and `--parts run` alone does not repeat the table. Its FLOPs are the mean of its first 1,000
steps, each of the widths that it has.

The last command is a look at all that needs no file, no accelerator and a few minutes: a row of models of
few layers, and a run of so many steps of a tiny GPT-2 on generated data. It is not recorded.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.peers import models
from benchmarks.peers.__main__ import measure
from benchmarks.peers.rows import MODELS, ROWS, WAYS


CONFIG = Path(__file__).resolve().parent.parent / "experiments" / "configs" / "e2e_gpt2_medium.json"
# What a directory of the hub's `openai-community/gpt2-medium` has, and the authors' E2E files.
BASE_FILES = ("config.json", "model.safetensors", "tokenizer.json")
PARTS = ["table", "adapters", "run"]
LOOKED_AT = 1000  # steps whose FLOPs are counted
PLACE = """
import json, jax
from experiments.reports.provenance import provenance
print(json.dumps([jax.default_backend(), jax.devices()[0].device_kind, provenance()]))
"""


def place() -> tuple[str, str, dict[str, Any]]:
    """JAX's platform, the kind of its device, and the provenance of results, by a process of its own: as long
    as one has a TPU, no other does.
    """
    found = subprocess.run([sys.executable, "-c", PLACE], capture_output=True, text=True, check=True)
    platform, kind, about = json.loads(found.stdout.splitlines()[-1])
    return platform, kind, about


def missing(base: Path | None, data: Path) -> list[str]:
    """What the run needs and does not find."""
    found = []
    if base is None:
        found.append(
            "--base DIR: the weights of GPT-2 medium, as `openai-community/gpt2-medium` on the hub has them"
        )
    elif not base.is_dir():
        found.append(f"--base: no directory `{base}`")
    else:
        found += [f"--base: no file `{base / name}`" for name in BASE_FILES if not (base / name).is_file()]
    files = json.loads(CONFIG.read_text("utf-8"))["data"]
    for split in ("train", "valid", "test"):
        if not (data / files[split]).is_file():
            found.append(f"--data DIR: no file `{data / files[split]}`, of the authors' E2E data")
    return found


def utilisation(lines: list[dict[str, Any]], peak: float | None) -> None:
    """Adds it to the lines of one row."""
    own = {line["way"]: line.get("GFLOP") for line in lines}
    for line in lines:
        gigaflop = own.get("full fine-tuning, JAX" if line["way"].startswith("full") else "lora_jax")
        if peak is not None and gigaflop is not None and line.get("s"):
            line["utilisation"] = round(1e9 * gigaflop / line["s"] / peak, 4)


def table(options: argparse.Namespace, platform: str, peak: float | None) -> list[dict[str, Any]]:
    rows = [row for row in ROWS if row.model in options.models]
    if options.only:
        rows = [row for row in rows if row.name in options.only]
    elif options.layers is not None:
        rows = rows[:1]
    ways = [way for way in WAYS if way == WAYS[0] or way in options.ways]
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        for name in {row.model: None for row in rows}:
            models.write(name, Path(directory) / name, options.layers)
        for row in rows:
            try:
                found = measure(row, options.rounds, Path(directory) / row.model, ways, platform)
            except RuntimeError as error:  # such as too little memory: the other rows are worth their time
                found = [{"row": row.name, "note": str(error)}]
            else:
                utilisation(found, peak)
            lines += found
            options.save("accelerator", lines)  # after every row: a run takes long
    return lines


def small(steps: int, layers: int, directory: Path) -> Path:
    """The config of the look, in the directory of its data: the same method, optimiser and search, on a tiny
    GPT-2 and generated examples.
    """
    from experiments.config import Generate
    from experiments.tasks import generate, tokenizer

    generate.write(Generate(seed=0, meanings=24, held_out=4, references=2), directory)
    tokenizer.train([(directory / "train.txt").read_text("utf-8")], 400, directory / "tokenizer")
    config = json.loads(CONFIG.read_text("utf-8"))
    config |= {
        "name": "e2e_small",
        "source": {"paper": None, "note": "a look at e2e_gpt2_medium"},
        "base": {
            "architecture": {"n_embd": 32, "n_layer": layers, "n_head": 2, "n_positions": 160},
            "tokenizer": "tokenizer",
        },
        "data": {
            "task": "e2e",
            "train": "train.txt",
            "valid": "valid.txt",
            "test": "test.txt",
            "seq_len": 144,
        },
    }
    config["train"] |= {"steps": steps, "warmup": 1, "log_every": 1, "eval_every": steps, "eval_batches": 1}
    config["decode"] |= {"max_tokens": 8, "beams": 2, "shown": 2, "end": ["\n"]}
    file = directory / "e2e_small.json"
    file.write_text(json.dumps(config, indent=2), "utf-8")
    return file


def run(file: Path, data: Path, workdir: Path, settings: list[str]) -> bool:
    """`python -m experiments run`, in a process of its own that may take all of the device's memory; whether
    it has come to its end.
    """
    command = [sys.executable, "-m", "experiments", "run", "--config", str(file), "--data", str(data)]
    command += ["--workdir", str(workdir), *(word for setting in settings for word in ("--set", setting))]
    print(shlex.join(command), file=sys.stderr, flush=True)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("XLA_PYTHON_CLIENT")
    }
    done = subprocess.run(command, env=environment).returncode == 0
    return done and (workdir / "report.json").is_file()  # a run that was told to stop has none yet


def of_run(file: Path, data: Path, workdir: Path, settings: list[str], peak: float | None) -> dict[str, Any]:
    """The line of a finished run."""
    from benchmarks import packing
    from experiments import config as configs, tasks
    from experiments.plan import models as planned
    from experiments.running.base import load_tokenizer
    from experiments.training import order

    config = configs.load(file, settings)
    report = json.loads((workdir / "report.json").read_text("utf-8"))
    tokenizer = load_tokenizer(workdir / "merged")
    found = tasks.prepare(config.data, tasks.read(config.data, data), tokenizer).train
    steps = [
        order.indices(config.seed, number, len(found), config.train.batch)
        for number in range(min(config.train.steps, LOOKED_AT))
    ]
    rows = packing.shares(found, steps, config.train.pack)
    subject = planned.named(str(workdir / "merged"), "float32", checkpoint=False)
    gigaflop = packing.traced(subject, config, rows) / 1e9
    numbers, scores = report["numbers"], report["scores"].get("after", {})
    seconds = numbers["median_seconds_per_step"]
    return {
        "run": config.name,
        "steps": numbers["steps"],
        "s a step": round(seconds, 5),
        "GFLOP a step": round(gigaflop, 3),
        "utilisation": None if peak is None else round(1e9 * gigaflop / seconds / peak, 4),
        "valid loss": numbers["valid_loss"],
        # The paper prints these of its scores in percent.
        **{
            name: value * (100 if name in ("BLEU", "METEOR", "ROUGE_L") else 1)
            for name, value in scores.items()
            if value is not None  # METEOR needs java
        },
        **{f"{name}, paper": value for name, value in config.source.expected.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--base", type=Path, help="a directory with GPT-2 medium's weights and tokenizer")
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("LORA_JAX_DATA") or ".", help="where e2e/ lies"
    )
    parser.add_argument("--workdir", type=Path, help="of the run, which goes on there")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each way (default: 9)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument(
        "--only", nargs="+", choices=[row.name for row in ROWS], metavar="ROW", help="rows by name"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="beside lora_jax")
    parser.add_argument(
        "--layers", type=int, help="fewer than the models have: a look, which is not recorded"
    )
    parser.add_argument(
        "--steps", type=int, help="of a tiny GPT-2 on generated data: a look, which is not recorded"
    )
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds is {options.rounds}: a spread needs 2 at least")
    looks = options.layers is not None or options.steps is not None
    if "run" in options.parts and options.steps is None:
        needed = missing(options.base, options.data)
        if needed:
            print("the run on GPT-2 medium needs", *needed, sep="\n  ", file=sys.stderr)
            print("or pass `--parts table adapters`, or `--steps 5` for a look.", file=sys.stderr)
            return 2

    # All ways of a row share a GPU, of which JAX would give three quarters to the first.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from experiments.plan import accelerators

    platform, kind, about = place()
    peak = accelerators.peak(kind, "float32")
    about |= {"peak TFLOP/s": None if peak is None else peak / 1e12}
    command = shlex.join(["python", "-m", "benchmarks.accelerator", *sys.argv[1:]])
    options.save = lambda name, rows: None if looks else record.save(name, command, about, rows)
    if platform == "cpu":
        print("no accelerator: JAX computes on the CPU here, which has no utilisation", file=sys.stderr)
    if "table" in options.parts:
        print(record.table(table(options, platform, peak)))
    missed = 0
    if "adapters" in options.parts:
        words = ["--rounds", str(options.rounds)]
        if options.layers is not None:
            words += ["--layers", str(options.layers), "--models", "gpt2", "--batches", "1x128"]
        missed = subprocess.run([sys.executable, "-m", "benchmarks.many_adapters", *words]).returncode
    if "run" in options.parts:
        with tempfile.TemporaryDirectory() as directory:
            if options.steps is None:
                file, data, settings = CONFIG, options.data, [f"base.path={options.base.resolve()}"]
                workdir = options.workdir or Path("runs") / "e2e_gpt2_medium"
            else:
                file, settings = small(options.steps, options.layers or 1, Path(directory)), []
                data, workdir = Path(directory), options.workdir or Path(directory) / "run"
            if not run(file, data, workdir, settings):
                return 1
            rows = [of_run(file, data, workdir, settings, peak)]
        options.save("accelerator_e2e", rows)
        print(record.table(rows))
    return missed


if __name__ == "__main__":
    raise SystemExit(main())
