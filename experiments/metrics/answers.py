"""What an answer in words is worth beside those that are right: token F1 and exact match, each of the nearest
one (Rajpurkar et al. 2016). SQuAD (`squad`) and SuperGLUE's ReCoRD have both.

Plain Python, so that `score` needs no package.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from experiments.metrics import warn


_MARKS = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower-cased, without punctuation and articles, and with single blanks.

    >>> normalised("The  Mill's pub, a bar")
    'mills pub bar'
    """
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_MARKS)).split())


def exact(reference: str, answer: str) -> float:
    """
    >>> exact("the old mill", "Old mill.")
    1.0
    """
    return float(normalised(reference) == normalised(answer))


def f1(reference: str, answer: str) -> float:
    """The harmonic mean of precision and recall of the words, each as often as it is there.

    >>> f1("the Mill pub", "Mill")
    0.6666666666666666
    """
    wanted, given = normalised(reference).split(), normalised(answer).split()
    same = sum((Counter(wanted) & Counter(given)).values())
    return 2 * same / (len(wanted) + len(given)) if same else 0.0


def score(
    references: Sequence[Sequence[str]], texts: Sequence[str], *, tell: Callable[[str], None] = warn
) -> dict[str, float | None]:
    """F1 and exact match of one answer a question, as means.

    Raises:
      ValueError: nothing to score.
    """
    if not texts:
        raise ValueError("there is nothing to score: no answers.")
    pairs = list(zip(references, texts, strict=True))
    return {
        name: sum(max(metric(reference, text) for reference in group) for group, text in pairs) / len(pairs)
        for name, metric in (("F1", f1), ("EM", exact))
    }
