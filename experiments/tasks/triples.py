"""The files of WebNLG and DART: entries of triples (subject, property, object), and their wordings.

Both challenges have XML of one form, and each a JSON of its own; any of them may be compressed with xz.
"""

import json
import lzma
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple


Triple = tuple[str, str, str]
# The authors score with the first six of a test input's wordings; the challenges with the first three.
REFERENCES = 6


class Entry(NamedTuple):
    """`wordings`: each with its comment, which is "good" or not in WebNLG, and a source in DART."""

    triples: tuple[Triple, ...]
    wordings: tuple[tuple[str, str], ...]
    category: str


def linearised(triples: Sequence[Triple]) -> str:
    """The authors' form of an entry's triples.

    >>> linearised([("Aarhus", "leader", "Jacob_Bundsgaard"), ("Aarhus", "country", "Denmark")])
    'Aarhus : leader : Jacob_Bundsgaard | Aarhus : country : Denmark'
    """
    return " | ".join(" : ".join(triple) for triple in triples)


def read_file(path: Path) -> list[Entry]:
    """The entries of a `.xml` or `.json` file, `.xz` or not. Errors name the file and the entry."""
    if not path.is_file():
        raise FileNotFoundError(f"no data file `{path}`.")
    plain = path.with_suffix("") if path.suffix == ".xz" else path
    if plain.suffix not in (".xml", ".json"):
        raise ValueError(f"`{path}` is neither .xml nor .json (nor one of them with .xz).")
    try:
        content = lzma.open(path).read() if path.suffix == ".xz" else path.read_bytes()
        found = (
            (_of_xml, list(ElementTree.fromstring(content).iter("entry")))
            if plain.suffix == ".xml"
            else _of_json(json.loads(content))
        )
    except (lzma.LZMAError, EOFError, ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"`{path}` cannot be read: {error}") from error
    return list(_entries(*found, path))


def _entries(read: Any, entries: Sequence[Any], path: Path) -> Iterator[Entry]:
    for number, entry in enumerate(entries, 1):
        try:
            found = read(entry)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"`{path}` entry {number} is not of the challenge's form: {error!r}.") from error
        if not found.triples:
            raise ValueError(f"`{path}` entry {number} has no triples.")
        yield found


def _of_json(content: Any) -> tuple[Any, list[Any]]:
    """WebNLG has `{"entries": [{"1": {...}}, ...]}`, and DART a list."""
    if isinstance(content, dict) and isinstance(content.get("entries"), list):
        return _of_webnlg, content["entries"]
    if isinstance(content, list):
        return _of_dart, content
    raise ValueError("it holds neither `entries`, as WebNLG's files, nor a list, as DART's")


def _of_webnlg(numbered: Any) -> Entry:
    (entry,) = numbered.values()
    triples = [
        (triple["subject"], triple["property"], triple["object"]) for triple in entry["modifiedtripleset"]
    ]
    wordings = [(wording["comment"], wording["lex"]) for wording in entry["lexicalisations"]]
    return Entry(tuple(triples), tuple(wordings), entry["category"])


def _of_dart(entry: Any) -> Entry:
    wordings = [(wording["source"], wording["text"]) for wording in entry["annotations"]]
    return Entry(tuple(_triple(parts) for parts in entry["tripleset"]), tuple(wordings), "")


def _of_xml(entry: Any) -> Entry:
    triples = [
        _triple(triple.text.split(" | ")) for triple in entry.find("modifiedtripleset").iter("mtriple")
    ]
    wordings = [(wording.get("comment", ""), wording.text or "") for wording in entry.iter("lex")]
    return Entry(tuple(triples), tuple(wordings), entry.get("category", ""))


def _triple(parts: Sequence[str]) -> Triple:
    subject, relation, target = parts
    return subject, relation, target
