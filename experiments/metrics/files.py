"""The text files of the E2E scorer: hypotheses one a line, references one a line with a blank line between
inputs.

Lines end where Python's `str.splitlines` ends them and are stripped, as in the official scorer. Left out: its
tables (`.csv`, `.tsv`).
"""

from pathlib import Path


References = list[list[str]]


def read(references: Path, hypotheses: Path) -> tuple[References, list[str]]:
    """The groups of references and the hypotheses, as many of one as of the other, or `ValueError` with both
    numbers.

    A references file without a blank line has one reference an input, unless there is one hypothesis only. An
    empty line among the hypotheses is an empty hypothesis.
    """
    groups, outputs = read_references(references), _lines(hypotheses)
    if len(groups) == 1 and len(outputs) > 1:
        groups = [[line] for line in groups[0]]
    if len(groups) != len(outputs):
        raise ValueError(
            f"`{references}` has references for {_inputs(len(groups))} and `{hypotheses}` has hypotheses "
            f"for {_inputs(len(outputs))}: "
            "references need a blank line between inputs, hypotheses exactly one line an input, empty or not."
        )
    return groups, outputs


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
