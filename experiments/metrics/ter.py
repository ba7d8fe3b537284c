"""The translation edit rate (Snover et al., 2006): how many edits make the hypothesis the reference, for each
token of the reference.

An edit inserts, deletes or replaces a token, or shifts a run of tokens that stands elsewhere in the reference
to the place where it stands there. The cheapest sequence of shifts is hard to find. As in the package
`pyter`, with which the authors of LoRA score, the one that saves most other edits comes first, while one
saves any; of several that save the same, the one whose tokens are alphabetically last. A hypothesis has the
rate of the reference that is best for it, and a corpus the plain mean of its hypotheses. The official
program, tercom, divides all edits by the mean length of all references, and so gives other numbers.
"""

from collections.abc import Iterator, Sequence

from experiments.metrics.ngrams import Tokens


def score(references: Sequence[Sequence[Tokens]], hypotheses: Sequence[Tokens]) -> float:
    """The mean rate, with the best of each hypothesis's references. References without tokens are left
    out.
    """
    rates = [
        min(rate(reference, hypothesis) for reference in group if reference)
        for group, hypothesis in zip(references, hypotheses, strict=True)
    ]
    return sum(rates) / len(rates)


def rate(reference: Tokens, hypothesis: Tokens) -> float:
    """The rate of one hypothesis, with one reference that has tokens.

    >>> reference = "SAUDI ARABIA denied THIS WEEK information published in the AMERICAN new york times"
    >>> hypothesis = "THIS WEEK THE SAUDIS denied information published in the new york times"
    >>> round(rate(reference.split(), hypothesis.split()) * 13)  # a shift, two replaced, one inserted
    4
    """
    places = _places(reference)
    tokens, edits = list(hypothesis), 0
    left = _distance(tokens, places, len(reference))
    while left:
        found = [(_distance(each, places, len(reference)), each) for each in _shifts(tokens, reference)]
        fewest = min((count for count, _ in found), default=left)
        # A shift costs an edit itself; it is done where it saves one or more.
        if fewest >= left:
            break
        left, tokens = fewest, max(each for count, each in found if count == fewest)
        edits += 1
    return (edits + left) / len(reference)


def _shifts(tokens: list[str], reference: Tokens) -> Iterator[list[str]]:
    """The hypothesis after each shift: of a longest run that it has in common with the reference from two
    places on, to the reference's place.
    """
    for start, token in enumerate(tokens):
        for place, wanted in enumerate(reference):
            if token != wanted or start == place:
                continue
            length = 1
            while (
                start + length < len(tokens)
                and place + length < len(reference)
                and tokens[start + length] == reference[place + length]
            ):
                length += 1
            shifted = tokens[:start] + tokens[start + length :]
            shifted[place:place] = tokens[start : start + length]
            yield shifted


def _places(reference: Tokens) -> dict[str, int]:
    """A number for each token, whose n-th bit says that the token stands at the n-th place."""
    found: dict[str, int] = {}
    for place, token in enumerate(reference):
        found[token] = found.get(token, 0) | 1 << place
    return found


def _distance(tokens: Sequence[str], places: dict[str, int], length: int) -> int:
    """Levenshtein's distance to the reference, a column of the table at a time, whose differences are the
    bits of two numbers (Myers, 1999, in the form of Hyyrö, 2003): a hundred times as fast as the table.
    """
    whole, last = (1 << length) - 1, 1 << (length - 1)
    up, down, distance = whole, 0, length  # where the column rises by one, and falls
    for token in tokens:
        equal = places.get(token, 0)
        vertical = equal | down
        horizontal = (((equal & up) + up) ^ up) | equal
        rises, falls = (down | ~(horizontal | up)) & whole, up & horizontal
        distance += bool(rises & last) - bool(falls & last)
        rises, falls = rises << 1 | 1, falls << 1
        up, down = (falls | ~(vertical | rises)) & whole, rises & vertical & whole
    return distance
