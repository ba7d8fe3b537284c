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
    report.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> None:
    from experiments.reports.report import draw_together, table

    workdirs = [Path(workdir) for workdir in args.workdirs]
    print(table(workdirs))
    if args.figure:
        draw_together(workdirs, Path(args.figure))
