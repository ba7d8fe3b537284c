"""Files of JSON lines, an object a line, and what is wrong with one, by file and row."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


_KINDS = {str: "a text", int: "an integer", list: "a list", dict: "an object"}


def read(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file with the numbers of their lines; blank lines are none."""
    try:
        with path.open(encoding="utf-8-sig") as handle:
            for number, line in enumerate(handle, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"`{path}` row {number} is not valid JSON: {error}") from error
                if not isinstance(row, dict):
                    raise ValueError(f'`{path}` row {number} is no object of JSON, such as {{"text": ...}}.')
                yield number, row
    except UnicodeDecodeError as error:
        raise ValueError(f"`{path}` is not UTF-8: {error}") from error


def field(values: Any, name: str, kind: type, place: str) -> Any:
    """The field `name` of an object, which has to be of this kind.

    >>> field({"idx": 3}, "idx", int, "`val.jsonl` row 4")
    3

    Raises:
      ValueError: it is another, or the object has no such field; `place` is named.
    """
    if not isinstance(values, dict) or name not in values:
        fields = ", ".join(values) if isinstance(values, dict) and values else "none"
        raise ValueError(
            f"{place} lacks `{name}`, and has the fields {fields}: name the directory of this set in "
            "`data.directory`."
        )
    value = values[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{place}: `{name}` is {json.dumps(value)}, and must be {_KINDS[kind]}.")
    return value
