"""The command line. Bad input is one line on standard error and a non-zero exit; with `--traceback`,
where it came from as well.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from experiments.commands import convert, export, plan, report, run, score


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse would print the usage first; the promise is one line.
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m experiments", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (run, export, convert, plan, report, score):
        command.add_to(commands)
    for added in commands.choices.values():
        added.add_argument("--traceback", action="store_true", help="on an error, show where it was raised")
    return parser


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
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0
