"""SQuAD's files: what is read of them, and the one line about each fault."""

import json

import pytest
import squad_rows

from experiments import tasks
from experiments.command_line import main
from experiments.strict_json import build
from experiments.tasks import squad_files


@pytest.mark.parametrize("version", ["1.1", "2.0"])
def test_every_question_is_read(tmp_path, version):
    squad_rows.write(tmp_path, version)
    found = squad_files.read(tmp_path / "own.json")
    asked = [(question.text, question.context) for question in found if question.answers]
    assert asked == [(row[0], context) for context, group in squad_rows.ROWS.items() for row in group]
    for question in found:
        for answer in question.answers:
            assert question.context[answer.start :].startswith(answer.text)
    assert squad_files.has_impossible(found) == (version == "2.0")
    never = [question.text for question in found if question.impossible]
    assert never == ([text for text, _ in squad_rows.NEVER] if version == "2.0" else [])
    (tmp_path / "again.json").write_text(squad_files.written(found))
    assert squad_files.read(tmp_path / "again.json") == found


def test_limits_are_of_questions(tmp_path):
    squad_rows.write(tmp_path, "2.0")
    given = {"task": "squad", "train": "own.json", "valid": "own.json", "max_rows": 4, "max_valid_rows": 2}
    contents = tasks.read(build(tasks.Section, given, "data"), tmp_path)
    assert [question.id for question in contents["train"]] == ["00", "01", "02", "never0"]
    assert [question.id for question in contents["valid"]] == ["00", "01"]


@pytest.mark.parametrize("off", [-2, -1, 0, 1, 2])
def test_an_answer_that_is_off_by_a_little_is_put_right(tmp_path, off):
    tree = squad_rows.rows("1.1")
    answer = tree["data"][0]["paragraphs"][0]["qas"][1]["answers"][0]
    right = answer["answer_start"]
    answer["answer_start"] += off
    (tmp_path / "own.json").write_text(json.dumps(tree))
    assert squad_files.read(tmp_path / "own.json")[1].answers[0].start == right


def test_an_answer_that_is_right_stays_where_it_is(tmp_path):
    """Though the same text stands beside it too."""
    answers = [{"text": "a", "answer_start": start} for start in (2, 0, 4)]
    node = {"id": "1", "question": "which", "answers": answers}
    tree = {"data": [{"paragraphs": [{"context": "aaaaa", "qas": [node]}]}]}
    (tmp_path / "own.json").write_text(json.dumps(tree))
    (found,) = squad_files.read(tmp_path / "own.json")
    assert [answer.start for answer in found.answers] == [2, 0, 4]


def changed(change):
    tree = squad_rows.rows("2.0")
    change(tree["data"][0]["paragraphs"][0])
    return json.dumps(tree)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "own.json` is not valid JSON: Expecting"),
        ("[]", r"own.json` is no object, and must have `data`"),
        ('{"data": []}', "own.json` is empty: it has no question"),
        (
            '{"data": [{"title": "a"}]}',
            r"data\[0\] has title, and must have `paragraphs`: SQuAD's files have",
        ),
        (
            changed(lambda paragraph: paragraph.update(context=7)),
            r"data\[0\].paragraphs\[0\]: `context` is 7, and must be a text",
        ),
        (
            changed(lambda paragraph: paragraph["qas"][2].pop("question")),
            r"qas\[2\] \(id '02'\) has id, answers, is_impossible, and must have `question`",
        ),
        (
            changed(lambda paragraph: paragraph["qas"][1].update(id="00")),
            r"qas\[1\]: the id '00' is there twice",
        ),
        (
            changed(lambda paragraph: paragraph["qas"][0].update(answers=[])),
            r"qas\[0\] \(id '00'\) has no answer: a question has one or more `answers`, or says",
        ),
        (
            changed(lambda paragraph: paragraph["qas"][0].update(is_impossible=True)),
            r"qas\[0\] \(id '00'\) has answers, and `is_impossible` is true",
        ),
        (
            changed(lambda paragraph: paragraph["qas"][0]["answers"][1].update(answer_start="4")),
            r"qas\[0\] \(id '00'\).answers\[1\]: `answer_start` is \"4\", and must be an integer",
        ),
        (
            changed(lambda paragraph: paragraph["qas"][0]["answers"][0].update(answer_start=0)),
            r"answers\[0\]: the text is '1903', and at `answer_start` 0 its context has 'The '",
        ),
        (
            changed(lambda paragraph: paragraph["qas"][0]["answers"][0].update(text="")),
            r"answers\[0\]: the text is '', and at `answer_start`",
        ),
    ],
)
def test_faults_are_named(tmp_path, text, message):
    (tmp_path / "own.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        squad_files.read(tmp_path / "own.json")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data file"):
        squad_files.read(tmp_path / "own.json")


def scored(directory, capsys, texts, *more, version="2.0"):
    squad_rows.write(directory, version)
    (directory / "predictions.json").write_text(json.dumps(texts))
    names = ["--refs", directory / "own.json", "--hyps", directory / "predictions.json", *more]
    code = main(["score", "squad", *map(str, names)])
    return code, capsys.readouterr()


def right(version):
    nodes = (
        node for paragraph in squad_rows.rows(version)["data"][0]["paragraphs"] for node in paragraph["qas"]
    )
    return {node["id"]: node["answers"][-1]["text"] if node["answers"] else "" for node in nodes}


def test_score_of_version_1(tmp_path, capsys):
    """Other ids are of no question, and a question without a prediction scores 0."""
    texts = {**right("1.1"), "another": "pub"}
    code, said = scored(tmp_path, capsys, texts, version="1.1")
    assert code == 0 and json.loads(said.out) == {"exact_match": 1.0, "f1": 1.0} and not said.err
    del texts["00"]
    code, said = scored(tmp_path, capsys, texts, version="1.1")
    assert json.loads(said.out) == {"exact_match": 0.8, "f1": 0.8}
    assert said.err == "1 of 5 questions have no prediction, and score 0.\n"


def test_score_of_version_2(tmp_path, capsys):
    texts = right("2.0") | {"never0": "the town"}
    code, said = scored(tmp_path, capsys, texts)
    found = json.loads(said.out)
    assert code == 0 and (found["total"], found["HasAns_total"], found["NoAns_total"]) == (7, 5, 2)
    assert (found["HasAns_f1"], found["NoAns_f1"]) == (1.0, 0.5) and "best_f1" not in found
    odds = dict.fromkeys(texts, -1) | {"never0": 3.5}
    (tmp_path / "odds.json").write_text(json.dumps(odds))
    code, said = scored(tmp_path, capsys, texts, "--null-odds", tmp_path / "odds.json", "--threshold", "9")
    found = json.loads(said.out)
    assert code == 0 and found["f1"] == pytest.approx(6 / 7) and found["best_f1"] == 1.0
    assert found["best_f1_thresh"] == -1 and list(found)[-4:] == [
        "best_exact",
        "best_exact_thresh",
        "best_f1",
        "best_f1_thresh",
    ]
    code, said = scored(tmp_path, capsys, texts, "--null-odds", tmp_path / "odds.json")
    assert json.loads(said.out)["f1"] == 1.0


@pytest.mark.parametrize(
    "version, texts, more, message",
    [
        ("2.0", {}, (), "predictions.json` has none of the 7 questions: it belongs to another file"),
        ("2.0", [], (), "predictions.json` is no object of JSON"),
        (
            "2.0",
            {"00": "1903"},
            (),
            "predictions.json` has no '01', one of 6 that are missing of 7: version 2.0",
        ),
        ("1.1", {"00": None}, (), "predictions.json` '00': it is null, and must be a text"),
        ("1.1", {"00": "1903"}, ("--null-odds", "predictions.json"), "`--null-odds` are of version 2.0, and"),
        (
            "1.1",
            {"00": "1903"},
            ("--threshold", "1"),
            "`--threshold` is 1.0, of odds: pass `--null-odds` too",
        ),
        (
            "1.1",
            {"00": "1903"},
            ("--filter", "seen"),
            "`--filter` is of tasks whose files are texts, and squad's",
        ),
    ],
)
def test_what_cannot_be_scored(tmp_path, capsys, version, texts, more, message):
    code, said = scored(tmp_path, capsys, texts, *more, version=version)
    assert code == 1 and said.out == "" and said.err.count("\n") == 1 and message in said.err


def test_odds_are_of_no_other_task(tmp_path, capsys):
    assert main(["score", "e2e", "--refs", "r", "--hyps", "h", "--null-odds", "o"]) == 1
    assert capsys.readouterr().err == "error: `--null-odds` is of squad, and `TASK` is e2e: leave it out.\n"
