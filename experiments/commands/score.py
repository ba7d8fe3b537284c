"""`score`: computes a task's published metrics of generated texts."""

import argparse
import json
from pathlib import Path

from experiments.commands.options import Commands


# The tasks whose metrics are computed.
SCORED = ("e2e",)


def add_to(commands: Commands) -> None:
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
    score.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> None:
    if args.task not in SCORED:
        from experiments.strict_json import nearest

        raise ValueError(
            f"`TASK` must be one of {', '.join(SCORED)}, got `{args.task}`{nearest(args.task, SCORED) or '.'}"
        )
    from experiments.metrics import files, score_e2e

    scores = score_e2e(*files.read(Path(args.refs), Path(args.hyps)))
    print(json.dumps(scores, indent=2))
