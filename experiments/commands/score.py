"""`score`: computes a task's published metrics of generated texts."""

import argparse
import json
from pathlib import Path
from typing import Any

from experiments.commands.options import Commands


def add_to(commands: Commands) -> None:
    score = commands.add_parser(
        "score", help="compute a task's published metrics of generated texts, as JSON"
    )
    score.add_argument("task", metavar="TASK", help="e2e, for example; a name that is unknown gets the list")
    score.add_argument(
        "--refs",
        required=True,
        nargs="+",
        metavar="FILE",
        help="references one a line, a blank line between inputs; or several files, the n-th line of each "
        "for the n-th input, empty where there is no further one; of squad, its JSON",
    )
    score.add_argument(
        "--hyps",
        required=True,
        metavar="FILE",
        help="one generated text a line, in the order of the inputs; of squad, JSON of {id: text}",
    )
    score.add_argument(
        "--filter",
        metavar="PART",
        help="a part of the test set alone: seen or unseen, of webnlg, whose files have all 1,862 inputs in "
        "the challenge's order, or those of the part; matched or mismatched, of glue/mnli",
    )
    score.add_argument(
        "--contexts",
        metavar="FILE",
        help="one record a line, such as a run's contexts.txt: adds the share of its values that the texts "
        "name (values), and of texts that name all of theirs (all_values)",
    )
    score.add_argument(
        "--null-odds",
        metavar="FILE",
        help="of squad 2.0, JSON of {id: number}, such as a run's null_odds.json: finds the best threshold",
    )
    score.add_argument(
        "--threshold",
        type=float,
        metavar="T",
        help="with --null-odds: questions with more count as left unanswered; default: 0",
    )
    score.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> None:
    from experiments.tasks import TASKS

    scored = {name: task for name, task in TASKS.items() if task.is_scored}
    if args.task not in scored:
        from experiments.strict_json import nearest

        raise ValueError(
            f"`TASK` must be one of {', '.join(scored)}, got `{args.task}`{nearest(args.task, scored) or '.'}"
        )
    task, paths = scored[args.task], [Path(file) for file in args.refs]
    found = _of_files(task, paths, args) if task.score_files is not None else _of_texts(task, paths, args)
    print(json.dumps(found, indent=2))


def _of_files(task: Any, references: list[Path], args: argparse.Namespace) -> Any:
    """The scores of files in the benchmark's own form."""
    _refuse(args, "filter", "contexts", why=f"is of tasks whose files are texts, and {task.name}'s are not")
    if args.threshold is not None and args.null_odds is None:
        raise ValueError(
            f"`--threshold` is {args.threshold}, of odds: pass `--null-odds` too, or leave it out."
        )
    odds = None if args.null_odds is None else Path(args.null_odds)
    return task.score_files(references, Path(args.hyps), odds=odds, threshold=args.threshold)


def _refuse(args: argparse.Namespace, *names: str, why: str) -> None:
    for name in names:
        if getattr(args, name) is not None:
            raise ValueError(f"`--{name.replace('_', '-')}` {why}: leave it out.")


def _of_texts(task: Any, paths: list[Path], args: argparse.Namespace) -> dict[str, Any]:
    """The scores of a text a line."""
    from experiments.metrics import files, values, warn

    _refuse(args, "null_odds", "threshold", why=f"is of squad, and `TASK` is {task.name}")
    references, hypotheses = files.read(paths, Path(args.hyps))
    if args.filter not in (None, "all"):
        references, hypotheses = _part(task, args.filter, references, hypotheses)
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
    return task.score(references, hypotheses, tell=warn) | named


def _part(task: Any, part: str, references: list[Any], texts: list[str]) -> tuple[list[Any], list[str]]:
    """The inputs of a part of the test set. Files that have as many inputs as the part are it already."""
    if part not in task.parts:
        known = f"must be one of all, {', '.join(task.parts)}" if task.parts else "is of webnlg and glue/mnli"
        raise ValueError(f"`--filter` {known}, got `{part}` for {task.name}: leave it out for all inputs.")
    places, every = task.parts[part], sum(map(len, task.parts.values()))
    if len(texts) == len(places):
        return references, texts
    if len(texts) != every:
        raise ValueError(
            f"`--filter` is {part}, and the files have {len(texts):,} inputs: {task.name}'s test set has "
            f"{every:,}, of which {len(places):,} are {part}. Leave `--filter` out for other files."
        )
    return [references[place] for place in places], [texts[place] for place in places]
