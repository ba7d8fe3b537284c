"""Windows over long contexts, the loss of spans, and the answers that logits give."""

import types

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
import squad_rows
from hypothesis import strategies

from experiments.tasks.losses import of_spans
from experiments.tasks.spans import best_spans, predicted
from experiments.tasks.squad_files import Answer, Question
from experiments.tasks.windows import Frame, parts, Window, Windows, windows


transformers = pytest.importorskip("transformers", reason="pip install 'lora_jax[experiments]'")
SIZES = {"seq_len": 40, "stride": 12, "longest": 10}


TOKENIZERS = {"bert": squad_rows.tokenizer, "roberta": squad_rows.roberta_tokenizer}


def asked(text, context, *answers, name="1"):
    return Question(name, text, context, tuple(Answer(each, context.index(each)) for each in answers))


QUESTIONS = [
    asked(question, context, *answers, name=question)
    for context, group in squad_rows.ROWS.items()
    for question, *answers in group
]


@hypothesis.given(*[strategies.integers(1, 40)] * 3)
def test_every_token_is_in_a_window(count, room, stride):
    """Windows begin a stride apart, and only the first one that reaches the end is the last."""
    hypothesis.assume(stride <= room)
    found = parts(count, room, stride)
    assert {place for start, stop in found for place in range(start, stop)} == set(range(count))
    assert [start for start, _ in found] == list(range(0, len(found) * stride, stride))
    assert all(stop - start == room for start, stop in found[:-1]) and found[-1][1] == count
    assert not any(stop == count for _, stop in found[:-1])


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_they_are_those_of_the_tokenizer(kind):
    """Its own way of cutting a pair's second text, where the overlap of two windows is given."""
    tokenizer = TOKENIZERS[kind]()
    every = windows(QUESTIONS, tokenizer, **SIZES)
    examples = Windows(every, QUESTIONS, 40, pad=9, typed=Frame.of(tokenizer).typed)
    for place, question in enumerate(QUESTIONS):
        said = len(tokenizer(question.text, add_special_tokens=False)["input_ids"])
        room = 40 - said - tokenizer.num_special_tokens_to_add(pair=True)
        theirs = tokenizer(
            question.text,
            question.context,
            truncation="only_second",
            max_length=40,
            stride=room - SIZES["stride"],
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        rows = [row for row, window in enumerate(every) if window.question == place]
        assert [every[row].ids.tolist() for row in rows] == theirs["input_ids"]
        assert len(rows) > 1 or question.context == squad_rows.MILL
        batch = examples.batch(np.array(rows), 40)
        for number, row in enumerate(rows):
            context = [place == 1 for place in theirs.sequence_ids(number)]
            offsets = [
                each for each, inside in zip(theirs["offset_mapping"][number], context, strict=True) if inside
            ]
            assert every[row].offsets.tolist() == [list(pair) for pair in offsets]
            assert every[row].first == context.index(True)
            length = len(theirs["input_ids"][number])
            assert (batch["input_ids"][number, length:] == 9).all()
            assert batch["attention_mask"][number].tolist() == [1] * length + [0] * (40 - length)
            if kind == "bert":
                assert batch["token_type_ids"][number, :length].tolist() == theirs["token_type_ids"][number]
    assert ("token_type_ids" in batch) == (kind == "bert")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_an_answer_is_where_its_tokens_are(kind):
    """In each window that has it whole; the others point at the first token."""
    seen = set()
    context = "naïve 🚢 ferry — “Zoë's” 12€"
    more = [asked("what", context, each, name=each) for each in ("naïve", "🚢", "Zoë", "12€", "ferry — “Zoë")]
    questions = [*QUESTIONS, *more]
    for window in windows(questions, TOKENIZERS[kind](), **SIZES):
        question = questions[window.question]
        start, stop = question.answers[0].start, question.answers[0].start + len(question.answers[0].text)
        whole = window.offsets[0, 0] <= start and stop <= window.offsets[-1, 1]
        assert (window.span != (0, 0)) == whole
        if whole:
            first, last = (column - window.first for column in window.span)
            covered = question.context[window.offsets[first, 0] : window.offsets[last, 1]]
            assert question.answers[0].text in covered
            # A token fewer on either side would cut the answer.
            assert window.offsets[first, 1] > start and window.offsets[last, 0] < stop
            assert first == 0 or window.offsets[first - 1, 1] <= start
            assert last == len(window.offsets) - 1 or window.offsets[last + 1, 0] >= stop
            seen.add(question.id)
    assert seen == {question.id for question in questions}


def test_impossible_questions_point_at_the_first_token():
    question = Question("1", "who sold the river", squad_rows.FERRY, (), True)
    found = windows([question], squad_rows.tokenizer(), **SIZES)
    assert len(found) > 1 and {window.span for window in found} == {(0, 0)}


def test_a_long_question_is_cut():
    question = asked("the river " * 30, squad_rows.MILL, "1903")
    (window, *_) = windows([question], squad_rows.tokenizer(), **SIZES)
    assert window.first == 1 + 10 + 1 and len(window.ids) <= 40


@pytest.mark.parametrize(
    "question, sizes, message",
    [
        (
            QUESTIONS[0],
            {"stride": 35},
            r"`data.seq_len` \(40\) leaves 31 tokens for the context beside the 6 of",
        ),
        (Question("1", "when", " ", (), True), {}, "question '1' has a context without any token"),
    ],
)
def test_what_has_no_windows(question, sizes, message):
    with pytest.raises(ValueError, match=message):
        windows([question], squad_rows.tokenizer(), **{**SIZES, **sizes})


def test_a_tokenizer_without_offsets():
    with pytest.raises(
        ValueError, match="the base's tokenizer is a SimpleNamespace, which does not say where"
    ):
        Frame.of(types.SimpleNamespace(is_fast=False))


def test_batches_and_their_fingerprint():
    every = windows(QUESTIONS, squad_rows.tokenizer(), **SIZES)
    examples = Windows(every, QUESTIONS, 40, typed=True)
    batch = examples.batch(np.array([2, -1]))
    assert batch["labels"].tolist() == [list(every[2].span), [0, 0]] and batch["mask"].tolist() == [[1], [0]]
    assert (
        batch["input_ids"].shape == (2, examples.size(np.array([2, -1])))
        and batch["attention_mask"][1].sum() == 1
    )
    other = Windows([every[0]._replace(span=(0, 0)), *every[1:]], QUESTIONS, 40, typed=True)
    assert Windows(every, QUESTIONS, 40, typed=True).fingerprint() == examples.fingerprint()
    assert (
        len({examples.fingerprint(), other.fingerprint(), Windows(every, QUESTIONS, 40).fingerprint()}) == 3
    )


@pytest.mark.pytorch
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_pytorchs(torch, smoothing):
    """Of windows without padding; and padding changes nothing."""
    draw = np.random.default_rng(0)
    logits, labels = draw.normal(size=(4, 7, 2)).astype(np.float32), draw.integers(0, 7, (4, 2))
    ends = [
        torch.nn.functional.cross_entropy(
            torch.tensor(logits[:, :, end]), torch.tensor(labels[:, end]), label_smoothing=smoothing
        )
        for end in (0, 1)
    ]
    wide = np.concatenate([logits, np.full((4, 3, 2), 200, np.float32)], 1)
    for each in (logits, wide):
        piece = {
            "input_ids": np.zeros(each.shape[:2], np.int32),
            "attention_mask": (np.arange(each.shape[1]) < 7).astype(np.int32)[None].repeat(4, 0),
            "labels": jnp.asarray(labels, jnp.int32),
            "mask": jnp.ones((4, 1)),
        }
        found, counted = of_spans(lambda ids, attention_mask, each=each: jnp.asarray(each), piece, smoothing)
        assert float((found * counted).mean()) == pytest.approx(float(sum(ends) / 2), rel=1e-5)


def window_of(count, first=3):
    """A window over `count` words of one letter, with a blank between them."""
    offsets = np.array([[2 * place, 2 * place + 1] for place in range(count)])
    return Window(0, np.zeros(first + count + 1, np.int32), first, offsets, (0, 0))


def letters(count):
    return " ".join("abcdefghijklmnop"[:count])


@pytest.mark.parametrize("count, most, longest", [(1, 3, 4), (6, 5, 3), (6, 100, 3), (9, 4, 30), (7, 1, 1)])
def test_the_best_spans_are_the_best_of_all(count, most, longest):
    """No span begins in the question, ends before it begins, is too long or is of padding, however high."""
    window, context = window_of(count), letters(count)
    logits = np.random.default_rng(count).normal(size=(3 + count + 1 + 4, 2)).astype(np.float32)
    logits[:3], logits[3 + count :] = 50, 90
    every = sorted(
        (
            -(float(logits[3 + first, 0]) + float(logits[3 + last, 1])),
            context[2 * first : 2 * last + 1],
        )
        for first in range(count)
        for last in range(first, min(first + longest, count))
    )
    found = best_spans(logits, window, context, most=most, longest=longest)
    assert [span.text for span in found] == [text for _, text in every[:most]]
    np.testing.assert_allclose(
        [-span.score for span in found], [score for score, _ in every[:most]], rtol=1e-6
    )


def section(threshold=0.0, most=4, longest=3):
    return types.SimpleNamespace(n_best_size=most, max_answer_length=longest, null_threshold=threshold)


def logits_of(window, nothing, **words):
    """-9 but for the first token, and for words as (start, end)."""
    found = np.full((len(window.ids), 2), -9, np.float32)
    found[0] = nothing / 2
    for word, pair in words.items():
        found[window.first + "abcdefghijklmnop".index(word)] = pair
    return found


def test_the_windows_of_a_question_are_compared():
    """The same text of two windows is one answer, by its better score. No answer is by its lowest."""
    one, two, question = window_of(5), window_of(5), Question("1", "?", letters(5), (), True)
    pair = [logits_of(one, 8.0, b=(3, 3)), logits_of(two, 2.0, b=(2, 2), e=(2.5, 2.5))]
    found = predicted(pair, [one, two], question, section(), nullable=True)
    assert [(span.text, span.score) for span in found.n_best[:3]] == [("b", 6), ("e", 5), ("", 2)]
    assert (found.text, found.best, found.odds) == ("b", "b", -4)
    scores = np.exp([span.score for span in found.n_best])
    np.testing.assert_allclose(found.probabilities(), scores / scores.sum(), rtol=1e-6)
    plain = predicted(pair, [one, two], question, section(), nullable=False)
    assert "" not in [span.text for span in plain.n_best] and plain.odds is None and len(plain.n_best) == 4


@pytest.mark.parametrize("threshold, text", [(1.0, ""), (1.99, ""), (2.0, "c"), (5.0, "c")])
def test_no_answer_is_given_above_the_threshold(threshold, text):
    """It scores 2 more than the best span."""
    window, question = window_of(4), Question("1", "?", letters(4), (), True)
    logits = [logits_of(window, 6.0, c=(2, 2))]
    found = predicted(logits, [window], question, section(threshold), nullable=True)
    assert (found.text, found.best, found.odds) == (text, "c", 2)
    assert (
        found.n_best[0].text == ""
        and predicted(logits, [window], question, section(), nullable=False).text == "c"
    )


def test_no_answer_is_listed_when_it_is_the_last():
    window, question = window_of(6), Question("1", "?", letters(6), (), True)
    found = predicted([logits_of(window, -99.0)], [window], question, section(most=2), nullable=True)
    assert len(found.n_best) == 3 and found.n_best[-1].text == ""
