"""Scoring from the command line: the files that it reads, what it prints, and what it loads."""

import json
import subprocess
import sys
from pathlib import Path

import oracle_e2e
import pytest

from experiments.command_line import main
from experiments.metrics import files
from experiments.tasks import TASKS


SCORED = [name for name, task in TASKS.items() if task.is_scored]


_REPOSITORY = Path(__file__).resolve().parent.parent
_OWN = json.loads(oracle_e2e.GOLDEN.read_text("utf-8"))["own"]
_PYTHON = ("BLEU", "NIST", "ROUGE_L", "CIDEr")


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setenv("PATH", "")


def _write(directory, references, hypotheses):
    paths = directory / "refs.txt", directory / "hyps.txt"
    for path, text in zip(paths, (references, hypotheses), strict=True):
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    return paths


@pytest.mark.parametrize(
    "references, hypotheses, expected",
    [
        ("a\nb\n\nc\n", "x\ny\n", ([["a", "b"], ["c"]], ["x", "y"])),
        ("a\r\n b \r\n\r\nc\n\n\n", "x\r\n\r\n", ([["a", "b"], ["c"]], ["x", ""])),
        ("a\nb\n", "x\ny", ([["a"], ["b"]], ["x", "y"])),
        ("a\nb\n", "x\n", ([["a", "b"]], ["x"])),
    ],
)
def test_files(references, hypotheses, expected, tmp_path):
    assert files.read(*_write(tmp_path, references, hypotheses)) == expected


@pytest.mark.parametrize(
    "references, hypotheses, error",
    [
        ("a\n\nb\n", "x\n", "references for 2 inputs and `.*hyps.txt` has hypotheses for 1 input:"),
        ("a\n\nb\n", "x\ny\n\n", "references for 2 inputs and `.*hyps.txt` has hypotheses for 3 inputs:"),
        ("a\n\n\nb\n", "x\ny\n", "`.*refs.txt` line 3: input 2 has no reference"),
        ("\na\n", "x\n", "`.*refs.txt` line 1: input 1 has no reference"),
        ("\n\n", "x\n", "`.*refs.txt` has nothing but blank lines"),
        ("", "x\n", "`.*refs.txt` is empty"),
        ("a\n", "", "`.*hyps.txt` is empty"),
        ("a\n", b"\xff\n", "`.*hyps.txt` is not UTF-8"),
    ],
)
def test_files_that_cannot_be_scored(references, hypotheses, error, tmp_path, capsys):
    refs, hyps = _write(tmp_path, references, hypotheses)
    assert main(["score", "e2e", "--refs", str(refs), "--hyps", str(hyps)]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    with pytest.raises(ValueError, match=error):
        files.read(refs, hyps)


def test_score_prints_json(tmp_path, capsys, no_java):
    references = "\n\n".join("\n".join(group) for group in _OWN["references"])
    refs, hyps = _write(tmp_path, references + "\n", "\n".join(_OWN["hypotheses"]) + "\n")
    assert main(["score", "e2e", "--refs", str(refs), "--hyps", str(hyps)]) == 0
    said = capsys.readouterr()
    scores = json.loads(said.out)
    assert list(scores) == ["BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr"]
    assert scores["METEOR"] is None
    assert {name: round(scores[name], 4) for name in _PYTHON} == {
        name: round(_OWN["scores"][name], 4) for name in _PYTHON
    }
    assert said.err.startswith("METEOR is null: it needs java") and said.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, error",
    [
        (
            ["e2", "--refs", "r", "--hyps", "h"],
            f"error: `TASK` must be one of {', '.join(SCORED)}, got `e2`; did you mean `e2e`?\n",
        ),
        (["e2e", "--refs", "nowhere.txt", "--hyps", "h"], "error: no file `nowhere.txt`.\n"),
    ],
)
def test_bad_arguments_are_one_line(arguments, error, capsys):
    assert main(["score", *arguments]) == 1
    assert capsys.readouterr().err == error


def test_score_has_help(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["score", "--help"])
    assert leaving.value.code == 0 and "--refs FILE [FILE ...] --hyps FILE" in " ".join(
        capsys.readouterr().out.split()
    )


def test_scoring_loads_the_standard_library_only():
    code = (
        "import sys, experiments.metrics, experiments.metrics.files\nprint(*{name.partition('.')[0] for name "
        "in sys.modules})"
    )
    result = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=_REPOSITORY, capture_output=True, text=True, check=True
    )
    assert set(result.stdout.split()) <= set(sys.stdlib_module_names) | {"__main__", "experiments"}
