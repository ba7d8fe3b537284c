"""DART: triples of several sources in, their wording out (Nan et al. 2021), prepared as the authors of LoRA
do.

The files are those of version 1.1.1, as JSON or XML. An example is an entry with one of its wordings.
Properties are lower-cased. Entries with the same triples are one test input.

BLEU is the challenge's: that of multi-bleu, on the texts as they are. The challenge's references are split at
marks and lower-cased, and so is what a run writes for `score`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.metrics import score_tokens, warn, webnlg
from experiments.tasks import pairs, triples
from experiments.tasks.pairs import PairsData, Row
from experiments.tasks.splits import Splits
from experiments.tasks.task import Task
from experiments.tasks.triples import Entry


@dataclass(frozen=True)
class DARTData(PairsData):
    """Triples and their wordings."""

    task: Literal["dart"]


def rows_of(entry: Entry) -> list[Row]:
    context = triples.linearised([(one, name.lower(), other) for one, name, other in entry.triples])
    return [(context, text) for _, text in entry.wordings]


def read(section: DARTData, directory: Path) -> dict[str, list[Row]]:
    """The rows of each split, before any tokenizer: what can be wrong with the files is found here."""
    found = {}
    for split in ("train", "valid", "test"):
        name = getattr(section, split)
        if name is not None:
            entries = triples.read_file(directory / name)
            found[split] = pairs.checked([row for entry in entries for row in rows_of(entry)], split, name)
    return found


def prepare(section: DARTData, rows: dict[str, list[Row]], tokenizer: Any) -> Splits:
    """Examples and prompts of the rows that `read` found."""
    return pairs.prepare(section, rows, tokenizer, most=triples.REFERENCES)


def as_scored(text: str) -> str:
    """A text as the challenge's reference files have it.

    >>> as_scored("Hawaii Five-O, in 1982.")
    'hawaii five - o , in 1982 .'
    """
    return " ".join(webnlg.split(text)).lower()


def score(
    references: Sequence[Sequence[str]], texts: Sequence[str], *, tell: Callable[[str], None] = warn
) -> dict[str, float | None]:
    """BLEU, METEOR and TER of the texts as they are, split at blanks."""
    words = [[reference.split() for reference in group] for group in references]
    return score_tokens(words, [text.split() for text in texts], tell=tell)


TASK = Task(
    section=DARTData,
    read=read,
    prepare=prepare,
    score=score,
    as_scored=as_scored,
    cuts=lambda section: section.truncate,
)
