"""How many of a record's values its text names, and how many texts name all of them: what BLEU hides.

A text is read in plain words: lower case, without accents, hyphens and apostrophes. The name and the place
nearby are named where their words stand, with or without "the". Everything else is looked for with the proper
names taken out, so that "Raja Indian Cuisine" is no Indian food. `WORDINGS` has people's words for a value,
written from the references of E2E's training set. A yes or no is a mention that its clause denies, or does
not. Any other value is looked for by its own words, which is how data that is made here has them.

People write "cheap" for "less than £ 20", and "five stars" for a "high" rating. So prices of one level share
their wordings, and so do ratings.

In people's own texts, the references of E2E's dev and test sets, this finds 92.4 and 91.6 % of the values.
The rest is mostly not there: of 110 that were not found in the test set and were read one by one, at most 11
are stated in some way, so that 99 % of what is stated is found. Of wrong values of the same attribute (of
prices and ratings, of another level) it finds 1.3 % in both sets, and at most 4 % of any attribute.
docs/experiments.md has each attribute.

Left out: what a text adds to its record, misspelled names, and what only follows from what is said.
"""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


# Attributes whose values are proper names.
NAMES = ("name", "near")
# Other data sets' words for the same.
_SAME = {"rating": "customer rating"}

# Between an adjective and what it is said of: "high , if fair , prices" is two statements, and so is "a high
# rating and cheap".
_GAP = r"(?: (?!and\b|but\b|with\b|rat|review|pric|cost|customer)[a-z]+){0,2}"
_PRICE = r"(?:pric\w*|cost\w*|budgets?|menu)"
_RATING = (
    r"(?:(?:customers?|costumer|consumer|star|user|overall|quality) )*(?:rat(?:ed|ings?|es?)|review(?:s|ed)?"
    r"|scor(?:es?|ed)|rank(?:ed|ings?)|satisfaction|feedback|approval|recommended|regarded|reputation)"
)
_POUNDS = r"(?: pounds?| gbp| euros?)?"


def _said_of(adjectives: str, subject: str) -> list[str]:
    """An adjective before its subject or after: "high customer rating", "the rating is quite high"."""
    between = r"(?: (?:range|ranges|level|of|from|by|customers?|guests?))*(?: (?:is|are|was))?"
    another = r"(?! (?:range )?(?:pric|cost|customer|rat|review|star))"
    return [
        rf"\b(?:{adjectives}){_GAP} {subject}\b",
        rf"\b{subject}{between}{_GAP} (?:{adjectives})\b{another}",
    ]


def _beyond(words: str, number: str, after: str) -> list[str]:
    """ "less than £ 20", "20 pounds or less"."""
    return [
        rf"\b(?:{words})(?: [\w£]+){{0,3}} (?:{number})\b",
        rf"\b(?:{number}){_POUNDS} (?:or|and) (?:{after})\b",
    ]


def _stars(number: str) -> list[str]:
    """ "5 out of 5", "a five star pub", "rated 5"."""
    by = r"(?: (?:is|of|at|it|as|by customers|by its customers))*(?: an?)?"
    return [
        rf"\b(?:{number})(?: stars?)? (?:out of|of|out|in|over) (?:a possible )?(?:5|five)\b",
        rf"\b(?:{number}) (?:5|five)\b",
        rf"(?<!of )(?<!out )\b(?:{number}) stars?\b",
        rf"\brat\w+{by} (?:{number})\b",
    ]


_PRICES = {
    "low": [
        r"\b(?:cheap\w*|inexpensive\w*|affordabl\w*|economical\w*|bargain|budget|thrifty)\b",
        r"\bnot (?:\w+ )?expensive\b",
        *_beyond("less|lower|cheaper|under|below|up to|within|maximum", "20|twenty", "less|under|below"),
        *_said_of(r"low\w*|little|small|cheap\w*|reasonabl\w*", _PRICE),
    ],
    "middle": [
        rf"\b(?:20|twenty){_POUNDS}(?: to| and| £)* (?:25|twenty five)\b",
        r"\b(?:moderate|mid|middle|medium) range\w*\b",
        *_said_of(r"moderate\w*|medium|mid|middle|average\w*|fair\w*|reasonabl\w*|normal\w*", _PRICE),
    ],
    "high": [
        r"(?<!not )\b(?:expensive\w*|pricey|costly|upscale|upmarket|exclusive|high end)\b",
        *_beyond(
            r"more|over|above|higher|greater|excess|exceed\w*|starting|start|least|from|upwards",
            "30|thirty",
            "more|over|above|up",
        ),
        *_said_of(r"high\w*|steep|top|premium", _PRICE),
    ],
}
_RATINGS = {
    "low": [
        *_said_of(r"low\w*|poor\w*|bad\w*|terribl\w*|awful|mediocre|not (?:\w+ )?(?:well|highly)", _RATING),
        *_stars("1|one"),
    ],
    "middle": [
        *_said_of(r"average\w*|moderate\w*|mid\w*|medium|decent|fair\w*|okay|ok|mixed", _RATING),
        *_stars("3|three"),
    ],
    "high": [
        *_said_of(
            r"(?<!not "
            r")(?:high\w*|excellent\w*|good|great|well|top|best|outstanding|perfect|fantastic|superb)",
            _RATING,
        ),
        *_stars("5|five"),
    ],
}
# Of every attribute with a table: the wordings of each value, as patterns that a plain text is searched for.
WORDINGS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "Type": {
        "coffee shop": [r"\bcoffee\b", r"\bcafes?\b"],
        "pub": [r"\bpubs?\b", r"(?<!sushi )(?<!coffee )\bbars?\b", r"\btavern\b", r"\bpublic house\b"],
        "restaurant": [r"\brestaurants?\b", r"\beater(?:y|ies)\b", r"\bdin(?:er|ing)\b", r"\bbistro\b"],
    },
    "food": {
        "Chinese": [r"\bchinese\b"],
        "English": [r"\benglish\b", r"\bbritish\b", r"\bfish and chips\b"],
        "Fast food": [r"\bfast ?foods?\b", r"\bburgers?\b", r"\bfries\b"],
        "French": [r"\bfrench\b", r"\bcrepes?\b"],
        "Indian": [r"\bindian\b", r"\bcurr(?:y|ies)\b"],
        "Italian": [r"\bitalian\b", r"\bpastas?\b", r"\bpizzas?\b", r"\bspaghetti\b"],
        "Japanese": [r"\bjapanese\b", r"\bsushi\b"],
    },
    "area": {
        "city centre": [
            r"\b(?:city|town)s?(?: s)? cent(?:re|er)\b",
            r"\bcent(?:re|er|ral)\b",
            r"\bdowntown\b",
            r"\bin (?:the )?(?:heart of (?:the )?)?(?:city|town)\b",
        ],
        "riverside": [r"\briver ?(?:side|bank|front)?\b", r"\bwaterfront\b"],
    },
    "price": {
        **dict.fromkeys(("cheap", "low", "less than £ 20"), _PRICES["low"]),
        **dict.fromkeys(("moderate", "£ 20 - 25"), _PRICES["middle"]),
        **dict.fromkeys(("high", "more than £ 30"), _PRICES["high"]),
    },
    "customer rating": {
        **dict.fromkeys(("low", "poor", "1 out of 5"), _RATINGS["low"]),
        **dict.fromkeys(("average", "3 out of 5"), _RATINGS["middle"]),
        **dict.fromkeys(("high", "excellent", "5 out of 5"), _RATINGS["high"]),
    },
}
# A yes or no is a mention, and what denies it in its clause. A mention is one of the attribute's own words,
# unless it is here.
_MENTIONS = {
    "family friendly": r"famil(?:y|ies)|kids?|child\w*|toddlers?|youngsters?|babies|all ages|everyone|young"
}
_ONLY_ADULTS = re.compile(r"\badults?\b|\bgrown ups?\b|\bover (?:18|eighteen)\b")
_DENIED = re.compile(
    # Another matter.
    r"\b(?:not(?! (?:[a-z]+ )?(?:rat|high|well|cheap|expens|pric|only|far|bad|good|great|low))"
    r"|non|no|nor|never|nt|cannot|neither|without|lacks?|lacking|leave|free|instead|un"
    r"|(?:is|are|was|do|does|did|ca|wo|should|would)nt|(?:isn|aren|wasn|don|doesn|didn|can|won|shouldn) t"
    r"|unfriendly|unsuitable|unwelcom\w*|inappropriate|discourag\w*|prohibit\w*|forbid\w*)\b"
)
_CLAUSES = re.compile(r"[.,]|\b(?:and|but|however|although|though|yet|while|with)\b")


def score(contexts: Sequence[str], texts: Sequence[str]) -> dict[str, Any] | None:
    """The share of values that are named, and of texts that name all of theirs; of each attribute as well.

    >>> found = score(["name : Cotto | food : Indian | family friendly : no"] * 2,
    ...     ["Cotto is Indian, and not for families.", "A family friendly place near Raja Indian Cuisine"])
    >>> found["all_values"], found["attributes"]
    (0.5, {'name': 0.5, 'food': 1.0, 'family friendly': 0.5})

    `contexts` are in the authors' form, `name : Cotto | food : Indian`. None where they are of another kind:
    one that is no list of attributes, or has no name.
    """
    records = [_record(context) for context in contexts]
    if not records or not all("name" in record for record in records):
        return None
    proper = _proper(records)
    found = [named(record, text, proper) for record, text in zip(records, texts, strict=True)]
    given, hits = Counter(), Counter()
    for values in found:
        given.update(values.keys())
        hits.update(attribute for attribute, hit in values.items() if hit)
    return {
        "values": hits.total() / given.total(),
        "all_values": sum(all(values.values()) for values in found) / len(found),
        "attributes": {attribute: hits[attribute] / count for attribute, count in given.items()},
    }


def named(record: Mapping[str, str], text: str, proper: "re.Pattern[str] | None" = None) -> dict[str, bool]:
    """Whether the text names each value of the record.

    >>> named({"name": "The Mill", "family friendly": "yes"}, "The Mill is not family-friendly.")
    {'name': True, 'family friendly': False}
    """
    plain = _plain(text)
    rest = (_proper([record]) if proper is None else proper).sub(" ", plain)
    return {
        attribute: _names_words(value, plain) if attribute in NAMES else _names(attribute, value, rest)
        for attribute, value in record.items()
    }


def _record(context: str) -> dict[str, str]:
    pairs = [part.partition(" : ") for part in context.split(" | ")]
    return {name.strip(): value.strip() for name, _, value in pairs}


def _plain(text: str) -> str:
    """Words and numbers, a blank between them, and what ends a clause as a comma or a full stop."""
    letters = unicodedata.normalize("NFKD", text.lower())
    letters = re.sub(r"[\u0300-\u036f'’`]", "", letters)
    return " ".join(re.findall(r"[a-z]+|\d+|£|[.,]", re.sub("[;:!?()]", ",", letters)))


def _words(value: str) -> str:
    """A value as a pattern; an article at its beginning may be missing."""
    return rf"\b{re.escape(_plain(value).removeprefix('the '))}\b"


def _names_words(value: str, plain: str) -> bool:
    return re.search(_words(value), plain) is not None


def _proper(records: Iterable[Mapping[str, str]]) -> "re.Pattern[str]":
    """All proper names of the records, the longest first."""
    names = {record[attribute] for record in records for attribute in NAMES if attribute in record}
    return re.compile("|".join(sorted(map(_words, names), key=len, reverse=True)))


def _names(attribute: str, value: str, rest: str) -> bool:
    attribute = _SAME.get(attribute, attribute)
    if value in ("yes", "no"):
        return _answers(attribute, rest) == value
    return any(pattern.search(rest) for pattern in _patterns(attribute, value))


@functools.cache
def _patterns(attribute: str, value: str) -> tuple["re.Pattern[str]", ...]:
    wordings = WORDINGS.get(attribute, {}).get(value) or [_words(value)]
    return tuple(re.compile(wording) for wording in wordings)


def _answers(attribute: str, rest: str) -> str | None:
    """ "no" where a mention of the attribute is denied in its clause, "yes" where none is."""
    mention = re.compile(rf"\b(?:{_MENTIONS.get(attribute, _words(attribute))})\b")
    clauses = [clause for clause in _CLAUSES.split(rest) if mention.search(clause)]
    if clauses:
        return "no" if any(_DENIED.search(clause) for clause in clauses) else "yes"
    return "no" if attribute == "family friendly" and _ONLY_ADULTS.search(rest) else None
