"""What tasks of candidates share: a question whose candidates are encoded one by one, each in a pair with the
question's text, and whose answer is made of all.

Candidates are right or wrong by themselves, two classes, or are compared by the one output of a head (the
softmax is over a question's candidates, which are equally many). Training takes them one by one, or together
where they are compared. Validation and predictions are always of questions: the likeliest candidate, or each
that is likelier right than wrong.
"""

import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple

from experiments.tasks import classes
from experiments.tasks.classes import Contents, Row, SCORE
from experiments.tasks.splits import Splits


RIGHT = ("0", "1")
"""Whether a candidate is right."""


class Question(NamedTuple):
    """`text`: as people read it; `rows`: its candidates, whose labels are of `RIGHT`; `names`: what an answer
    calls them; `references`: the answers; `each`: whether any number of candidates are right.
    """

    text: str
    rows: tuple[Row, ...]
    names: tuple[str, ...]
    references: tuple[str, ...]
    each: bool = False


def checked(
    questions: list[Question], labels: Sequence[str], name: Any, *, trains: bool = False
) -> list[Question]:
    """`classes.checked`, of the candidates."""
    classes.checked([row for each in questions for row in each.rows], RIGHT, name, trains=trains)
    return questions


def prepare(section: Any, contents: Contents, tokenizer: Any) -> Splits:
    """Examples and test inputs of the questions that `read` found."""
    # Imported here, because `score` asks the tasks too, and needs no package.
    from experiments.tasks.sentences import Asked, Sentence, Sentences

    def asked(questions: Sequence[Question]) -> tuple[Asked, ...]:
        rows = [row for question in questions for row in question.rows]
        encoded = iter(classes.encoded(rows, tokenizer, section.seq_len, Sentence))
        return tuple(
            Asked(
                each.text,
                (),
                each.references,
                None,
                tuple(islice(encoded, len(each.rows))),
                each.names,
                each.each,
                each.rows[0].index,
            )
            for each in questions
        )

    train = contents.rows["train"]
    rows = [row for question in train for row in question.rows]
    weights = classes.weights(section, contents, rows)

    def examples(questions: Sequence[Question]) -> Sentences:
        found = asked(questions)
        right = [[RIGHT.index(row.label or "") for row in each.rows] for each in questions]
        return Sentences(
            [candidate for each in found for candidate in each.candidates],
            [each.index(1) for each in right]
            if contents.numbers
            else [one for each in right for one in each],
            section.seq_len,
            labels=contents.labels,
            pad=getattr(tokenizer, "pad_token_id", None) or 0,
            weights=weights,
            asked=found,
        )

    valid = examples(contents.rows["valid"][: section.max_valid_rows])
    further = {name: asked(questions) for name, questions in contents.further.items()}
    return Splits(examples(train), valid, valid.asked, further)


def odds(outputs: Any) -> list[float]:
    """How likely each candidate is right, of the head's outputs, (candidates, 1 or 2): a number that orders
    them, and for two classes the logarithm of the odds.
    """
    return (outputs[:, -1] - outputs[:, 0] * (outputs.shape[1] > 1)).tolist()


def judge(score: Callable, section: Any, outputs: Any, examples: Any, rows: Any) -> dict[str, float]:
    """The metrics of a head's outputs for these rows of the examples, of the questions that are all there.

    Raises:
      ValueError: none is, because `train.eval_batches` has room for fewer candidates.
    """
    several = examples.rows_each
    places = [row * several + number for row in rows.tolist() for number in range(several)]
    found = dict(zip(places, odds(outputs.reshape(len(places), -1)), strict=True))
    references, texts, start = [], [], 0
    for question in examples.asked:
        numbers = range(start, start + len(question.candidates))
        start = numbers.stop
        if all(number in found for number in numbers):
            references.append(question.references)
            texts.append(question.answer([found[number] for number in numbers]))
    if not texts:
        raise ValueError(
            f"an evaluation has {len(places)} candidates, and the first question has "
            f"{len(examples.asked[0].candidates)}: set a larger `train.eval_batches`, or leave it out."
        )
    return classes.judged(score, references, texts)


def predictor(config: Any, model: Any, tokenizer: Any, prompts: Sequence[Any]) -> Any:
    """An `Answerer`; imported here, because `plan` reads a config before JAX may start."""
    from experiments.tasks.answerer import Answerer

    return Answerer.create(config, model, tokenizer, prompts)


def table(answerer: Any, questions: Sequence[Any], params: Any) -> tuple[list[str], str]:
    """The answers, and a line a candidate: its index, its name, whether it is right and whether it is chosen,
    1 or 0, and its probability, among a question's candidates where they are compared.
    """
    found = answerer.odds(params, questions)
    referenced = any(question.references for question in questions)
    head = ["index", "candidate", *(["reference"] if referenced else []), "prediction", "probability"]
    lines = ["\t".join(head)]
    for question, numbers in zip(questions, found, strict=True):
        chances = _softmax(numbers) if answerer.labels == SCORE else [_logistic(one) for one in numbers]
        for candidate, name, chosen, chance in zip(
            question.candidates, question.names, question.chosen(numbers), chances, strict=True
        ):
            cells = [candidate.index, name, *(candidate.references if referenced else ()), str(int(chosen))]
            lines.append("\t".join([*cells, f"{chance:.6f}"]))
    texts = [question.answer(numbers) for question, numbers in zip(questions, found, strict=True)]
    return texts, "\n".join(lines) + "\n"


def _softmax(numbers: Sequence[float]) -> list[float]:
    parts = [math.exp(one - max(numbers)) for one in numbers]
    return [part / sum(parts) for part in parts]


def _logistic(number: float) -> float:
    return 0.5 * (1 + math.tanh(number / 2))
