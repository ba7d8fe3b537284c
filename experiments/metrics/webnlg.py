"""The tokens of the WebNLG challenge of 2017, with which every metric there is computed: in ASCII,
lower-cased, and split at whatever is no letter, digit or underscore.

The challenge turns texts into ASCII with the package `unidecode`. Here accents are taken off, and the letters
and marks of Europe's languages are in a table. Other symbols stay as they are.
"""

import re
import unicodedata


_PLAIN = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013", "-"),
        **dict.fromkeys("\u2014\u2015", "--"),
        **dict.fromkeys("\u2018\u2019\u201b\u2032\u00b4", "'"),
        **dict.fromkeys("\u201c\u201d\u201f", '"'),
        **{"\u201a": ",", "\u201e": ",,", "\u00ab": "<<", "\u00bb": ">>", "\u2039": "<", "\u203a": ">"},
        **{"\u00a1": "!", "\u00bf": "?", "\u00b7": "*", "\u2022": "*", "\u00d7": "x", "\u00f7": "/"},
        **{"\u00a3": "PS", "\u20ac": "EUR", "\u00a5": "Y=", "\u00b0": "deg", "\u00b1": "+-", "\u00a7": "SS"},
        **{"\u00bc": " 1/4", "\u00bd": " 1/2", "\u00be": " 3/4"},
        **{"ß": "ss", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "ı": "i", "ə": "@"},
        **{"ð": "d", "Ð": "D", "þ": "th", "Þ": "Th", "đ": "d", "Đ": "D", "ł": "l", "Ł": "L"},
        **{"ħ": "h", "Ħ": "H", "ŧ": "t", "Ŧ": "T", "ŋ": "ng", "Ŋ": "NG"},
    }
)
_PARTS = re.compile(r"\w+|[^\w\s]")


def split(text: str) -> list[str]:
    """Runs of letters, digits and underscores, and every other mark by itself.

    >>> split("It's £20-25.")
    ['It', "'", 's', '£', '20', '-', '25', '.']
    """
    return _PARTS.findall(text)


def tokenize(text: str) -> list[str]:
    """
    >>> tokenize("Adolfo Suárez Madrid–Barajas Airport")
    ['adolfo', 'suarez', 'madrid', '-', 'barajas', 'airport']
    """
    plain = unicodedata.normalize("NFKD", text.translate(_PLAIN))
    return split("".join(letter for letter in plain if not unicodedata.combining(letter)).lower())
