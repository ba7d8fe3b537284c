"""How many of a record's values its text names, and how many texts name all of them: what BLEU hides.

A text is read as plain words: lower case, no accents, no hyphens. The name and the place nearby are named
where their words stand, with or without "the". They are taken out for the rest, so that "Raja Indian Cuisine"
is no Indian food. `WORDINGS` has people's words for a value, from the references of E2E's training set. A yes
or no is a mention that its clause denies, or does not. Any other value is looked for by its own words.

Prices of one level share their wordings, and so do ratings: people write "cheap" for "less than £ 20", and
"five stars" for a "high" rating. docs/values_named.md has how many values are found in people's own texts.

Left out: what a text adds to its record, misspelled names, what only follows from what is said, and a value
that is also a name of the place.
"""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


# Attributes whose values are proper names.
NAMES = ("name", "near")

# Up to two words that do not begin another statement, as "high ratings and low prices" has one.
_GAP = r"(?: (?!and|but|rat|pric|cost)[a-z]+){0,2}"


def _said_of(subject: str, words: str) -> str:
    """Words before or after what they are said of: "high customer rating", "the rating is quite high"."""
    return rf"(?:{words}){_GAP} (?:{subject})|(?:{subject}){_GAP} (?:{words})"


def _price(words: str, amount: str, of_price: str) -> str:
    return f"{words}|{amount}|{_said_of('pric(?:es?|ed|ing)|costs?', of_price)}"


def _rating(stars: str, of_rating: str) -> str:
    of_five = rf"(?:{stars})(?: stars?)? (?:out of|of|out) (?:5|five)|(?<!of )(?<!out )(?:{stars}) stars?"
    return f"{of_five}|{_said_of('rat(?:ed|es?|ings?)|review(?:s|ed)?|satisfaction', of_rating)}"


_PRICES = {
    "low": _price(
        "cheap|inexpensive|affordabl[ey]|budget",
        _said_of("20|twenty", "less|under|below"),
        r"low\w*|cheap\w*",
    ),
    "middle": _price(
        "(?:moderate|mid|medium) range",
        "(?:20|twenty)(?: pounds?| to| and)* (?:25|twenty five)",
        r"moderate\w*|medium|mid|average\w*|fair\w*|reasonabl\w*",
    ),
    "high": _price("(?<!not )expensive|pricey", _said_of("30|thirty", "more|over|above|up"), r"high\w*"),
}
_RATINGS = {
    "low": _rating("1|one", r"low\w*|poor\w*|bad\w*|not (?:well|highly)"),
    "middle": _rating("3|three", r"average\w*|moderate\w*|mid|decent|fair\w*"),
    "high": _rating("5|five", r"(?<!not )(?:high\w*|excellent\w*|good|great|well|top|best)"),
}
# People's words for a value, as a pattern of whole words.
WORDINGS: Mapping[str, Mapping[str, str]] = {
    "Type": {
        "coffee shop": r"coffee|cafes?",
        "pub": r"pubs?|public house",
        "restaurant": r"restaurants?",
    },
    "food": {
        "English": r"english|british",
        "Fast food": r"fast ?foods?|(?:ham)?burgers?",
        "Italian": r"italian|pasta|spaghetti",
        "Japanese": r"japanese|sushi",
    },
    "area": {"city centre": "cent(?:re|er|ral)", "riverside": r"river\w*"},
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
# Words that speak of a yes or no, where they are not the attribute's own.
_MENTIONS = {"family friendly": r"famil(?:y|ies)|kids?|child\w*|adults?"}
_CLAUSES = re.compile(r"[.,]|\b(?:and|but)\b")
# "t" is what is left of "isn't".
_DENIED = r"not|no|non|t|never|without|leave|(?<!feel )free|unfriendly|unsuitable|adults?"


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
    names = frozenset(name for record in records for name in _names(record))
    found = [named(record, text, names) for record, text in zip(records, texts, strict=True)]
    given, hits = Counter(), Counter()
    for values in found:
        given.update(values.keys())
        hits.update(attribute for attribute, hit in values.items() if hit)
    return {
        "values": hits.total() / given.total(),
        "all_values": sum(all(values.values()) for values in found) / len(found),
        "attributes": {attribute: hits[attribute] / count for attribute, count in given.items()},
    }


def named(record: Mapping[str, str], text: str, names: frozenset[str] = frozenset()) -> dict[str, bool]:
    """Whether the text names each value of the record. `names`: proper names that are no values either.

    >>> named({"name": "The Mill", "family friendly": "yes"}, "The Mill is not family-friendly.")
    {'name': True, 'family friendly': False}
    """
    plain, proper = _plain(text), _any_of(names.union(_names(record)))
    seen, rest = set(proper.findall(plain)), proper.sub("it", plain)
    return {
        attribute: _words(value) in seen if attribute in NAMES else _says(rest, attribute, value)
        for attribute, value in record.items()
    }


def _record(context: str) -> dict[str, str]:
    """Nothing where a part is no attribute with its value."""
    pairs = [part.partition(" : ") for part in context.split(" | ")]
    if not all(colon for _, colon, _ in pairs):
        return {}
    return {name.strip(): value.strip() for name, _, value in pairs}


def _names(record: Mapping[str, str]) -> list[str]:
    return [record[attribute] for attribute in NAMES if attribute in record]


def _plain(text: str) -> str:
    """Words and numbers, a blank between them; what ends a clause is a comma or a full stop."""
    letters = unicodedata.normalize("NFKD", text.lower().replace("&", " and "))
    letters = re.sub(r"[\u0300-\u036f]", "", letters)
    return " ".join(re.findall(r"[^\W\d_]+|\d+|[.,]", re.sub(r"[;!?()|]", ",", letters)))


def _words(value: str) -> str:
    """The words of a value, without an article before them."""
    return _plain(value).removeprefix("the ")


@functools.cache
def _any_of(names: frozenset[str]) -> "re.Pattern[str]":
    """The longest first, so that "Old Mill" holds no "Mill"."""
    words = sorted(filter(None, map(_words, names)), key=len, reverse=True)
    return _whole("|".join(map(re.escape, words)))


@functools.cache
def _whole(pattern: str) -> "re.Pattern[str]":
    """The pattern between blanks. An empty one is found nowhere."""
    return re.compile(rf"(?<!\S)(?:{pattern or '(?!)'})(?!\S)")


def _found(pattern: str, rest: str) -> bool:
    return _whole(pattern).search(rest) is not None


def _says(rest: str, attribute: str, value: str) -> bool:
    attribute = {"rating": "customer rating"}.get(attribute, attribute)  # as the data made here call it
    if value in ("yes", "no"):
        return _answer(rest, attribute) == value
    return _found(WORDINGS.get(attribute, {}).get(value) or re.escape(_words(value)), rest)


def _answer(rest: str, attribute: str) -> str | None:
    """ "no" where a mention of the attribute is denied in its clause, "yes" where none is."""
    mention = _MENTIONS.get(attribute, re.escape(_words(attribute)))
    clauses = [clause for clause in _CLAUSES.split(rest) if _found(mention, clause)]
    if not clauses:
        return None
    return "no" if any(_found(_DENIED, clause) for clause in clauses) else "yes"
