"""The command line. Bad input is one line on standard error and a non-zero exit; with `--traceback`,
where it came from as well.
"""

import argparse
import errno
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from experiments import requirements
from experiments.commands import convert, export, fetch, plan, report, run, score, subspaces, sweep


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse would print the usage first; the promise is one line.
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m experiments", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (run, sweep, fetch, export, convert, plan, report, subspaces, score):
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
    # Its advice is that PyTorch was not found, which only its models need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        args.handler(args)
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        if args.traceback or _is_ours(error):
            raise
        print(f"error: {' '.join(_said(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _is_ours(error: Exception) -> bool:
    """Whether a module of this project is missing, which is a bug and no matter of `pip`."""
    name = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
    return name.startswith("experiments") or (name.startswith("lora_jax") and name != "lora_jax")


def _said(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return requirements.described(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        # Python writes `[Errno 30] Read-only file system: '/x'`.
        fix = ": choose another place" if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) else ""
        return f"`{error.filename}`: {error.strerror}{fix}."
    return str(error)
