"""An extension of griffe: the examples of docstrings as blocks of code. To Markdown, `>>>` begins a
quotation.
"""

import re
from typing import Any

import griffe


# An example ends where doctest ends it: at an empty line.
_EXAMPLE = re.compile(r"^( *)>>> .*(?:\n(?! *$).+)*", re.MULTILINE)


def fenced(text: str) -> str:
    """`text`, with each group of examples in a block of its own.

    >>> fenced("Adds.\\n\\n>>> 1 + 1\\n2\\n\\nSlowly.").splitlines()
    ['Adds.', '', '```pycon', '>>> 1 + 1', '2', '```', '', 'Slowly.']
    """
    return _EXAMPLE.sub(lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", text)


class Doctests(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **arguments: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
