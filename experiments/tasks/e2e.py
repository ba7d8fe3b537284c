"""E2E: a restaurant's attributes in, a sentence out (Novikova et al. 2017), prepared as the authors of LoRA
do.

Both formats of the data set are read: `mr,ref` tables (`name[Alimentum], area[riverside]`) and the authors'
text files (`name : Alimentum | area : riverside||reference`), each also compressed with xz, and whatever
`datasets` loads with the columns of one of them. The same meaning gives the same context from either: the
attribute names below and the blanks around pound signs and ranges are all that separates them. References
stay as the file has them (the authors' are tokenised, the tables' are not).
"""

import csv
import lzma
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.metrics import score_e2e
from experiments.tasks import hub
from experiments.tasks.pairs import checked, encode as encode, PairsData, prepare as prepare, Row, short
from experiments.tasks.task import Task


ATTRIBUTES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
# Column names by which the data set goes around, always (meaning, reference).
COLUMNS = (("mr", "ref"), ("meaning_representation", "human_reference"), ("context", "completion"))

_SLOT = re.compile(r"([^\[\],]+)\[([^\]]*)\]")


@dataclass(frozen=True)
class E2EData(PairsData):
    """Meanings and their wordings. `dataset`: a directory or hub name for `datasets`, whose splits `train`,
    `valid`, `test` then name; without it they are files."""

    task: Literal["e2e"]
    dataset: str | None = None


def context_of(meaning: str) -> str:
    """The authors' form of a meaning.

    >>> context_of("name[The Mill], eatType[pub], priceRange[£20-25]")
    'name : The Mill | Type : pub | price : £ 20 - 25'
    """
    slots = [(name.strip(), value.strip()) for name, value in _SLOT.findall(meaning)]
    if not slots or re.sub(r"[,\s]", "", _SLOT.sub("", meaning)):
        raise ValueError(f"the meaning {meaning!r} is not of the form name[value], name[value].")
    return " | ".join(f"{ATTRIBUTES.get(name, name)} : {_spaced(value)}" for name, value in slots)


def _spaced(value: str) -> str:
    return re.sub(r"(?<=\d)-(?=\d)", " - ", re.sub(r"£(?=\d)", "£ ", value))


def split_line(line: str) -> Row:
    """`context||reference`, stripped as a whole as the authors do, so that the reference loses its
    trailing blank.
    """
    parts = line.strip().split("||")
    if len(parts) != 2:
        raise ValueError(
            f"expected exactly one `||` between meaning and reference, found {len(parts) - 1} in "
            f"{short(line)}."
        )
    return parts[0], parts[1]


def read_file(path: Path) -> list[Row]:
    """`(context, reference)` of every row of a `.csv` or `.txt` file, `.xz` or not. Errors name the file
    and the row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no data file `{path}`.")
    plain = path.with_suffix("") if path.suffix == ".xz" else path
    if plain.suffix not in (".csv", ".txt"):
        raise ValueError(f"`{path}` is neither .csv nor .txt (nor one of them with .xz).")
    opener = lzma.open if path.suffix == ".xz" else open
    try:
        with opener(path, "rt", encoding="utf-8", newline="" if plain.suffix == ".csv" else None) as handle:
            rows = (
                _table_rows(csv.DictReader(handle), path)
                if plain.suffix == ".csv"
                else _text_rows(handle, path)
            )
            return list(rows)
    except (lzma.LZMAError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"`{path}` cannot be read: {error}") from error


def _text_rows(lines: Iterable[str], name: Any) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        try:
            yield split_line(line)
        except ValueError as error:
            raise ValueError(f"`{name}` row {number}: {error}") from None


def _table_rows(table: Any, name: Any) -> Iterator[Row]:
    """Rows of a table by its columns, whatever their case. A table of inputs only, such as `testset.csv`,
    has no references.
    """
    columns = {column.lower(): column for column in (table.fieldnames or ()) if column}
    meaning, reference = next((pair for pair in COLUMNS if pair[0] in columns), (None, None))
    if meaning is None:
        raise ValueError(
            f"`{name}` has the columns {', '.join(columns) or 'none'}; expected "
            f"{' or '.join(','.join(pair) for pair in COLUMNS)}."
        )
    for number, row in enumerate(table, 2):
        yield _row(
            row[columns[meaning]],
            row[columns[reference]] if reference in columns else "",
            meaning,
            f"`{name}` row {number}",
        )


def _row(meaning: str | None, reference: str | None, column: str, place: str) -> Row:
    try:
        context = (meaning or "").strip() if column == "context" else context_of(meaning or "")
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return context, " ".join((reference or "").split())


def read_datasets(source: str, split: str, directory: Path | None = None) -> list[Row]:
    """The rows of one split of a directory (as files, or as `save_to_disk` leaves it) or of a hub name,
    through `datasets`.
    """
    loaded = hub.split_of(source, directory or Path(), split)
    return rows_of(loaded, f"{source}:{split}")


def rows_of(dataset: Any, name: str) -> list[Row]:
    """The rows of a `datasets.Dataset` with the columns of a table, or with one column `text` of
    `context||reference` lines.
    """
    if "text" in dataset.column_names:
        return list(_text_rows(dataset["text"], name))
    meaning, reference = next(
        (pair for pair in COLUMNS if set(pair) <= set(dataset.column_names)), (None, None)
    )
    if meaning is None:
        raise ValueError(
            f"`{name}` has the columns {', '.join(dataset.column_names)}; expected text or "
            f"{' or '.join(','.join(pair) for pair in COLUMNS)}."
        )
    pairs = zip(dataset[meaning], dataset[reference], strict=True)
    return [
        _row(first, second, meaning, f"`{name}` row {number}")
        for number, (first, second) in enumerate(pairs, 1)
    ]


def read(section: E2EData, directory: Path) -> dict[str, list[Row]]:
    """The rows of each split, before any tokenizer: what can be wrong with the files is found here."""
    found = {}
    for split in ("train", "valid", "test"):
        name = getattr(section, split)
        if name is None:
            continue
        rows = (
            read_file(directory / name)
            if section.dataset is None
            else read_datasets(section.dataset, name, directory)
        )
        found[split] = checked(rows, split, name)
    return found


TASK = Task(
    section=E2EData,
    read=read,
    prepare=prepare,
    score=score_e2e,
    percentages=("BLEU", "METEOR", "ROUGE_L"),
    cuts=lambda section: section.truncate,
)
