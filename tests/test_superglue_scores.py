"""SuperGLUE: its metrics, and the files that the benchmark's site takes."""

import json

import numpy as np
import pytest
import superglue_files
from test_superglue import NAMES, section, Words

from experiments import tasks
from experiments.command_line import main
from experiments.metrics import answers, classes as metrics
from experiments.tasks import questions, superglue
from experiments.tasks.classes import SCORE
from experiments.tasks.sentences import Asked, Sentence
from experiments.tasks.splits import Splits


def test_macro_f1_is_the_mean_of_each_label():
    """From the counts of a confusion matrix."""
    one, other = np.random.default_rng(3).integers(0, 3, (2, 90))
    counts = np.zeros((3, 3))
    np.add.at(counts, (one, other), 1)
    expected = np.mean(2 * np.diag(counts) / (counts.sum(0) + counts.sum(1)))
    words = [[superglue_files.COMMITMENTS[value] for value in array] for array in (one, other)]
    found = tasks.TASKS["superglue/cb"].score([[word] for word in words[0]], words[1])
    assert found == {"accuracy": pytest.approx(np.trace(counts) / 90), "macro F1": pytest.approx(expected)}


def test_metrics_of_multirc():
    """F1 of the answers of all questions together, and the share of questions without a fault."""
    draw = np.random.default_rng(4)
    sizes = draw.integers(1, 6, 40)
    one, other = draw.integers(0, 2, (2, sizes.sum()))
    other = np.where(draw.random(len(one)) < 0.8, one, other)
    apart = [np.split(array, np.cumsum(sizes)[:-1]) for array in (one, other)]
    texts = [[" ".join(map(str, part)) for part in parts] for parts in apart]
    found = tasks.TASKS["superglue/multirc"].score([[text] for text in texts[0]], texts[1])
    precision, recall = ((one & other).sum() / array.sum() for array in (other, one))
    assert found == {
        "F1a": pytest.approx(2 * precision * recall / (precision + recall)),
        "EM": pytest.approx(np.mean([(a == b).all() for a, b in zip(*apart, strict=True)])),
    }
    assert 0.2 < found["EM"] < found["F1a"] < 0.98
    with pytest.raises(ValueError, match="prediction 2 has 1 labels, and question 2 has 3 answers"):
        metrics.answers_f1(["1", "0 1 0"], ["1", "0"])


@pytest.mark.parametrize(
    "references, answer, f1, exact",
    [
        (["The Mill"], "mill", 1.0, 1.0),
        (["the mill, again"], "The Mill's again", 0.5, 0.0),
        (["the pub", "an old mill of the town"], "old mill", 2 * 1.0 * 0.5 / 1.5, 0.0),
        (["guest guest cook"], "guest guest guest", 2 / 3, 0.0),
        (["cook"], "the", 0.0, 0.0),
    ],
)
def test_metrics_of_record(references, answer, f1, exact):
    """The best over the right answers; by hand, of precision and recall of the words."""
    assert answers.score([references], [answer]) == {"F1": pytest.approx(f1), "EM": exact}
    both = answers.score([references, ["pub"]], [answer, "pub"])
    assert both == {"F1": pytest.approx((f1 + 1) / 2), "EM": (exact + 1) / 2}


@pytest.mark.parametrize(
    "name, references, texts, expected",
    [
        ("cb", "neutral\n\nneutral\n", "neutral\nentailment\n", {"accuracy": 0.5, "macro F1": 1 / 3}),
        ("multirc", "1 0\n\n0 1 1\n", "1 0\n1 1 1\n", {"F1a": 6 / 7, "EM": 0.5}),
        ("record", "the mill\nthe old mill\n\npub\n", "Old mill\ncook\n", {"F1": 0.5, "EM": 0.5}),
    ],
)
def test_score(tmp_path, capsys, name, references, texts, expected):
    for file, content in (("refs", references), ("hyps", texts)):
        (tmp_path / file).write_text(content)
    command = [
        "score",
        f"superglue/{name}",
        "--refs",
        str(tmp_path / "refs"),
        "--hyps",
        str(tmp_path / "hyps"),
    ]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(expected)


class Guesses:
    """In place of a classifier or an answerer: each input is guessed by its place."""

    def __init__(self, labels, prompts):
        self.labels, self.prompts = labels, prompts

    def probabilities(self, params, inputs):
        first = [0.75, *[0.25] * (len(self.labels) - 1)]
        return np.array([np.roll(first, place) for place in range(len(inputs))])

    def odds(self, params, inputs):
        return [
            [(-1.0) ** (place + number) for number in range(len(each.names))]
            for place, each in enumerate(inputs)
        ]


SUBMITTED = {
    "boolq": [{"idx": 0, "label": "false"}, {"idx": 1, "label": "true"}],
    "cb": [{"idx": 0, "label": "entailment"}, {"idx": 1, "label": "contradiction"}],
    "copa": [{"idx": 0, "label": 0}, {"idx": 1, "label": 1}],
    "multirc": [
        {
            "idx": 0,
            "passage": {
                "questions": [
                    {"idx": 0, "answers": [{"idx": 0, "label": 1}, {"idx": 1, "label": 0}]},
                    {
                        "idx": 1,
                        "answers": [{"idx": 2, "label": 0}, {"idx": 3, "label": 1}, {"idx": 4, "label": 0}],
                    },
                ]
            },
        }
    ],
    "record": [{"idx": 0, "label": "the river"}, {"idx": 1, "label": "the cook"}],
    "rte": [{"idx": 0, "label": "entailment"}, {"idx": 1, "label": "not_entailment"}],
    "wic": [{"idx": 0, "label": "false"}, {"idx": 1, "label": "true"}],
    "wsc": [{"idx": 0, "label": "False"}, {"idx": 1, "label": "True"}],
}


@pytest.mark.parametrize("name", NAMES)
def test_submissions(tmp_path, name):
    """As the benchmark's own code, jiant, writes them."""
    superglue_files.write(tmp_path, name)
    chosen = section(name, directory=".", submit=True)
    splits = tasks.prepare(chosen, tasks.read(chosen, tmp_path), Words())
    guesses = Guesses(superglue.SETS[name].labels, ())
    found = tasks.of(chosen).files(guesses, splits, None)
    official = superglue_files.DIRECTORIES[name]
    assert set(found) == {"probabilities.tsv", f"further/{official}.tsv", f"submission/{official}.jsonl"}
    lines = [json.loads(line) for line in found[f"submission/{official}.jsonl"].splitlines()]
    assert len(lines) == 6 and lines[: len(SUBMITTED[name])] == SUBMITTED[name]


@pytest.mark.parametrize(
    "labels, chances", [(SCORE, (0.880797, 0.119203)), (questions.RIGHT, (0.731059, 0.268941))]
)
def test_probabilities_of_candidates(labels, chances):
    """Of candidates that are compared a softmax, and of others the logistic function; odds of 1 and -1."""
    inputs = tuple(Sentence("", (1,), (one,), index="7") for one in "10")
    question = Asked("", (), ("0",), None, inputs, ("a", "b"))
    content = questions.table(Guesses(labels, ()), [question], None)[1]
    assert content == (
        "index\tcandidate\treference\tprediction\tprobability\n"
        f"7\ta\t1\t1\t{chances[0]}\n7\tb\t0\t0\t{chances[1]}\n"
    )


def test_nothing_to_predict():
    assert set(tasks.TASKS["superglue/copa"].files(Guesses(SCORE, ()), Splits((), ()), None)) == {
        "probabilities.tsv"
    }
