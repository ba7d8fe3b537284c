"""`export`: writes a finished run's result in a format that others read."""

import argparse
from pathlib import Path

from experiments.commands import options
from experiments.commands.options import Commands


def add_to(commands: Commands) -> None:
    export = commands.add_parser("export", help="write a finished run's result in a format others read")
    export.add_argument("--workdir", required=True, help="of a finished run")
    export.add_argument(
        "--to",
        required=True,
        help=f"where nothing is yet: {options.TARGET}",
    )
    export.add_argument(
        "--format",
        required=True,
        choices=options.FORMATS,
        help=options.WRITES,
    )
    export.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> None:
    from experiments.convert import export

    print(export(Path(args.workdir), Path(args.to), args.format))
