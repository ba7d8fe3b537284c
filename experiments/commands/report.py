"""`report`: compares finished runs, or finished sweeps, in one table."""

import argparse
from pathlib import Path

from experiments.commands.options import Commands


def add_to(commands: Commands) -> None:
    report = commands.add_parser("report", help="compare finished runs, or finished sweeps, in one table")
    report.add_argument("workdirs", nargs="+", metavar="WORKDIR")
    report.add_argument(
        "--figure",
        metavar="FILE",
        help="draw their validation losses too, in a picture such as losses.png; of sweeps against the rate",
    )
    report.add_argument(
        "--values",
        metavar="FILE",
        help="draw the values that their texts name too, beside those of people and of the untouched base",
    )
    report.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> None:
    from experiments.reports import figures
    from experiments.reports.table import table
    from experiments.sweeps import compare

    workdirs = [Path(workdir) for workdir in args.workdirs]
    if compare.are_sweeps(workdirs):
        if args.values:
            raise ValueError(
                "`--values` is of runs: sweeps decode no texts. Finish their best adapters with `run`."
            )
        print(compare.table(workdirs))
        if args.figure:
            compare.draw(workdirs, Path(args.figure))
        return
    print(table(workdirs))
    if args.figure:
        figures.draw_together(workdirs, Path(args.figure))
    if args.values:
        figures.draw_values_together(workdirs, Path(args.values))
