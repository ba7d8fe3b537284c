"""SuperGLUE: its files, what is wrong with them, and the examples of questions with candidates."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import superglue_files

from experiments import config as configs, tasks
from experiments.strict_json import build
from experiments.tasks import questions, superglue
from experiments.tasks.sentences import Asked, Sentence, Sentences


NAMES = tuple(superglue_files.DIRECTORIES)
ARTICLE = "the mill moves, the pub moves, the mill waits. the town opens"
PARAGRAPH = 'Sent 1: the mill opens " Sent 2: the mill never opens'
# Of the first training row: a text or a pair, and the label.
ROWS = {
    "boolq": ('the mill opens "', "the mill never opens", "true"),
    "cb": ('the mill opens "', "the mill never opens", "entailment"),
    "rte": ('the mill opens "', "the mill never opens", "entailment"),
    "wic": ('the * mill * opens "', "the * mill * never opens", "true"),
    "wsc": ("* The mill * never waits, mill again, because # it # moves.", None, "true"),
}
# Of the first question: the text that its candidates share, each with 1 where it is right, what an answer
# calls them, and the answers.
ASKED = {
    "copa": (
        'the mill opens " What happened as a result?',
        [("the mill never opens", "1"), ("the pub waits again", "0")],
        ("0", "1"),
        ("0",),
    ),
    "multirc": (PARAGRAPH, [("Who opens? the mill", "1"), ("Who opens? the pub", "0")], ("0", "1"), ("1 0",)),
    "record": (
        ARTICLE,
        [("again the mill waits", "1"), ("again the pub waits", "0")],
        ("the mill", "the pub"),
        ("the mill",),
    ),
}


def section(name, **values):
    return build(tasks.Section, {"task": f"superglue/{name}", **values}, "data")


def read(directory, name, **values):
    return tasks.read(section(name, directory=".", **values), directory)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("own", [False, True], ids=["below superglue/", "its own directory"])
def test_its_official_files(tmp_path, name, own):
    place = superglue_files.write(tmp_path / "superglue", name)
    directory = str(place.relative_to(tmp_path)) if own else "superglue"
    found = tasks.read(section(name, directory=directory, submit=True), tmp_path)
    (further,) = found.further.values()
    several = 2 if name == "multirc" else 1
    sizes = [len(rows) for rows in (*found.rows.values(), further)]
    assert sizes == [12 * several, 6 * several, 6 * several] and set(found.further) == {place.name}
    first = found.rows["train"][0]
    if name in ROWS:
        assert (first.first, first.second, first.label) == ROWS[name]
        assert first.index == "0" and first.number == 1 and further[0].label is None
        return
    shared, candidates, names, references = ASKED[name]
    assert {row.first for row in first.rows} == {shared}
    assert [(row.second, row.label) for row in first.rows] == candidates
    assert (first.names, first.references, first.each) == (names, references, name == "multirc")
    if name != "multirc":
        for each in found.rows["train"]:
            right = [one for row, one in zip(each.rows, each.names, strict=True) if row.label == "1"]
            assert right == list(each.references)
    assert further[0].references == () and {row.label for row in further[0].rows} == {None}


def of_hub(name, given):
    """An object of the official files, as the rows that `datasets` has of it."""
    passage = given.get("passage")
    if name == "multirc":
        return [
            {
                "paragraph": passage["text"],
                "question": question["question"],
                "answer": answer["text"],
                "idx": {"paragraph": given["idx"], "question": question["idx"], "answer": answer["idx"]},
                "label": answer.get("label", -1),
            }
            for question in passage["questions"]
            for answer in question["answers"]
        ]
    if name == "record":
        (asked,) = given["qas"]
        spans = [(each["start"], each["end"] + 1) for each in passage["entities"]]
        return [
            {
                "passage": passage["text"],
                "query": asked["query"],
                "entities": list(dict.fromkeys(passage["text"][start:end] for start, end in spans)),
                "answers": [each["text"] for each in asked.get("answers", [])],
                "idx": {"passage": given["idx"], "query": asked["idx"]},
            }
        ]
    labels = superglue.SETS[name].labels
    flat = {key: value for key, value in given.items() if key != "target"} | given.get("target", {})
    label = given.get("label", -1)
    return [flat | {"label": labels.index(label) if isinstance(label, str) else int(label)}]


@pytest.mark.parametrize("name", NAMES)
def test_of_datasets(tmp_path, name):
    """Labels are numbers there, in an order of their own, and -1 in test sets; the rows are the same."""
    datasets = pytest.importorskip("datasets", reason="pip install 'lora_jax[experiments]'")
    place = superglue_files.write(tmp_path, name)
    whole = {}
    for split, official in (("train", "train"), ("validation", "val"), ("test", "test")):
        objects = map(json.loads, (place / f"{official}.jsonl").read_text().splitlines())
        whole[split] = datasets.Dataset.from_list([row for each in objects for row in of_hub(name, each)])
    datasets.DatasetDict(whole).save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path, name, dataset="saved", submit=True) == read(tmp_path, name, submit=True)


def test_spans_of_wsc(tmp_path):
    """The nearest place that has the words, whatever marks stand at them; the index, where no place has."""
    file = superglue_files.write(tmp_path, "wsc") / "train.jsonl"
    text = "Kamenev told  his cook, and Zinoviev told his guest."
    spans = [("the cook", 2, "his", 8), ("his cook", 1, "his", 2), ("Kamenev and Zinoviev", 0, "his", 6)]
    lines = [
        {
            "text": text,
            "target": dict(
                zip(("span1_text", "span1_index", "span2_text", "span2_index"), span, strict=True)
            ),
            "label": number == 0,
            "idx": number,
        }
        for number, span in enumerate(spans)
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert [row.first for row in read(tmp_path, "wsc").rows["train"]] == [
        "Kamenev told * his cook, * and Zinoviev told # his # guest.",
        "Kamenev told * # his # cook, * and Zinoviev told his guest.",
        "* Kamenev told his * cook, and Zinoviev told # his # guest.",
    ]


def changed(**values):
    return lambda row: json.dumps(row | values)


def within(*path, **values):
    """Changes the object at the end of the path, of fields and places."""

    def change(row):
        found = row
        for step in path:
            found = found[step]
        found.update(values)
        return json.dumps(row)

    return change


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("boolq", lambda row: "{", "row 3 is not valid JSON"),
        ("boolq", lambda row: "[1]", "row 3 is no object of JSON"),
        ("boolq", changed(label="yes"), "row 3: the label is 'yes', and must be one of false, true"),
        ("boolq", changed(passage=None), "row 3: `passage` is null, and must be a text"),
        ("cb", changed(idx=True), "row 3: `idx` is true, and must be an integer"),
        (
            "cb",
            lambda row: json.dumps({"sentence1": "a", "idx": 0}),
            "row 3 lacks `premise`, and has the fields sentence1, idx: name the directory of this set in",
        ),
        (
            "rte",
            lambda row: json.dumps({**row, "label": None}),
            "row 3: the label is 'None', and must be one",
        ),
        ("wic", changed(end2=70), "row 3: the word is from character 4 to 70 of `sentence2`, which has 33"),
        (
            "wsc",
            within("target", span2_index=70, span2_text="her"),
            "`span2_index` is 70, and the text has 9",
        ),
        (
            "wsc",
            lambda row: json.dumps({"text": "a", "target": 1}),
            "row 3: `target` is 1, and must be an obj",
        ),
        ("copa", changed(question="why"), "row 3: `question` is 'why', and must be one of cause, effect"),
        ("copa", changed(label=2), "row 3: the label is '2', and must be one of 0, 1"),
        ("multirc", within("passage", "questions", 1, answers=[]), "row 3: question 2/5 has no answers"),
        (
            "multirc",
            within("passage", "questions", 0, "answers", 1, label=3),
            "row 3: the label is '3', and must be one of 0, 1",
        ),
        (
            "multirc",
            within("passage", "questions", 0, answers=[{"text": "a"}]),
            "row 3 lacks `label`, and has",
        ),
        ("record", within("qas", 0, query="who?"), "row 3: query 2/2 has no `@placeholder`"),
        ("record", within("qas", 0, answers=[]), "row 3: query 2/2 has no answers"),
        ("record", within("passage", entities=[]), "row 3: query 2/2 has no candidates"),
        (
            "record",
            within("passage", "entities", 0, end=700),
            "row 3: an entity is from character 0 to 700 of the text, which has ",
        ),
    ],
)
def test_faults_of_rows_are_named(tmp_path, name, change, message):
    file = superglue_files.write(tmp_path, name) / "train.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], change(json.loads(lines[2])), *lines[3:]]))
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, name)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["rte", "record"])
def test_faults_of_files_are_named(tmp_path, name):
    place = superglue_files.write(tmp_path, name)
    (place / "val.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"val.jsonl` is empty: it has no row"):
        read(tmp_path, name)
    (place / "val.jsonl").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"val.jsonl` is not UTF-8"):
        read(tmp_path, name)
    with pytest.raises(
        FileNotFoundError, match=f"names the directory of {place.name}, or of all sets of Sup"
    ):
        tasks.read(section(name), tmp_path)


def test_a_label_that_training_has_not(tmp_path):
    superglue_files.write(tmp_path, "cb")
    with pytest.raises(ValueError, match="has no row with the label neutral among the 2 that train"):
        read(tmp_path, "cb", max_rows=2)


class Words:
    """A tokenizer of the last text's words, whose ids are their lengths."""

    pad_token_id = 0

    def __call__(self, *texts, **how):
        return {"input_ids": [[len(word) for word in text.split()] for text in texts[-1]]}


def prepared(directory, name, **values):
    superglue_files.write(directory, name)
    chosen = section(name, directory=".", **values)
    return tasks.prepare(chosen, tasks.read(chosen, directory), Words())


@pytest.mark.parametrize("name, count", [("copa", 5), ("multirc", 12), ("record", 12)])
def test_numbers_of_rows_are_of_questions(tmp_path, name, count):
    splits = prepared(tmp_path, name, max_rows=5, max_valid_rows=3)
    assert len(splits.train) == count and len(splits.train.asked) == 5 and len(splits.prompts) == 3


def test_candidates_that_are_compared_are_rows_of_one_example(tmp_path):
    train = prepared(tmp_path, "copa").train
    batch = train.batch(np.array([3, -1]))
    lengths = [len(each.ids) for each in train.inputs[6:8]]
    assert batch["input_ids"].shape == (4, 16) and train.lengths[3] == max(lengths)
    assert batch["attention_mask"].sum(1).tolist() == [*lengths, 1, 1]
    assert batch["labels"].tolist() == [[1], [0]] and batch["mask"].tolist() == [[1.0], [0.0]]


def test_class_weights_are_of_candidates(tmp_path):
    """ReCoRD has more wrong ones than right ones; COPA has none by themselves."""
    train = prepared(tmp_path, "record", class_weights="balanced").train
    right = [candidate.references == ("1",) for candidate in train.inputs]
    weights = train.batch(np.arange(len(train)))["mask"][:, 0]
    np.testing.assert_allclose(weights, [30 / (2 * 12) if one else 30 / (2 * 18) for one in right], rtol=1e-6)
    with pytest.raises(ValueError, match="`data.class_weights` are of classes, and superglue/copa has a"):
        prepared(tmp_path, "copa", class_weights="balanced")


def test_validation_is_of_whole_questions():
    """In any order of the rows, and of the questions that are all there: the third lacks a candidate."""
    one = Sentence("", (1,), ())
    asked = [Asked("", (), ("0",), None, (one,) * size, ("0", "1", "2")[:size]) for size in (2, 3, 2)]
    examples = Sentences([one] * 7, [0] * 7, 8, asked=asked)
    odds = {0: 3.0, 1: -1.0, 2: 2.0, 3: 0.5, 4: 5.0, 5: 9.0}
    rows = np.array([4, 2, 0, 1, 3, 5])
    outputs = np.array([[1.0, 1.0 + odds[row]] for row in rows])
    accuracy = tasks.TASKS["superglue/copa"].score
    assert questions.judge(accuracy, None, outputs, examples, rows) == {"accuracy": 0.5}
    with pytest.raises(
        ValueError, match="an evaluation has 1 candidates, and the first question has 2: set a"
    ):
        questions.judge(accuracy, None, outputs[:1], examples, np.array([0]))


def test_its_configs():
    """Steps are whole epochs of the published sets."""
    directory = Path(configs.__file__).resolve().parent.parent / "configs" / "superglue"
    found = {path.stem: configs.load(path) for path in sorted(directory.glob("*.json"))}
    rows = {"minilm_lora_cb": 250, "minilm_lora_copa": 400}
    assert set(found) == set(rows)
    for name, config in found.items():
        train = config.train
        assert config.name == name and train.eval_every == math.ceil(rows[name] / train.batch)
        assert train.steps % train.eval_every == 0
