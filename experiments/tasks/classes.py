"""What tasks of labels share: rows of one text or two with a label, as examples and as test inputs, and the
files of predictions.

A text is encoded as the base's tokenizer encodes one, or a pair, with its special tokens; what is longer than
`data.seq_len` is cut, the longer text of a pair first. A score, such as STS-B's, is a label that is a number:
the head then has one output.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments.metrics import classes as metrics, warn
from experiments.tasks.splits import Splits


Weights = tuple[float, ...] | None


class Row(NamedTuple):
    """`number`: of its line; `index`: what the file calls it; `part`: of the test set."""

    first: str
    second: str | None
    label: str | None
    number: int
    index: str
    part: str | None = None


class Contents(NamedTuple):
    """`labels`: one, "score", where they are numbers. `rows`: of the splits train, valid and test; without
    test, the inputs of valid are predicted and scored. `further`: without labels, by the name of their file.
    """

    labels: tuple[str, ...]
    rows: dict[str, list[Any]]
    further: dict[str, list[Any]]

    @property
    def numbers(self) -> bool:
        return self.labels == SCORE


SCORE = ("score",)


def score(
    names: Sequence[str],
    references: Sequence[Sequence[str]],
    texts: Sequence[str],
    *,
    tell: Callable[[str], None] = warn,
) -> dict[str, float | None]:
    """The metrics of one label, or one number, an input."""
    return metrics.of(names, [group[0] for group in references], texts)


def labels_of(section: Any, contents: Contents) -> tuple[str, ...]:
    """The outputs of the head."""
    return contents.labels


def mean_score(examples: Any) -> float:
    """Where the bias of a head of one score begins.

    From zero, the first steps move every output towards the mean. An adapter does so by making what the head
    reads the same for all inputs. On STS-B LoRA needed an epoch to undo that.
    """
    return float(examples.targets.mean())


def checked(rows: list[Row], labels: Sequence[str], name: Any, *, trains: bool = False) -> list[Row]:
    """The rows of a split, which are some, with labels that are known, and in training some of each.

    Raises:
      ValueError: it is not so; the file and the row are named.
    """
    if not rows:
        raise ValueError(f"`{name}` is empty: it has no row with a text.")
    numbers = tuple(labels) == SCORE
    for row in rows:
        if numbers and not _is_number(row.label):
            raise ValueError(f"`{name}` row {row.number}: the score is {row.label!r}, and must be a number.")
        if not numbers:
            known(row.label, labels, f"`{name}` row {row.number}")
    missing = [] if numbers or not trains else [label for label in labels if label not in _counts(rows)]
    if missing:
        raise ValueError(
            f"`{name}` has no row with the label {missing[0]} among the {len(rows):,} that train: a head "
            "cannot learn it. Take more rows (`data.max_rows`), or name the labels that there are."
        )
    return rows


def known(label: Any, labels: Sequence[str], place: str) -> Any:
    """The label, or `ValueError` where it is none of them."""
    if label not in labels:
        raise ValueError(f"{place}: the label is {label!r}, and must be one of {', '.join(labels)}.")
    return label


def _counts(rows: Sequence[Row]) -> Counter:
    return Counter(row.label for row in rows)


def word(label: Any, labels: Sequence[str]) -> str:
    """A label as `datasets` or JSON has it, in the word that it has here.

    >>> word(1, ("no", "yes")), word(True, ("false", "true")), word("yes", ("no", "yes")), word(2.5, SCORE)
    ('yes', 'true', 'yes', '2.5')
    """
    if tuple(labels) == SCORE:
        return str(label)
    return labels[label] if isinstance(label, int) and 0 <= label < len(labels) else str(label)


def _is_number(text: str | None) -> bool:
    try:
        return abs(float(text or "")) < float("inf")
    except ValueError:
        return False


def weights(section: Any, contents: Contents, rows: Sequence[Row]) -> Weights:
    """The weight of each class in the loss. "balanced": rows / (classes · rows of the class)."""
    said = section.class_weights
    if said is None:
        return None
    if contents.numbers:
        raise ValueError(
            f"`data.class_weights` are of classes, and {section.task} has a score: leave them out."
        )
    if said == "balanced":
        counts = _counts(rows)
        return tuple(len(rows) / (len(contents.labels) * counts[label]) for label in contents.labels)
    if len(said) != len(contents.labels):
        raise ValueError(
            f"`data.class_weights` has {len(said)} numbers, and the labels are {len(contents.labels)}: "
            f"{', '.join(contents.labels)}."
        )
    if not all(0 < weight < float("inf") for weight in said):
        raise ValueError(f"`data.class_weights` must be positive numbers, got {list(said)}.")
    return tuple(said)


def prepare(section: Any, contents: Contents, tokenizer: Any) -> Splits:
    """Examples and test inputs of the rows that `read` found."""
    # Imported here, because `score` asks the tasks too, and needs no package.
    from experiments.tasks.sentences import Sentence, Sentences

    def inputs(rows: Sequence[Row]) -> tuple[Sentence, ...]:
        return encoded(rows, tokenizer, section.seq_len, Sentence)

    train = contents.rows["train"][: section.max_rows]
    valid = contents.rows["valid"][: section.max_valid_rows]
    chosen = weights(section, contents, train)

    def examples(rows: Sequence[Row]) -> Sentences:
        target = (
            (lambda row: float(row.label))
            if contents.numbers
            else (lambda row: contents.labels.index(row.label))
        )
        pad = getattr(tokenizer, "pad_token_id", None) or 0
        return Sentences(
            inputs(rows),
            [target(row) for row in rows],
            section.seq_len,
            labels=contents.labels,
            pad=pad,
            weights=chosen,
        )

    validation = examples(valid)
    prompts = inputs(contents.rows["test"]) if "test" in contents.rows else validation.inputs
    further = {name: inputs(rows) for name, rows in contents.further.items()}
    return Splits(examples(train), validation, prompts, further)


def encoded(rows: Sequence[Row], tokenizer: Any, seq_len: int, kind: Any) -> tuple[Any, ...]:
    if not rows:
        return ()
    texts = [[row.first for row in rows]]
    if rows[0].second is not None:
        texts.append([row.second for row in rows])
    found = tokenizer(*texts, truncation=True, max_length=seq_len, return_attention_mask=False)
    types = found.get("token_type_ids") or [None] * len(rows)
    return tuple(
        kind(
            row.first if row.second is None else f"{row.first} | {row.second}",
            tuple(ids),
            () if row.label is None else (row.label,),
            row.part,
            None if own is None else tuple(own),
            row.index,
        )
        for row, ids, own in zip(rows, found["input_ids"], types, strict=True)
    )


def judge(score: Callable, section: Any, outputs: Any, examples: Any, rows: Any) -> dict[str, float]:
    """The metrics of a head's outputs, (rows, labels), by the references of these rows of the examples."""
    texts = [text_of(row, examples.labels) for row in outputs.tolist()]
    return judged(score, [examples.inputs[row].references for row in rows], texts)


def judged(score: Callable, references: Sequence[Sequence[str]], texts: Sequence[str]) -> dict[str, float]:
    """The metrics that can be computed."""
    found = score(references, texts, tell=lambda _: None)
    return {name: value for name, value in found.items() if value is not None}


def text_of(outputs: Sequence[float], labels: Sequence[str]) -> str:
    """The likeliest label, or the score.

    >>> text_of([0.1, 2.0], ["no", "yes"]), text_of([3.25], ["score"])
    ('yes', '3.25')
    """
    if len(outputs) == 1:
        return repr(float(outputs[0]))
    return labels[max(range(len(outputs)), key=outputs.__getitem__)]


def predictor(config: Any, model: Any, tokenizer: Any, prompts: Sequence[Any]) -> Any:
    """A `Classifier`; imported here, because `plan` reads a config before JAX may start."""
    from experiments.tasks.classifier import Classifier

    return Classifier.create(config, model, tokenizer, prompts)


def table(classifier: Any, inputs: Sequence[Any], params: Any) -> tuple[list[str], str]:
    """The predictions, and a line an input: its index, reference and prediction, and the probability of each
    label.
    """
    found = classifier.probabilities(params, inputs)
    labels = classifier.labels
    texts = [text_of(row, labels) for row in found.tolist()]
    referenced = any(each.references for each in inputs)
    head = ["index", *(["reference"] if referenced else []), "prediction"]
    head += [] if labels == SCORE else labels
    lines = ["\t".join(head)]
    for each, text, row in zip(inputs, texts, found.tolist(), strict=True):
        cells = [each.index, *(each.references if referenced else ()), text]
        lines.append("\t".join([*cells, *([] if labels == SCORE else (f"{value:.6f}" for value in row))]))
    return texts, "\n".join(lines) + "\n"


def files(
    predictor: Any,
    splits: Splits,
    params: Any,
    *,
    table: Callable = table,
    submission: Callable[..., dict[str, str]] | None = None,
) -> dict[str, str]:
    """`probabilities.tsv`, the predictions with their probabilities (`table`); `further/`, the same of inputs
    without references; and with `submission(name, labels, inputs, texts)` what a benchmark's site takes of
    these, in `submission/`.
    """
    found = {"probabilities.tsv": table(predictor, predictor.prompts, params)[1]}
    for name, inputs in splits.further.items():
        texts, found[f"further/{name}.tsv"] = table(predictor, inputs, params)
        if submission is not None:
            written = submission(name, predictor.labels, inputs, texts)
            found |= {f"submission/{file}": content for file, content in written.items()}
    return found
