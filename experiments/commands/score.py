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
    score.add_argument(
        "--contexts",
        metavar="FILE",
        help="one record a line, such as a run's contexts.txt: adds the share of its values that the texts "
        "name (values), and of texts that name all of theirs (all_values)",
    )
    score.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> None:
    if args.task not in SCORED:
        from experiments.strict_json import nearest

        raise ValueError(
            f"`TASK` must be one of {', '.join(SCORED)}, got `{args.task}`{nearest(args.task, SCORED) or '.'}"
        )
    from experiments.metrics import files, score_e2e, values

    references, hypotheses = files.read(Path(args.refs), Path(args.hyps))
    named = {}
    if args.contexts is not None:
        contexts = files.read_contexts(Path(args.contexts), hypotheses)
        found = values.score(contexts, hypotheses)
        if found is None:
            raise ValueError(
                f"`{args.contexts}` has lines that are no records with a name, such as "
                "`name : The Mill | food : Indian`: pass a run's contexts.txt, or leave `--contexts` out."
            )
        named = {name: found[name] for name in ("values", "all_values")}
    print(json.dumps(score_e2e(references, hypotheses) | named, indent=2))
