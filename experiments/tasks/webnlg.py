"""WebNLG, the challenge of 2017: triples of DBpedia in, their wording out (Gardent et al. 2017), prepared as
the authors of LoRA do.

The files are the challenge's, as XML or as the authors' JSON. An example is an entry with one of its wordings
whose comment is "good"; the rest is left out. The test set has ten categories that the training set has, and
five that it has not: every score is also given for each part, "seen" and "unseen".

What differs from the authors: accents are taken off before texts are scored, and an input that has fewer
references than another has empty ones, both as the challenge does it. The authors repeat the first one, which
gives another BLEU where texts are less than half as long as their references. TER is theirs and not the
challenge's.
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


SEEN = frozenset(
    "Airport Astronaut Building City ComicsCharacter Food Monument SportsTeam University WrittenWork".split()
)


@dataclass(frozen=True)
class WebNLGData(PairsData):
    """Triples and their wordings. `filter`: of the test set, the inputs whose category the training set has,
    or has not."""

    task: Literal["webnlg"]
    filter: Literal["all", "seen", "unseen"] = "all"


def part_of(entry: Entry) -> str:
    return "seen" if entry.category in SEEN else "unseen"


def rows_of(entry: Entry) -> list[Row]:
    """One of each good wording. An entry of a test set without any, such as `testdata_no_lex.xml`, has one
    without a wording.
    """
    context = triples.linearised(entry.triples)
    if not entry.wordings:
        return [(context, "")]
    return [(context, text) for comment, text in entry.wordings if comment == "good"]


def read(section: WebNLGData, directory: Path) -> dict[str, list[Entry]]:
    """The entries of each split, before any tokenizer: what can be wrong with the files is found here."""
    found = {}
    for split in ("train", "valid", "test"):
        name = getattr(section, split)
        if name is None:
            continue
        entries = triples.read_file(directory / name)
        if split == "test" and section.filter != "all":
            entries = [entry for entry in entries if part_of(entry) == section.filter]
        pairs.checked([row for entry in entries for row in rows_of(entry)], split, name)
        found[split] = entries
    return found


def prepare(section: WebNLGData, entries: dict[str, list[Entry]], tokenizer: Any) -> Splits:
    """Examples and prompts of the entries that `read` found."""
    rows = {split: [row for entry in found for row in rows_of(entry)] for split, found in entries.items()}
    parts = {triples.linearised(entry.triples): part_of(entry) for entry in entries.get("test", [])}
    return pairs.prepare(section, rows, tokenizer, most=triples.REFERENCES, parts=parts)


def score(
    references: Sequence[Sequence[str]], texts: Sequence[str], *, tell: Callable[[str], None] = warn
) -> dict[str, float | None]:
    """BLEU, METEOR and TER on the challenge's tokens."""
    words = [[webnlg.tokenize(reference) for reference in group] for group in references]
    return score_tokens(words, [webnlg.tokenize(text) for text in texts], tell=tell)


TASK = Task(
    section=WebNLGData,
    read=read,
    prepare=prepare,
    score=score,
    as_scored=lambda text: " ".join(text.split()),
    parts={"seen": range(971), "unseen": range(971, 1862)},
    cuts=lambda section: section.truncate,
)
