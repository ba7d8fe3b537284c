"""`run`: trains, exports and reports what a config says, as one process or as one of several."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from experiments import catalogue, requirements
from experiments.commands.options import Commands


def add_to(commands: Commands) -> None:
    run = commands.add_parser(
        "run",
        help="train, merge, export and report what a config says, or go on with it",
        epilog="Compiled programs are kept for the next run in ~/.cache/lora_jax/jax, or in "
        "JAX_COMPILATION_CACHE_DIR; JAX_ENABLE_COMPILATION_CACHE=false keeps none.",
    )
    run.add_argument("config_file", nargs="?", metavar="CONFIG", help="the config, if not given as --config")
    run.add_argument("--config", help="a JSON file such as experiments/configs/demo.json")
    add_places(run, "runs/NAME")
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
    run.set_defaults(handler=handle)


def add_places(parser: argparse.ArgumentParser, default: str) -> None:
    """The options of what trains a config: where its inputs are, where results go, and other values of its
    keys. `default`: of `--workdir`.
    """
    parser.add_argument(
        "--data",
        help="where the config's paths start; default: $LORA_JAX_DATA, or the working directory",
    )
    parser.add_argument(
        "--bases",
        metavar="DIR",
        help=f"where `fetch` has put the bases that have a name; default: ${catalogue.VARIABLE}, or "
        f"{catalogue.DEFAULT} in the working directory",
    )
    parser.add_argument(
        "--workdir",
        help=f"where results go, and where an interrupted run is found again; default: {default}",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key, as in --set train.lr=1e-4; repeatable",
    )


def handle(args: argparse.Namespace) -> None:
    requirements.look_for(requirements.OF_EVERY_RUN, "a run")
    try:
        _run(args)
    except Exception as error:
        _end_as_one_of_several(error, args.traceback)
        raise


def _run(args: argparse.Namespace) -> None:
    if (args.config is None) == (args.config_file is None):
        raise ValueError("run takes one config: `run CONFIG.json` or `run --config CONFIG.json`.")
    _join(args)
    from experiments import config as configs

    path = Path(args.config or args.config_file)
    config = configs.load(path, args.set)
    requirements.look_for(further(config), "this run")
    from experiments.running import compiled
    from experiments.running.run import run

    compiled.keep()
    data = Path(args.data or os.environ.get("LORA_JAX_DATA") or ".")
    workdir = Path(args.workdir or Path("runs") / config.name)
    run(config, path, data, workdir, bases=catalogue.directory(args.bases))


def further(config: Any) -> list[str]:
    """The modules that this run needs and another may not: the readers of its base and its data, and the bar
    of a terminal.
    """
    section, base = config.data, config.base
    packed = [] if base.name is None else catalogue.entry(base.name, "base.name").files
    train = getattr(section, "train", ())
    files = [*((train,) if isinstance(train, str) else train), getattr(section, "valid", "")]
    found = {
        "gguf": any(file.endswith(".gguf") for file in (base.path or "", *packed)),
        "datasets": getattr(section, "dataset", None) is not None,
        "pyarrow": any(file.endswith(".zst") for file in files),
        "rich": sys.stdout.isatty(),
    }
    return [module for module, wanted in found.items() if wanted]


def _end_as_one_of_several(error: Exception, traceback: bool) -> None:
    """Ends this process where it is one of several and the error is another's. Otherwise this returns, and
    the command line prints the error.
    """
    from experiments.running import processes
    from lora_jax.processes import Elsewhere

    if isinstance(error, Elsewhere) and error.process == 0 and not traceback:
        raise SystemExit(1) from error  # process 0 prints the error
    # Input of the user's causes no other kind: there is a bug, or another process has ended.
    if not isinstance(error, ValueError | TypeError | OSError) and processes.several():
        processes.leave(error)


def _join(args: argparse.Namespace) -> None:
    """Finds the other processes, if there are any, before anything asks JAX for devices."""
    given = {name: getattr(args, name) for name in ("coordinator", "num_processes", "process_id")}
    missing = [name for name, value in given.items() if value is None]
    if args.distributed is False and len(missing) < 3:
        raise ValueError("`--no-distributed` goes without --coordinator, --num-processes and --process-id.")
    if 0 < len(missing) < 3:
        raise ValueError(
            "--coordinator, --num-processes and --process-id go together; missing: "
            f"--{missing[0].replace('_', '-')}."
        )
    from experiments.running import processes

    if args.distributed is None and missing and processes.untold():
        raise ValueError(
            "an mpirun of which JAX learns nothing has started several processes, which would all do the "
            "same: pass --coordinator HOST:PORT "
            "--num-processes N --process-id I to each, or --no-distributed for runs that have nothing to do "
            "with each other."
        )
    if args.distributed or not missing or (args.distributed is None and processes.detected()):
        processes.start(*given.values())
        import jax

        processes.say(
            f"{jax.process_count()} processes with {jax.device_count()} devices "
            f"({jax.devices()[0].device_kind})"
        )
