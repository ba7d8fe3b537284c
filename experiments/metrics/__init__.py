"""What a published table's columns are, computed from texts: for E2E the five numbers of the official scorer,
for WebNLG and DART the three that LoRA's authors give.

E2E's scorer is tuetschek/e2e-metrics, `measure_scores.py references hypotheses -p`: BLEU and NIST on mteval's
tokens, METEOR, ROUGE-L and CIDEr on those of the Penn Treebank. WebNLG and DART have BLEU of Moses'
multi-bleu, METEOR, and TER. All but METEOR is plain Python here and needs neither java nor a package.
"""

import sys
from collections.abc import Callable, Sequence
from itertools import islice

from experiments.metrics import bleu, cider, meteor, mteval, multi_bleu, nist, ptb, rouge, ter
from experiments.metrics.ngrams import Tokens


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
    # Of several files, an empty line is no reference of this scorer's.
    references = [[reference for reference in group if reference] for group in references]
    _check(references, hypotheses)
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


def score_tokens(
    references: Sequence[Sequence[Tokens]],
    hypotheses: Sequence[Tokens],
    *,
    tell: Callable[[str], None] = warn,
) -> dict[str, float | None]:
    """BLEU, METEOR and TER of one hypothesis an input, all of tokens. Where METEOR cannot run it is `None`,
    and `tell` is told why.

    >>> group = ["cotto is a pub .".split(), "there is a pub , cotto .".split()]
    >>> scores = score_tokens([group], ["cotto is a pub .".split()], tell=lambda reason: None)
    >>> scores["BLEU"], scores["TER"]
    (1.0, 0.0)

    A reference without tokens is what an empty line of a reference file is, where an input has fewer than
    another. multi-bleu counts it, and may find it the nearest to a short hypothesis; the others leave it out.
    Inputs with fewer references get such ones here, so that the form of the files changes nothing.
    """
    most = max(map(len, references), default=0)
    columns = [[*group, *([[]] * (most - len(group)))] for group in references]
    spoken = [[reference for reference in group if reference] for group in references]
    _check(spoken, hypotheses)
    return {
        "BLEU": multi_bleu.score(columns, hypotheses),
        "METEOR": _meteor_or_none(spoken, hypotheses, tell),
        "TER": ter.score(spoken, hypotheses),
    }


def _check(references: Sequence[Sequence[object]], hypotheses: Sequence[object]) -> None:
    if len(references) != len(hypotheses) or not hypotheses or not all(references):
        raise ValueError(
            f"every hypothesis needs its references: got {len(hypotheses)} hypotheses and {len(references)} "
            "groups of references, "
            f"{sum(not group for group in references)} of them empty."
        )


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
