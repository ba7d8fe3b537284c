"""SQuAD's metrics: cases by hand, and the search for a threshold against all thresholds."""

import numpy as np
import pytest

from experiments.metrics import squad


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The mill", "mill"),
        ("  an   Old\tmill\n", "old mill"),
        ("theatre, anthem and a-b", "theatre anthem and ab"),
        ("the", ""),
        ("U.S. $5,000", "us 5000"),
        ("mill's", "mills"),
        # Punctuation goes before articles, so that these become one.
        ("a-n t.h.e", ""),
        # Only ASCII's marks are punctuation; a dash of another kind leaves a word of its own.
        ("“the” – ÉTÉ", "“ ” – été"),
        ("a\u00a0mill", "mill"),
        ("İstanbul", "i\u0307stanbul"),
        ("...", ""),
    ],
)
def test_normalisation(text, expected):
    assert squad.normalised(text) == expected


@pytest.mark.parametrize(
    "reference, prediction, exact, f1",
    [
        ("the old mill", "Old mill!", 1, 1),
        ("old mill", "the old mill pond", 0, 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        ("mill mill pond", "mill", 0, 2 * 1 * (1 / 3) / (1 + 1 / 3)),
        ("pub", "mill", 0, 0),
        ("pub", "", 0, 0),
        ("", "pub", 0, 0),
    ],
)
def test_one_pair(reference, prediction, exact, f1):
    assert squad.exact(reference, prediction) == exact
    assert squad.f1(reference, prediction) == pytest.approx(f1)
    assert squad.f1_or_nothing(reference, prediction) == pytest.approx(f1)


def test_texts_without_a_word():
    """Version 1.1 finds no word in common, and version 2.0 two equal texts."""
    for pair in (("", ""), ("a", "the"), ("!", "")):
        assert squad.exact(*pair) == 1 and squad.f1(*pair) == 0 and squad.f1_or_nothing(*pair) == 1


def test_version_1_takes_the_best_reference():
    references = {"1": ["seven", "seven old crowns"], "2": ["pub"], "3": ["1903"], "4": ["A"]}
    found = squad.version_1(references, {"1": "seven crowns", "2": "the pub", "4": "a"})
    assert list(found) == ["exact_match", "f1"]
    # The fourth is equal, and has no word.
    assert found == {"exact_match": 2 / 4, "f1": pytest.approx((0.8 + 1 + 0 + 0) / 4)}


def test_version_2_by_hand():
    references = {"1": ["seven crowns", "a"], "2": [], "3": ["pub"], "4": []}
    texts = {"1": "crowns", "2": "", "3": "", "4": "mill"}
    assert squad.version_2(references, texts) == {
        "exact": 1 / 4,
        "f1": pytest.approx((2 / 3 + 1 + 0 + 0) / 4),
        "total": 4,
        "HasAns_exact": 0,
        "HasAns_f1": pytest.approx(1 / 3),
        "HasAns_total": 2,
        "NoAns_exact": 1 / 2,
        "NoAns_f1": 1 / 2,
        "NoAns_total": 2,
    }
    # A reference without a word is none that could be met.
    assert squad.version_2({"1": ["pub", "the"]}, {"1": "a"})["exact"] == 0
    assert not any("NoAns" in name for name in squad.version_2({"1": ["pub"]}, {"1": "pub"}))


def drawn(seed):
    """Questions of which some are answered rightly, some wrongly and some have no answer, with odds."""
    draw = np.random.default_rng(seed)
    names = [str(number) for number in range(12)]
    references = {name: [] if draw.random() < 0.4 else ["old mill"] for name in names}
    texts = {name: str(draw.choice(["old mill", "mill", "pub"])) for name in names}
    odds = dict(zip(names, draw.permutation(12) / 2.0 - 3, strict=True))
    return references, texts, odds


@pytest.mark.parametrize("seed", range(4))
def test_above_the_threshold_is_the_empty_text(seed):
    references, texts, odds = drawn(seed)
    for threshold in (-9.0, -1.0, 0.25, 9.0):
        found = squad.version_2(references, texts, odds, threshold)
        given = {name: "" if odds[name] > threshold else text for name, text in texts.items()}
        expected = squad.version_2(references, given)
        assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("seed", range(4))
def test_the_best_threshold_is_the_best_of_all(seed):
    references, texts, odds = drawn(seed)
    every = [-99.0, *odds.values()]
    found = squad.version_2(references, texts, odds)
    for name in ("exact", "f1"):
        scores = [squad.version_2(references, texts, odds, threshold)[name] for threshold in every]
        best = found[f"best_{name}"]
        assert best == pytest.approx(max(scores)) and best >= found[name]
        at = squad.version_2(references, texts, odds, found[f"best_{name}_thresh"])[name]
        assert at == pytest.approx(best) or best == sum(not group for group in references.values()) / 12


def test_a_threshold_where_nothing_is_worth_answering():
    """The scorer's own is 0.0 then."""
    found = squad.version_2({"1": [], "2": ["pub"]}, {"1": "mill", "2": "mill"}, {"1": -5.0, "2": -4.0}, -3.0)
    assert (found["exact"], found["best_exact"], found["best_exact_thresh"]) == (0, 1 / 2, 0.0)
