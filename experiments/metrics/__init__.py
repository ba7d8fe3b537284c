"""What a published table's columns are, computed from texts: for E2E the five numbers of the official scorer.

The scorer is tuetschek/e2e-metrics, `measure_scores.py references hypotheses -p`: BLEU and NIST on mteval's
tokens, METEOR, ROUGE-L and CIDEr on those of the Penn Treebank. All but METEOR is plain Python here and needs
neither java nor a package.
"""

import sys
from collections.abc import Callable, Sequence
from itertools import islice

from experiments.metrics import bleu, cider, meteor, mteval, nist, ptb, rouge


def warn(message: str) -> None:
    print(message, file=sys.stderr)


def score_e2e(
    references: Sequence[Sequence[str]], hypotheses: Sequence[str], *, tell: Callable[[str], None] = warn
) -> dict[str, float | None]:
    """The scores of one hypothesis an input. Where METEOR cannot run it is `None`, and `tell` is told why.

    >>> references = [["Cotto is a pub.", "There is a pub, Cotto."], ["It is cheap."]]
    >>> scores = score_e2e(references, ["Cotto is a pub.", "It is cheap."])
    >>> scores["BLEU"], scores["ROUGE_L"]
    (1.0, 1.0)
    """
    if len(references) != len(hypotheses) or not hypotheses or not all(references):
        raise ValueError(
            f"every hypothesis needs its references: got {len(hypotheses)} hypotheses and {len(references)} "
            "groups of references, "
            f"{sum(not group for group in references)} of them empty."
        )
    words = [[mteval.tokenize(reference) for reference in group] for group in references]
    outputs = [mteval.tokenize(hypothesis) for hypothesis in hypotheses]

    # All references in one call, then all hypotheses: a line's tokens can depend on the line after it.
    tokens = iter(ptb.tokenize([reference for group in references for reference in group]))
    treebank = [list(islice(tokens, len(group))) for group in references]
    treebank_outputs = ptb.tokenize(hypotheses)
    return {
        "BLEU": bleu.score(words, outputs),
        "NIST": nist.score(words, outputs),
        "METEOR": _meteor_or_none(treebank, treebank_outputs, tell),
        "ROUGE_L": rouge.score(treebank, treebank_outputs),
        "CIDEr": cider.score(treebank, treebank_outputs),
    }


def _meteor_or_none(
    references: Sequence[Sequence[Sequence[str]]],
    hypotheses: Sequence[Sequence[str]],
    tell: Callable[[str], None],
) -> float | None:
    try:
        return meteor.score(references, hypotheses)
    except meteor.NoMeteorError as error:
        tell(f"METEOR is null: {error}")
        return None
