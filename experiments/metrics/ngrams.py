"""N-grams as tuples of tokens, and how many of a hypothesis's are in its references: what BLEU, NIST and
CIDEr count.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence


Tokens = Sequence[str]
Counts = Counter[tuple[str, ...]]


def each_ngram(tokens: Tokens, n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(tokens[start:] for start in range(n)), strict=False)


def ngrams(tokens: Tokens, n: int) -> Counts:
    """
    >>> ngrams("a b a b".split(), 2)
    Counter({('a', 'b'): 2, ('b', 'a'): 1})
    """
    return Counter(each_ngram(tokens, n))


def matches(hypothesis: Tokens, references: Iterable[Tokens], n: int) -> Counts:
    """The n-grams of the hypothesis that its references have too, each as often as in the one that has
    most of it (Papineni et al., 2002).
    """
    most: Counts = Counter()
    for reference in references:
        most |= ngrams(reference, n)
    return ngrams(hypothesis, n) & most
