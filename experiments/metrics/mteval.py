"""The tokens of BLEU and NIST: those of NIST's mteval-v13a for Western languages, lower-cased.

Unlike the Perl script, and like the E2E scorer's `-p` mode, this leaves end-of-line hyphens alone: an input
is one line.
"""

import re


_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
# Every ASCII symbol but the apostrophe, comma, hyphen and point; then those that a digit holds together. In
# this order: each step sees the blanks of the one before.
_STEPS = (
    (re.compile(r"([!-&(-+/:-@\[-`{-~])"), r" \1 "),
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def tokenize(text: str) -> list[str]:
    """An empty text has one token, the empty one, as in the official scorer: it adds to the length and
    matches nothing.

    >>> tokenize("Rated 3.5, it's £20-25 (family-friendly).")
    ['rated', '3.5', ',', "it's", '£20', '-', '25', '(', 'family-friendly', ')', '.']
    >>> tokenize("")
    ['']
    """
    text = text.replace("<skipped>", "")
    for entity, symbol in _ENTITIES:
        text = text.replace(entity, symbol)
    text = f" {text} "
    for pattern, spaced in _STEPS:
        text = pattern.sub(spaced, text)
    return [token.lower() for token in text.split()] or [""]
