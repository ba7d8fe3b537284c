"""`sweep`: trains an adapter for each combination of values, all of them in one program."""

import argparse
import os
from pathlib import Path

from experiments import catalogue, requirements
from experiments.commands import run
from experiments.commands.options import Commands


def add_to(commands: Commands) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="train an adapter for each combination of values, all at once on one frozen base",
        epilog="example: python -m experiments sweep experiments/configs/demo.json --over "
        "train.lr=1e-3,2e-3,4e-3 --over method.rank=4,16 --over seed=0,1,2",
    )
    sweep.add_argument(
        "config_file", metavar="CONFIG", help="a JSON file such as experiments/configs/demo.json"
    )
    sweep.add_argument(
        "--over",
        action="append",
        required=True,
        metavar="KEY=VALUE,VALUE",
        help="the values of train.lr, optimizer.weight_decay, method.rank, method.alpha, seed, or a key of "
        "data; repeatable, and every combination is trained",
    )
    sweep.add_argument(
        "--halving",
        default="",
        metavar="FRACTION,FRACTION",
        help="after these fractions of the steps drop the worse half of the combinations, as in 0.25,0.5",
    )
    run.add_places(sweep, "runs/NAME_sweep")
    sweep.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> None:
    requirements.look_for(requirements.OF_EVERY_RUN, "a sweep")
    from experiments import config as configs
    from experiments.sweeps.over import parse

    over, fractions = parse(args.over), _fractions(args.halving)
    path = Path(args.config_file)
    config = configs.load(path, args.set)
    requirements.look_for(run.further(config), "this sweep")
    from experiments.running import compiled, processes
    from experiments.sweeps.sweep import Asked, sweep

    if processes.detected() or processes.untold():
        raise ValueError("a sweep runs in one process, and several were started: start the command once.")
    compiled.keep()
    data = Path(args.data or os.environ.get("LORA_JAX_DATA") or ".")
    workdir = Path(args.workdir or Path("runs") / f"{config.name}_sweep")
    given = {"--data": args.data, "--bases": args.bases}
    places = tuple(word for name, where in given.items() if where for word in (name, where))
    asked = Asked(path, tuple(args.set), over, fractions, places)
    sweep(asked, data, workdir, bases=catalogue.directory(args.bases))


def _fractions(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(",") if text)
    except ValueError as error:
        raise ValueError(
            f"`--halving` takes fractions of the steps, such as 0.25,0.5; got {text!r}."
        ) from error
