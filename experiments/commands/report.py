"""`report`: compares finished runs, or finished sweeps, in one table and in pictures."""

import argparse
from pathlib import Path

from experiments.commands.options import Commands


# The options that draw runs, and what each draws.
_DRAWINGS = {
    "values": "the values that their texts name, beside those of people and of the untouched base",
    "parameters": "their metric against the number of trained parameters, a point for each run",
    "epochs": "the metric of each evaluation against the epochs",
    "costs": "examples a second and peak memory",
}


def add_to(commands: Commands) -> None:
    report = commands.add_parser("report", help="compare finished runs, or finished sweeps, in one table")
    report.add_argument("workdirs", nargs="+", metavar="WORKDIR")
    report.add_argument(
        "--study",
        action="store_true",
        help="a row for each method and a column for each task, with means over seeds, instead of a row for "
        "each run",
    )
    report.add_argument(
        "--metric",
        metavar="NAME",
        help="of --study, --parameters and --epochs; default: the one that is published, or a task's first",
    )
    report.add_argument(
        "--figure",
        metavar="FILE",
        help="draw their validation losses too, in a picture such as losses.png; of sweeps against the rate",
    )
    for name, words in _DRAWINGS.items():
        report.add_argument(f"--{name}", metavar="FILE", help=f"draw {words}")
    report.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> None:
    from experiments.reports import curves, figures, study
    from experiments.reports.table import table
    from experiments.sweeps import compare

    workdirs = [Path(workdir) for workdir in args.workdirs]
    if compare.are_sweeps(workdirs):
        _check_of_sweeps(args)
        print(compare.table(workdirs))
        if args.figure:
            compare.draw(workdirs, Path(args.figure))
        return
    print(study.table(workdirs, args.metric) if args.study else table(workdirs))
    if args.figure:
        figures.draw_together(workdirs, Path(args.figure))
    if args.values:
        figures.draw_values_together(workdirs, Path(args.values))
    if args.parameters:
        curves.draw_parameters(workdirs, Path(args.parameters), args.metric)
    if args.epochs:
        curves.draw_epochs(workdirs, Path(args.epochs), args.metric)
    if args.costs:
        curves.draw_costs(workdirs, Path(args.costs))


def _check_of_sweeps(args: argparse.Namespace) -> None:
    """Raises `ValueError` for an option that is of runs."""
    given = [name for name in (*_DRAWINGS, "study", "metric") if getattr(args, name)]
    if given:
        raise ValueError(
            f"`--{given[0]}` is of runs: sweeps decode no texts and have no scores. Finish their best "
            "adapters with `run`."
        )
