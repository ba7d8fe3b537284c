"""Asks the official implementations for the numbers in `golden_e2e.json`. Not a test: it needs java and 104
MB of a package.

    python tests/oracle_e2e.py PYMTEVAL TESTSET_W_REFS

PYMTEVAL is `metrics/pymteval.py` of a checkout of tuetschek/e2e-metrics (its BLEU and NIST, which need the
package `future`); METEOR, ROUGE-L and CIDEr come from the package `pycocoevalcap` 1.2, whose code and jars
are those of the caption evaluation of MS COCO that e2e-metrics carries, as does the Penn Treebank tokenizer.
TESTSET_W_REFS is the E2E test set's `testset_w_refs.csv`. The outputs that are scored are made here.
"""

import csv
import importlib.util
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


GOLDEN = Path(__file__).parent / "golden_e2e.json"
# Our own sentences, for where there is no data: what the tokenizers have to get right, in three inputs of
# several references.
OWN = {
    "references": [
        [
            "The \"Otter & Fern\" isn't cheap (£20-25); it's near St. John's.",
            "The Otter & Fern, near St. John's, costs £20 - £25, i.e. it is not cheap…",
            "Near St John’s you'll find the kids’ favourite: Otter & Fern. Cannot complain!",
        ],
        ["No. 5 Café has a rating of 3.5 out of 5.", "Café No. 5: 3.5/5, family-friendly."],
        [
            "A take-away by the river, open until 10.30pm, $15 or 20% more.",
            "It serves fast food., and more...",
            "Open 'til 10:30 p.m. It's average - but good?!",
        ],
    ],
    "hypotheses": [
        "The Otter & Fern isn't cheap (£20-25), near St. John's.",
        "café no. 5 is family-friendly, rated 3.5 out of 5.",
        "It's a take-away by the river!!",
    ],
}


def read(table: Path) -> list[list[str]]:
    """The references of each meaning of the table, in its order."""
    groups: dict[str, list[str]] = {}
    with table.open(encoding="utf-8", newline="") as handle:
        for meaning, reference in list(csv.reader(handle))[1:]:
            groups.setdefault(meaning, []).append(" ".join(reference.split()))
    return list(groups.values())


def systems(references: list[list[str]]) -> Iterator[tuple[str, list[list[str]], list[str]]]:
    """Made-up systems, the same ones every time: a name, what is left as references, and one output an
    input.
    """
    yield "first reference", references, [group[0] for group in references]
    yield "leave one out", [group[1:] or group for group in references], [group[0] for group in references]
    for name, change in (
        (
            "words dropped",
            lambda text, chance: " ".join(word for word in text.split() if chance.random() > 0.15),
        ),
        ("words swapped", _swap),
        ("characters", _characters),
        ("lower case", lambda text, chance: text.lower()),
        (
            "authors' tokens",
            lambda text, chance: re.sub(r"(?<=\S)([.,!?;:'-]|n't)", r" \1", text).replace("£", "£ "),
        ),
        ("some empty", lambda text, chance: "" if chance.random() < 0.1 else text),
    ):
        chance = random.Random(name)
        yield name, references, [_line(change, chance.choice(group), chance) for group in references]
    yield (
        "one sentence",
        references,
        ["The Mill is a family-friendly pub near Café Rouge (£20-25), isn't it?"] * len(references),
    )


def _line(change: Callable[[str, random.Random], str], text: str, chance: random.Random) -> str:
    return " ".join(change(text, chance).split())


def _swap(text: str, chance: random.Random) -> str:
    words = text.split()
    for _ in range(3):
        first, second = chance.randrange(len(words)), chance.randrange(len(words))
        words[first], words[second] = words[second], words[first]
    return " ".join(words)


def _characters(text: str, chance: random.Random) -> str:
    """A few characters lost, and punctuation where it does not belong."""
    letters = list(text)
    for _ in range(3):
        del letters[chance.randrange(len(letters))]
        letters.insert(chance.randrange(len(letters)), chance.choice(" .,-'£\"():!?/&%5"))
    return "".join(letters)


def official(pymteval: Any, references: list[list[str]], hypotheses: list[str]) -> dict[str, float]:
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    bleu, nist = pymteval.BLEUScore(), pymteval.NISTScore()
    for hypothesis, group in zip(hypotheses, references, strict=True):
        bleu.append(hypothesis, group)
        nist.append(hypothesis, group)
    truth = PTBTokenizer().tokenize(
        {n: [{"caption": text} for text in group] for n, group in enumerate(references)}
    )
    results = PTBTokenizer().tokenize({n: [{"caption": text}] for n, text in enumerate(hypotheses)})
    captions = {"METEOR": Meteor(), "ROUGE_L": Rouge(), "CIDEr": Cider()}
    scores = {name: float(scorer.compute_score(truth, results)[0]) for name, scorer in captions.items()}
    return {"BLEU": bleu.score(), "NIST": nist.score(), **scores}


def main(pymteval_file: Path, table: Path) -> None:
    spec = importlib.util.spec_from_file_location("pymteval", pymteval_file)
    pymteval = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pymteval)
    golden = {
        "source": (
            "python tests/oracle_e2e.py e2e-metrics/metrics/pymteval.py testset_w_refs.csv; with "
            "pycocoevalcap 1.2 and pymteval as in the fork lxuechen/e2e-metrics"
        ),
        "testset_w_refs": {
            name: official(pymteval, groups, outputs) for name, groups, outputs in systems(read(table))
        },
        "own": {**OWN, "scores": official(pymteval, OWN["references"], OWN["hypotheses"])},
    }
    GOLDEN.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
