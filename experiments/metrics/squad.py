"""SQuAD's metrics, as its two scorers have them: evaluate-v1.1.py (Rajpurkar et al. 2016) and
evaluate-v2.0.py (Rajpurkar et al. 2018).

Texts are compared without case, punctuation, articles and further blanks, and a prediction counts as the best
of its references lets it. Version 2.0 has questions without an answer, for which the empty text is right. The
names are the scorers'; shares are fractions here and percent there. Left out: curves of precision and recall.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from experiments.metrics.answers import exact, f1, normalised


Scores = dict[str, float]
References = Mapping[str, Sequence[str]]
Texts = Mapping[str, str]


def f1_or_nothing(reference: str, prediction: str) -> float:
    """`f1` as version 2.0 has it: where one of the two has no word, whether neither has.

    >>> f1_or_nothing("", "the"), f1("", "the")
    (1.0, 0.0)
    """
    empty = [not normalised(text) for text in (reference, prediction)]
    return float(all(empty)) if any(empty) else f1(reference, prediction)


def version_1(references: References, texts: Texts) -> Scores:
    """`exact_match` and `f1` over all questions. One that has no text scores 0.

    >>> version_1({"1": ["a mill", "mill pond"], "2": ["pub"]}, {"1": "Mill"})
    {'exact_match': 0.5, 'f1': 0.5}
    """
    found = {}
    for name, function in (("exact_match", exact), ("f1", f1)):
        each = [
            _best(function, group, texts[question])
            for question, group in references.items()
            if question in texts
        ]
        found[name] = sum(each) / len(references)
    return found


def version_2(
    references: References, texts: Texts, odds: Mapping[str, float] | None = None, threshold: float = 0.0
) -> Scores:
    """`exact`, `f1` and their `total`; the same of the questions that have an answer (`HasAns`) and of those
    that have none (`NoAns`).

    With `odds` a question whose odds are above `threshold` counts as left unanswered, whatever its text. The
    best threshold for either metric follows, and what it gives: `best_exact`, `best_exact_thresh`.

    >>> found = version_2({"1": ["mill"], "2": []}, {"1": "mill", "2": "pub"}, {"1": -1.0, "2": 3.0}, 5.0)
    >>> found["exact"], found["best_exact"], found["best_exact_thresh"]
    (0.5, 1.0, -1.0)

    Args:
      references: of each question; none for one without an answer.
      texts: of each question; "" leaves it unanswered.
      odds: of each question, the higher the less there is an answer.
    """
    golds = {
        question: [text for text in group if normalised(text)] or [""]
        for question, group in references.items()
    }
    raw = {
        name: {question: _best(function, golds[question], texts[question]) for question in references}
        for name, function in (("exact", exact), ("f1", f1_or_nothing))
    }
    unanswered = {question for question in references if odds is not None and odds[question] > threshold}
    parts = {
        "": list(references),
        "HasAns_": [question for question, group in references.items() if group],
        "NoAns_": [question for question, group in references.items() if not group],
    }
    found: Scores = {}
    for part, questions in parts.items():
        if not questions:
            continue
        for name, each in raw.items():
            counted = (
                float(not references[question]) if question in unanswered else each[question]
                for question in questions
            )
            found[part + name] = sum(counted) / len(questions)
        found[f"{part}total"] = len(questions)
    if odds is not None:
        for name, each in raw.items():
            found[f"best_{name}"], found[f"best_{name}_thresh"] = _best_threshold(
                each, references, texts, odds
            )
    return found


def _best(function: Callable[[str, str], float], references: Iterable[str], text: str) -> float:
    return max(function(reference, text) for reference in references)


def _best_threshold(
    each: Mapping[str, float], references: References, texts: Texts, odds: Mapping[str, float]
) -> tuple[float, float]:
    """The best mean that leaving questions of high odds unanswered gives, and the highest odds that are
    answered then; 0.0 where nothing is.
    """
    score = best = float(sum(not group for group in references.values()))
    threshold = 0.0
    for question in sorted(references, key=odds.__getitem__):
        if references[question]:
            score += each[question]
        elif texts[question]:
            score -= 1
        if score > best:
            best, threshold = score, odds[question]
    return best / len(references), threshold
