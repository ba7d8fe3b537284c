"""`report`: compares finished runs in one table."""

import argparse
from pathlib import Path

from experiments.commands.options import Commands


def add_to(commands: Commands) -> None:
    report = commands.add_parser("report", help="compare finished runs in one table")
    report.add_argument("workdirs", nargs="+", metavar="WORKDIR")
    report.add_argument(
        "--figure", metavar="FILE", help="draw their validation losses too, in a picture such as losses.png"
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

    workdirs = [Path(workdir) for workdir in args.workdirs]
    print(table(workdirs))
    if args.figure:
        figures.draw_together(workdirs, Path(args.figure))
    if args.values:
        figures.draw_values_together(workdirs, Path(args.values))
