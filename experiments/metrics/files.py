"""The text files of scorers: hypotheses one a line, references one a line with a blank line between inputs,
or in several files, the n-th line of each for the n-th input.

Lines end where Python's `str.splitlines` ends them and are stripped, as in the official scorer. Left out: its
tables (`.csv`, `.tsv`).
"""

from collections.abc import Sequence
from pathlib import Path


References = list[list[str]]


def read(references: Path | Sequence[Path], hypotheses: Path) -> tuple[References, list[str]]:
    """The groups of references and the hypotheses, as many of one as of the other, or `ValueError` with both
    numbers.

    A references file without a blank line has one reference an input, unless there is one hypothesis only. Of
    several files, each has a line for every input, empty or not; an empty one is an empty reference. An empty
    line among the hypotheses is an empty hypothesis.
    """
    paths = [references] if isinstance(references, Path) else list(references)
    groups = read_references(paths[0]) if len(paths) == 1 else _beside(paths)
    outputs = _lines(hypotheses)
    if len(paths) == 1 and len(groups) == 1 and len(outputs) > 1:
        groups = [[line] for line in groups[0]]
    if len(groups) != len(outputs):
        lines = "a blank line between inputs" if len(paths) == 1 else "a line an input in each file"
        raise ValueError(
            f"`{paths[0]}` has references for {_inputs(len(groups))} and `{hypotheses}` has hypotheses "
            f"for {_inputs(len(outputs))}: "
            f"references need {lines}, hypotheses exactly one line an input, empty or not."
        )
    return groups, outputs


def _beside(paths: Sequence[Path]) -> References:
    """The n-th lines of all files. A file that ends early has no more references."""
    columns = [_lines(path) for path in paths]
    longest = max(map(len, columns))
    filled = [column + [""] * (longest - len(column)) for column in columns]
    groups = [list(group) for group in zip(*filled, strict=True)]
    mute = next((number for number, group in enumerate(groups, 1) if not any(group)), None)
    if mute is not None:
        raise ValueError(
            f"`{paths[0]}` line {mute}: input {mute} has no reference in any file; each file has a line for "
            "every input."
        )
    return groups


def read_references(path: Path) -> References:
    """The references of each input. Raises `ValueError` where blank lines leave an input without any, but
    for those at the end.
    """
    groups: References = [[]]
    lines = _lines(path)
    while lines and not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, 1):
        if line:
            groups[-1].append(line)
        elif groups[-1]:
            groups.append([])
        else:
            raise ValueError(
                f"`{path}` line {number}: input {len(groups)} has no reference; one blank line separates "
                "two inputs."
            )
    if not groups[-1]:
        raise ValueError(f"`{path}` has nothing but blank lines.")
    return groups


def read_contexts(path: Path, hypotheses: list[str]) -> list[str]:
    """The record of each hypothesis, one a line, or `ValueError` with both numbers."""
    contexts = _lines(path)
    if len(contexts) != len(hypotheses):
        raise ValueError(
            f"`{path}` has {_inputs(len(contexts))} and the hypotheses are for {_inputs(len(hypotheses))}: "
            "contexts need exactly one line an input."
        )
    return contexts


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"no file `{path}`.")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"`{path}` is not UTF-8: {error}") from error
    if not text:
        raise ValueError(f"`{path}` is empty.")
    return [line.strip() for line in text.splitlines()]


def _inputs(number: int) -> str:
    return "1 input" if number == 1 else f"{number:,} inputs"
