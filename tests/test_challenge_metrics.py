"""The metrics of WebNLG and DART, against other implementations' numbers and small cases by hand; and `score`
with the challenges' files.
"""

import json
import math

import pytest
from hypothesis import given, strategies as st

from experiments.command_line import main
from experiments.metrics import multi_bleu, score_tokens, ter, webnlg


_TOKENS = st.lists(st.sampled_from("abcd"), max_size=8)
_REFERENCES = [
    [
        "the mill is a cheap pub near cotto",
        "near cotto there is a cheap pub , the mill",
        "a cheap pub",
    ],
    [
        "cotto serves english food by the river",
        "by the river is cotto with english food",
        "english food at cotto",
    ],
]
_HYPOTHESES = [
    "the mill is a pub near cotto , cheap",
    "cotto is by the river and serves english food",
]


def _words(texts):
    return [text.split() for text in texts]


# -- BLEU ----------------------------------------------------------------------------------------------------


def test_bleu_is_that_of_another_implementation():
    """The number is sacreBLEU's, with its tokenizer and its smoothing off."""
    found = multi_bleu.score([_words(group) for group in _REFERENCES], _words(_HYPOTHESES))
    assert 100 * found == pytest.approx(35.46009676741759, rel=1e-12)


def test_an_empty_line_is_the_nearest_reference_of_a_short_hypothesis():
    """multi-bleu reads the empty line of a reference file as a reference of no tokens."""
    long = [list("abcdefghij")]
    short = [["w", "x", "y", "z"]]
    hypotheses = [list("abcdefghij"), ["v"]]
    precision = (10 / 11) ** (1 / 4)  # of one token; all the others' n-grams match
    assert multi_bleu.score([long, [*short, []]], hypotheses) == pytest.approx(precision, rel=1e-12)
    brevity = math.exp(1 - 14 / 11)
    assert multi_bleu.score([long, short], hypotheses) == pytest.approx(brevity * precision, rel=1e-12)


@pytest.mark.parametrize("hypothesis", [[], ["z"], list("az"), list("abz"), list("abcz")])
def test_bleu_without_a_match_is_zero(hypothesis):
    assert multi_bleu.score([[list("abcde")]], [hypothesis]) == 0.0


# -- TER -----------------------------------------------------------------------------------------------------


# The edits are those of pyter; the first is the example of Snover et al. In the last two another choice among
# shifts that save the same would end with more or fewer.
@pytest.mark.parametrize(
    "hypothesis, reference, edits",
    [
        (
            "THIS WEEK THE SAUDIS denied information published in the new york times",
            "SAUDI ARABIA denied THIS WEEK information published in the AMERICAN new york times",
            4,
        ),
        ("d e f a b c", "a b c d e f", 1),
        ("b a d c f e", "a b c d e f", 3),
        ("a b c d", "d c b a", 3),
        ("", "a b", 2),
        ("a a b b a", "b a a b", 2),
        ("x y", "a", 2),
        (
            "the mill in the city centre , near cotto , is a cheap pub",
            "near cotto in the city centre , the mill is a pub , and cheap",
            8,
        ),
        ("a b c a b d a b e", "a b e a b d a b c f", 3),
        ("c b a c b a", "a b c b a c b", 2),
        ("c b c b d a a c", "c c d a a b c b", 2),
        ("a d b b a c d c", "a b a a b d c c", 3),
    ],
)
def test_edits_are_those_of_pyter(hypothesis, reference, edits):
    found = ter.rate(reference.split(), hypothesis.split())
    assert found == pytest.approx(edits / len(reference.split()), rel=1e-12)


def _levenshtein(left, right):
    row = list(range(len(right) + 1))
    for number, one in enumerate(left, 1):
        before, row = row, [number]
        for place, other in enumerate(right, 1):
            row.append(min(before[place] + 1, row[-1] + 1, before[place - 1] + (one != other)))
    return row[-1]


@given(_TOKENS, _TOKENS.filter(bool))
def test_a_shift_only_saves(hypothesis, reference):
    """Never more edits than without shifts; at least the difference in length; none exactly where they are
    the same.
    """
    edits = round(ter.rate(reference, hypothesis) * len(reference))
    assert abs(len(hypothesis) - len(reference)) <= edits <= _levenshtein(hypothesis, reference)
    assert (edits == 0) == (hypothesis == reference)


@given(_TOKENS, st.lists(st.sampled_from("abcd"), min_size=1, max_size=80))
def test_the_distance_is_that_of_the_whole_table(hypothesis, reference):
    """In one number of more bits than a machine has, too."""
    found = ter._distance(hypothesis, ter._places(reference), len(reference))
    assert found == _levenshtein(hypothesis, reference)


def test_a_corpus_has_the_mean_of_the_best_references():
    references = [["a b c d".split(), "a b".split(), []], ["x".split()]]
    assert ter.score(references, ["a b c".split(), "y z".split()]) == pytest.approx((1 / 4 + 2) / 2)


# -- tokens --------------------------------------------------------------------------------------------------


# Each right side is what the challenge's script makes of the text, with unidecode.
@pytest.mark.parametrize(
    "text, tokens",
    [
        ("Adolfo Suárez Madrid–Barajas Airport", "adolfo suarez madrid - barajas airport"),
        ("It's 12.5 metres (41 ft).", "it ' s 12 . 5 metres ( 41 ft ) ."),
        ("snake_case stays,  blanks do not", "snake_case stays , blanks do not"),
        ("Æthelred’s “Øl” — ½ ß", 'aethelred \' s " ol " - - 1 / 2 ss'),
        ("Ħal Ġdid, Łódź, İzmir, ılgaz, £20, 3°", "hal gdid , lodz , izmir , ilgaz , ps20 , 3deg"),
        ("", ""),
    ],
)
def test_tokens_of_webnlg(text, tokens):
    assert webnlg.tokenize(text) == tokens.split()
    assert webnlg.tokenize(" ".join(webnlg.tokenize(text))) == tokens.split(), (
        "files may be tokenised already"
    )


# -- the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setenv("PATH", "")


def _write(directory, **files):
    for name, lines in files.items():
        (directory / name).write_text("".join(line + "\n" for line in lines), "utf-8")


def _score(capsys, *arguments):
    code = main(["score", *map(str, arguments)])
    said = capsys.readouterr()
    return json.loads(said.out) if code == 0 else said.err


def test_scores_of_either_form_of_files(tmp_path, capsys, no_java):
    columns = dict(zip(("r0", "r1", "r2"), zip(*_REFERENCES, strict=True), strict=True))
    grouped = "\n\n".join("\n".join(group) for group in _REFERENCES).split("\n")
    _write(tmp_path, **columns, refs=grouped, hyps=_HYPOTHESES)
    hyps, files = tmp_path / "hyps", [tmp_path / name for name in columns]
    for task in ("webnlg", "dart"):
        beside = _score(capsys, task, "--refs", *files, "--hyps", hyps)
        assert list(beside) == ["BLEU", "METEOR", "TER"] and beside["METEOR"] is None
        assert beside["BLEU"] == pytest.approx(0.3546009676741759, rel=1e-12)
        assert beside == _score(capsys, task, "--refs", tmp_path / "refs", "--hyps", hyps)


def test_an_input_with_fewer_references_has_empty_ones(tmp_path, capsys, no_java):
    """In either form: the empty one is the nearest in length to the second text."""
    _write(tmp_path, r0=["a b c d e", "w x y z"], r1=["a b c d", ""], hyps=["a b c d e", "v"])
    _write(tmp_path, refs=["a b c d e", "a b c d", "", "w x y z"])
    found = [
        _score(capsys, "dart", "--refs", *(tmp_path / name for name in names), "--hyps", tmp_path / "hyps")
        for names in (("r0", "r1"), ("refs",))
    ]
    assert found[0] == found[1] and found[0]["BLEU"] == pytest.approx((5 / 6) ** (1 / 4), rel=1e-12)


def test_webnlg_is_lower_cased_and_dart_is_as_it_is(tmp_path, capsys, no_java):
    _write(tmp_path, refs=["Cotto is a café-bar ."], hyps=["cotto is a cafe - bar ."])
    files = ("--refs", tmp_path / "refs", "--hyps", tmp_path / "hyps")
    assert _score(capsys, "webnlg", *files)["BLEU"] == 1.0
    assert _score(capsys, "dart", *files)["TER"] == pytest.approx(4 / 5)


def test_a_part_of_the_test_set(tmp_path, capsys, no_java):
    """The first 971 inputs are seen. Files of a part alone are taken as they are."""
    same, other = ["it is a pub ."] * 971, ["it is a pub , too ."] * 891
    _write(tmp_path, refs=[*same, *same[:891]], empty=[""] * 1862, hyps=[*same, *other])
    files = ("--refs", tmp_path / "refs", tmp_path / "empty", "--hyps", tmp_path / "hyps")
    found = {part: _score(capsys, "webnlg", *files, "--filter", part) for part in ("all", "seen", "unseen")}
    assert found["all"] == _score(capsys, "webnlg", *files)
    assert found["seen"]["TER"] == 0 and found["unseen"]["TER"] == pytest.approx(2 / 5)
    assert found["seen"]["BLEU"] == 1 > found["all"]["BLEU"] > found["unseen"]["BLEU"]
    _write(tmp_path, refs=same[:891], hyps=other)
    alone = ("--refs", tmp_path / "refs", "--hyps", tmp_path / "hyps", "--filter", "unseen")
    assert _score(capsys, "webnlg", *alone) == found["unseen"]


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["webnlg", "--filter", "old"], "`--filter` must be one of all, seen, unseen, got `old` for webnlg"),
        (
            ["webnlg", "--filter", "seen"],
            "`--filter` is seen, and the files have 2 inputs: webnlg's test set has 1",
        ),
        (["dart", "--filter", "seen"], "`--filter` is of webnlg and glue/mnli, got `seen` for dart"),
    ],
)
def test_parts_that_there_are_not(arguments, error, tmp_path, capsys):
    _write(tmp_path, refs=["a", "b"], hyps=["a", "b"])
    found = _score(capsys, *arguments, "--refs", tmp_path / "refs", "--hyps", tmp_path / "hyps")
    assert found.startswith(f"error: {error}") and found.count("\n") == 1


def test_reference_files_of_which_none_has_an_input(tmp_path, capsys):
    _write(tmp_path, r0=["a", ""], r1=["b"], hyps=["a", "b"])
    found = _score(capsys, "dart", "--refs", tmp_path / "r0", tmp_path / "r1", "--hyps", tmp_path / "hyps")
    assert "r0` line 2: input 2 has no reference in any file" in found
    _write(tmp_path, r0=["a", "b", "c"])
    found = _score(capsys, "dart", "--refs", tmp_path / "r0", tmp_path / "r1", "--hyps", tmp_path / "hyps")
    assert "references for 3 inputs and" in found and "references need a line an input in each file" in found


def test_every_hypothesis_needs_its_references():
    with pytest.raises(ValueError, match="got 1 hypotheses and 1 groups of references, 1 of them empty"):
        score_tokens([[[]]], [["a"]])


@pytest.mark.slow
def test_meteor_of_tokens():
    """An exact text has METEOR 1."""
    group = ["cotto is a pub .".split(), [], "there is a pub , cotto .".split()]
    found = score_tokens([group], ["cotto is a pub .".split()])["METEOR"]
    if found is None:
        pytest.skip("METEOR needs java and pip install '.[meteor]'")
    assert found == pytest.approx(1.0)
