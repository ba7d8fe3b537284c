"""The command line. Bad input is one line on standard error and a non-zero exit; with `--traceback`,
where it came from as well.
"""

import argparse
import dataclasses
import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn


REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_DATA = REPOSITORY.parent / "shared" / "data"
# The tasks whose metrics `score` computes.
SCORED = ("e2e",)
FORMATS = ("hf", "peft", "loralib")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse would print the usage first; the promise is one line.
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m experiments", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run", help="train, merge, export and report what a config says, or go on with it"
    )
    run.add_argument("config_file", nargs="?", metavar="CONFIG", help="the config, if not given as --config")
    run.add_argument("--config", help="a JSON file such as experiments/configs/demo.json")
    run.add_argument(
        "--data",
        help="where the config's paths start; default: $LORA_JAX_DATA, or ../shared/data beside the checkout",
    )
    run.add_argument(
        "--workdir", help="where results go, and where an interrupted run is found again; default: runs/NAME"
    )
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key, as in --set train.lr=1e-4; repeatable",
    )
    several = run.add_argument_group(
        "several processes", "the same command on every host, with one work directory that all of them see"
    )
    several.add_argument(
        "--distributed",
        action=argparse.BooleanOptionalAction,
        help="run as one of several processes; default: if srun or mpirun started more than one",
    )
    several.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="of the first process, where no cluster tells it (SLURM, Open MPI, TPU, Kubernetes do)",
    )
    several.add_argument(
        "--num-processes", type=int, metavar="N", help="with --coordinator: how many there are"
    )
    several.add_argument(
        "--process-id", type=int, metavar="I", help="with --coordinator: which of them this is, from 0"
    )
    run.set_defaults(handler=_run)

    export = commands.add_parser("export", help="write a finished run's result in a format others read")
    export.add_argument("--workdir", required=True, help="of a finished run")
    export.add_argument(
        "--to",
        required=True,
        help="a directory that does not exist or is empty; for loralib, a file .pt or .bin",
    )
    export.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="hf: the merged model, with its tokenizer, for from_pretrained; peft, loralib: the adapter",
    )
    export.set_defaults(handler=_export)

    convert = commands.add_parser(
        "convert",
        help="bring an adapter or a model from one format into another",
        epilog=(
            "example: python -m experiments convert demo_run/adapter adapter.pt --to loralib --base "
            "experiments/bases/small"
        ),
    )
    convert.add_argument(
        "source",
        metavar="SRC",
        help="an adapter directory of PEFT's, a file of loralib's (.pt, .bin), or a Hugging Face model",
    )
    convert.add_argument(
        "target", metavar="DST", help="where the result goes: a directory, or for loralib a file .pt or .bin"
    )
    convert.add_argument(
        "--to",
        required=True,
        choices=FORMATS,
        help="hf: the model with the adapter merged; peft, loralib: the adapter",
    )
    convert.add_argument(
        "--base",
        metavar="DIR",
        help="the model that the adapter was trained on; default: the directory that PEFT's config names",
    )
    convert.add_argument(
        "--alpha",
        type=_alpha,
        metavar="A",
        help="of a file of loralib's, which does not hold it: the lora_alpha it was trained with",
    )
    convert.add_argument(
        "--blocks",
        type=_blocks,
        metavar="1,0,1",
        help="of a file of loralib's: its enable_lora, if not query and value (1,0,1) or all",
    )
    convert.add_argument("--overwrite", action="store_true", help="replace an earlier result at DST")
    convert.add_argument(
        "--no-verify", action="store_true", help="pass over checksums and values that are no numbers"
    )
    convert.add_argument(
        "--any-base",
        action="store_true",
        help="accept another base than the one the adapter was saved beside",
    )
    convert.set_defaults(handler=_convert)

    _add_plan(commands)

    report = commands.add_parser("report", help="compare finished runs in one table")
    report.add_argument("workdirs", nargs="+", metavar="WORKDIR")
    report.add_argument(
        "--figure", metavar="FILE", help="draw their validation losses too, in a picture such as losses.png"
    )
    report.set_defaults(handler=_report)

    score = commands.add_parser(
        "score", help="compute a task's published metrics of generated texts, as JSON"
    )
    score.add_argument("task", metavar="TASK", help=f"one of: {', '.join(SCORED)}")
    score.add_argument(
        "--refs", required=True, metavar="FILE", help="references one a line, a blank line between inputs"
    )
    score.add_argument(
        "--hyps", required=True, metavar="FILE", help="one generated text a line, in the order of the inputs"
    )
    score.set_defaults(handler=_score)

    for command in commands.choices.values():
        command.add_argument("--traceback", action="store_true", help="on an error, show where it was raised")
    return parser


def _add_plan(commands: argparse._SubParsersAction) -> None:
    plan = commands.add_parser(
        "plan",
        help="say what a sharded training step needs, by compiling it from shapes alone on virtual devices",
        epilog="example: python -m experiments plan gpt3-175b --mesh fsdp=64 --rank 4 --accelerator a100-80g",
    )
    plan.add_argument(
        "model",
        metavar="MODEL",
        help=(
            "a published name (gpt3-175b, roberta-large, deberta-v2-xxlarge, ...), or a directory with "
            "config.json"
        ),
    )
    plan.add_argument(
        "--mesh",
        default="data=1",
        help="devices along each axis: data=8,fsdp=8,tensor=2; default: one device",
    )
    plan.add_argument(
        "--method",
        default="LoRA",
        help="LoRA (the default), DoRA, VeRA, ..., or Full, which trains everything",
    )
    plan.add_argument("--rank", type=int, help="of the adapters; default: the method's")
    plan.add_argument(
        "--alpha",
        type=_alpha,
        metavar="A",
        help="the numerator of their scale, which costs nothing; default: the method's",
    )
    plan.add_argument(
        "--targets", nargs="+", metavar="PATTERN", help="which weights are adapted; default: query and value"
    )
    plan.add_argument(
        "--blocks",
        type=_blocks,
        metavar="1,0,1",
        help="which parts of a fused weight; default: query and value of GPT-2's c_attn",
    )
    plan.add_argument(
        "--batch", type=int, default=64, help="examples a step, on all devices together; default: 64"
    )
    plan.add_argument(
        "--seq", type=int, help="tokens an example; default: as many as the model has positions"
    )
    plan.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float16", "float32"),
        help="of weights and computation; adapters are float32",
    )
    plan.add_argument("--optimizer", default="adamw", choices=("adamw", "adamw_authors"))
    plan.add_argument(
        "--accumulate",
        type=int,
        default=1,
        metavar="N",
        help="parts of a batch, one after the other; default: 1",
    )
    plan.add_argument(
        "--remat",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute each layer again in the backward pass",
    )
    plan.add_argument("--quantize", choices=("nf4", "int8"), help="store the base so")
    plan.add_argument(
        "--accelerator",
        metavar="NAME",
        help="whether it fits this one (a100-80g, h100, tpu-v5e, ...); default: all that are known",
    )
    plan.add_argument("--compare-full", action="store_true", help="compile full fine-tuning's step too")
    plan.add_argument("--json", metavar="FILE", help="write the numbers there")
    plan.set_defaults(handler=_plan)


def _alpha(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    # As configs spell it: 32, not 32.0.
    return int(value) if value.is_integer() else value


def _blocks(text: str) -> tuple[bool, ...]:
    words = text.split(",")
    if not set(words) <= {"0", "1"}:
        raise argparse.ArgumentTypeError(f"{text!r} is not a 0 or 1 for each block, such as 1,0,1")
    return tuple(word == "1" for word in words)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    args = _parser().parse_args(arguments)
    # Checkpointing and tokenizers talk to this logger and this variable; what a user needs to know is an
    # exception here.
    logging.getLogger("absl").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        args.handler(args)
    except (ValueError, TypeError, OSError) as error:
        if args.traceback:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except Exception as error:
        return _of_several(error)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _of_several(error: Exception) -> int:
    """The exit status for an error that is none of the user's input: of one process a bug, and among
    several perhaps the end of another.
    """
    from experiments.running import processes

    if isinstance(error, processes.StoppedElsewhere):
        return 1  # the first process says why
    if processes.several():
        processes.leave(error)
    raise error


def _run(args: argparse.Namespace) -> None:
    if (args.config is None) == (args.config_file is None):
        raise ValueError("run takes one config: `run CONFIG.json` or `run --config CONFIG.json`")
    _join(args)
    from experiments import config as configs

    path = Path(args.config or args.config_file)
    config = configs.load(path, args.set)
    from experiments.running.run import run

    data = Path(args.data or os.environ.get("LORA_JAX_DATA") or DEFAULT_DATA)
    run(config, path, data, Path(args.workdir or Path("runs") / config.name))


def _join(args: argparse.Namespace) -> None:
    """Finds the other processes, if there are any, before anything asks JAX for devices."""
    given = {name: getattr(args, name) for name in ("coordinator", "num_processes", "process_id")}
    missing = [name for name, value in given.items() if value is None]
    if args.distributed is False and len(missing) < 3:
        raise ValueError("`--no-distributed` goes without --coordinator, --num-processes and --process-id")
    if 0 < len(missing) < 3:
        raise ValueError(
            "--coordinator, --num-processes and --process-id go together; missing: "
            f"--{missing[0].replace('_', '-')}"
        )
    from experiments.running import processes

    if args.distributed is None and missing and processes.untold():
        raise ValueError(
            "an mpirun of which JAX learns nothing has started several processes, which would all do the "
            "same: pass --coordinator HOST:PORT "
            "--num-processes N --process-id I to each, or --no-distributed for runs that have nothing to do "
            "with each other"
        )
    if args.distributed or not missing or (args.distributed is None and processes.detected()):
        processes.start(*given.values())
        import jax

        processes.say(
            f"{jax.process_count()} processes with {jax.device_count()} devices "
            f"({jax.devices()[0].device_kind})"
        )


def _export(args: argparse.Namespace) -> None:
    from experiments.convert import export

    print(export(Path(args.workdir), Path(args.to), args.format))


def _convert(args: argparse.Namespace) -> None:
    from experiments.convert import convert, Job

    base = None if args.base is None else Path(args.base)
    options = {"overwrite": args.overwrite, "verify": not args.no_verify, "any_base": args.any_base}
    print(
        "\n".join(
            convert(
                Job(Path(args.source), Path(args.target), args.to, base, args.alpha, args.blocks, **options)
            )
        )
    )


def _plan(args: argparse.Namespace) -> None:
    from experiments.plan import devices

    mesh = devices.mesh_of(args.mesh)
    if args.json and not Path(args.json).resolve().parent.is_dir():
        raise ValueError(f"`--json` is `{args.json}`, and there is no directory `{Path(args.json).parent}`")
    devices.start(mesh.data * mesh.fsdp * mesh.tensor)
    from experiments.plan.figures import plan, Request
    from experiments.plan.report import show

    asked = {field.name: getattr(args, field.name) for field in dataclasses.fields(Request)}
    request = Request(
        **{**asked, "mesh": mesh, "targets": None if args.targets is None else tuple(args.targets)}
    )
    found = plan(request, lambda text: print(text, file=sys.stderr, flush=True))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    show(found)


def _report(args: argparse.Namespace) -> None:
    from experiments.reports.report import draw_together, table

    workdirs = [Path(workdir) for workdir in args.workdirs]
    print(table(workdirs))
    if args.figure:
        draw_together(workdirs, Path(args.figure))


def _score(args: argparse.Namespace) -> None:
    if args.task not in SCORED:
        from experiments.strict_json import nearest

        raise ValueError(
            f"`TASK` must be one of {', '.join(SCORED)}, got `{args.task}`{nearest(args.task, SCORED)}"
        )
    from experiments.metrics import files, score_e2e

    scores = score_e2e(*files.read(Path(args.refs), Path(args.hyps)))
    print(json.dumps(scores, indent=2))
