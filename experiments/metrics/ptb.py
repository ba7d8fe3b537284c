"""Penn Treebank tokens, lower-cased and without punctuation: what METEOR, ROUGE-L and CIDEr are computed on.

The official scorer runs Stanford's PTBTokenizer (CoreNLP 3.4.1, java) with `-preserveLines -lowerCase`, then
takes a list of punctuation tokens out. That list names brackets as `-LRB-`, in capitals, and the tokenizer
has just lower-cased its own: so `-lrb-` stays, as do `#` (what becomes of a pound sign), `?!`, `%` and every
symbol that is not in the list. All of it counts here too.

Written from the treebank's conventions and from what the tokenizer answers when asked; `tests/oracle_e2e.py`
asks it again. As in any scanner of its kind the longest match wins, and of two equally long ones the earlier
rule. Left out: telephone numbers, most smileys, and symbols outside the basic plane beyond their
disappearance.
"""

import functools
import re
from collections.abc import Sequence


REMOVED = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())

_LETTER = r"(?:[^\W\d_²³¹¼½¾]|[\u0300-\u036f])"
_WORD = rf"{_LETTER}(?:{_LETTER}|\d)*(?:[.!?]{_LETTER}(?:{_LETTER}|\d)*)*"
_PART = rf"(?:[dDoOlL]['’]{_LETTER}{_LETTER}+|(?:{_LETTER}|\d)+)"
_HYPHENATED = rf"{_PART}(?:[-_](?:o'clock|{_PART}))*"
# ASCII only, but with points and commas: `20.00-25`, `French,family-friendly`.
_COMPOUND = r"[A-Za-z0-9][A-Za-z0-9.,]*(?:-(?:[A-Za-z0-9]+|[A-Za-z](?:\.[A-Za-z])+\.))+"
_SIDE = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_APOSTROPHE = (
    r"(?:['’]n['’]|['’]n(?!\S)|['’]em"
    r"|[ldjy]['’]|d['’]you|ol['’]|somethin['’]|dunkin['’]|['’]till?|['’]cause"
    r"|['’]\d\d(?=\s)|['’][2-9]0s|o['’]clocks?|ma['’]ams?|c['’]mon|[eo]['’]er|ne['’]er"
    r"|ev['’]ry|s['’]mores|li['’]l|nat['’]l|nor['’]easter)"
)
_ENDING = r"['’](?:[sdm]|re|ve|ll)"
_ABBREVIATIONS = """
    al cf co ct dr ft ga jr ky lt md mo mr ms mt ph rd rt sq sr st va vs vt wm adj adm adv ala apr aug ave
    bhd cie col cos cpl dak dec det drs ens esq est etc ext feb fla fri gen gov hon inc ind jan jos jul
    jun kan ltd maj mar mfg mme mon mrs mtg neb nev nov oct pfc plc pte pty pvt rep rev sen sep seq sfc
    sgt spc ste sys tel thu tue wed wis wyo alex ariz assn asst atty bldg blvd brig bros capt cmdr colo
    conn corp dept elec govs insp intl invt kans mich minn mlle mont msgr natl okla penn ppte ppty pres
    prof ptes ptys reps sens sept supt tenn tues univ wisc assoc attys calif comdr lieut thurs messrs ph.d
"""
# A single letter and a point end a sentence before these, capitalised; everywhere else they are an initial.
_STARTERS = """
    a about according additionally after an as at but earlier he her here however if in it last many more
    now once one other our she since so some such that the their then there these they this we what when
    while yet you
"""
_NUMBERED = "art ca fig figs no nos op pp prop"  # abbreviations before a number only
_SPLIT = {"cannot": 3, "gonna": 3, "gotta": 3, "lemme": 3, "gimme": 3, "wanna": 3, "'tis": 2, "'twas": 2}
_CHANGED = {
    "£": "#",
    "€": "$",
    "¤": "$",
    "₠": "$",
    "¢": "cents",
    "¼": "1/4",
    "½": "1/2",
    "¾": "3/4",
    "⅓": "1/3",
    "⅔": "2/3",
}
_CHANGED |= {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_CHANGED |= {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "''", "&apos;": "'", "&nbsp;": "'"}
_CHANGED |= dict.fromkeys('"“”«»‘’‛‹›–—―…', "'")  # all of them punctuation that is removed


def _any(words: str) -> str:
    return "|".join(map(re.escape, words.split()))


# The first group is the token; what a pattern matches beyond it decides which rule wins, but is read again.
_RULES = tuple(
    re.compile(pattern)
    for pattern in (
        rf"((?i:{'|'.join(_SPLIT)}))",
        rf"({_WORD})(?:(?i:{_ENDING})(?![A-Za-z]))?",
        rf"((?i:{_ENDING}))(?![A-Za-z])",
        rf"({_HYPHENATED})",
        rf"((?:{_WORD}|{_HYPHENATED}|{_COMPOUND})\.)[,;:]",
        rf"({_COMPOUND})",
        rf"({_SIDE}(?:\\?/{_SIDE}){{1,2}})",
        r"([-+]?(?:\d*(?:[.:,]\d+)+|\d+))",
        r"((?:\d{1,4}[- \xa0])?\d{1,4}[/⁄]\d{1,4})",
        r"([A-Z]+(?:(?:&|&amp;)[A-Z]+)+)",
        rf"([A-HJ-XZn]['’]{_LETTER}{_LETTER}+)",
        rf"({_LETTER}+[aeiouyAEIOUY]['’][aeiouA-Z]{_LETTER}*)",
        rf"((?i:{_APOSTROPHE}))",
        r"([A-Za-z]+?)(?i:n['’]t)",
        r"((?i:n['’]t))",
        r"([A-Za-z](?:\.[A-Za-z])+\.)",
        rf"([A-Za-z]\.)(?!\s+(?=[A-Z])(?i:{_any(_STARTERS)})\s)",
        rf"((?i:{_any(_ABBREVIATIONS)})\.)",
        rf"((?i:{_any(_NUMBERED)})\.)\s?\d",
        r"([A-Z]+\$)",
        rf"(\#{_LETTER}+|@[A-Za-z][A-Za-z0-9_]*)",
        r"([\w.+-]+@(?:[A-Za-z0-9-]+\.)+[A-Za-z]+)",
        r"((?:https?://[^\s\"<>|().]+|www)\.[^\s\"<>|()]*[^\s\"<>|()\].,;:!?'-])",
        r"(</?[A-Za-z][^<>\n]*>|<[!?][^<>\n]*>)",
        r"(&(?:amp|lt|gt|quot|apos|nbsp|\#\d+);)",
        r"([<>]?[:;=][-o*']?[()DdPpO|\\[\]{@])(?=\W)",
        r"(-[LR][RCS]B-)",
        r"(--+|[?!]{2,}|#{2,}|@{2,}|\*{2,}|_{2,}|<<|>>|\.{3,}|''|’’|‘‘|``)",
    )
)
# Most tokens are plain words before a blank, which no rule above lengthens.
_PLAIN = re.compile(r"[A-Za-z]{2,}(?=[.,]?\s)")
_NOT_PLAIN = {*_SPLIT, *_ABBREVIATIONS.split(), *_NUMBERED.split()}
# Long dashes, long ellipses and doubled quotes are punctuation too; of single symbols some are unknown to the
# tokenizer.
_DROPPED = re.compile(
    r"--+|\.{3,}|['’‘`]{2}|[^\w!-\u06ff\u2016-\u203e\u2070-\u209f₤€\u2100-\u27ff]|[\u2028-\u202f]"
)


def tokenize(lines: Sequence[str]) -> list[list[str]]:
    """The tokens of each line. Lines are read one after the other: `no.` is one token where the next line
    starts with a digit.

    >>> tokenize(["It isn't £20-25 (a kids' pub),", "near St. John's."])
    [['it', 'is', "n't", '#', '20-25', '-lrb-', 'a', 'kids', 'pub', '-rrb-'], ['near', 'st.', 'john', "'s"]]
    """
    text = "\n".join(" ".join(line.splitlines()) for line in lines).replace("\xad", "")
    found: list[list[str]] = [[]]
    position = 0
    while position < len(text):
        if text[position].isspace():
            if text[position] == "\n":
                found.append([])
            position += 1
            continue
        token = _next(text, position)
        position += len(token)
        found[-1] += _written(token)
    return found


def _next(text: str, position: int) -> str:
    plain = _PLAIN.match(text, position)
    if plain and plain[0].lower() not in _NOT_PLAIN:
        return plain[0]
    longest = max(
        (match for rule in _RULES if (match := rule.match(text, position))),
        key=lambda match: match.end(),
        default=None,
    )
    return longest[1] if longest else text[position]


@functools.lru_cache(maxsize=100_000)
def _written(token: str) -> tuple[str, ...]:
    """What is kept of what was read: itself, what the treebank writes for it, the two words it splits it
    into, or nothing.
    """
    lower = token.lower()
    if lower in _SPLIT:
        return lower[: _SPLIT[lower]], lower[_SPLIT[lower] :]
    if re.fullmatch(rf"n['’]t|{_ENDING}", lower):
        return (lower.replace("’", "'"),)
    if token[0] in "<>:;=" and len(token) > 1:
        lower = lower.replace("(", "-lrb-").replace(")", "-rrb-")
    lower = _CHANGED.get(lower, lower.replace("&amp;", "&").replace(" ", "\xa0"))
    return () if lower in REMOVED or _DROPPED.fullmatch(token) else (lower,)
