"""Every notebook runs in a fresh kernel, and prints and shows what is stored in it.

A notebook is compared by its texts and by the kinds of its pictures. Words and whole numbers are equal. A
number with a point or an exponent depends on the processor and on JAX's version: it is about the same.
"""

import math
import re
import sys

import pytest


pytest.importorskip("nbclient", reason="the extra `test` is not installed")

from nbclient.exceptions import CellExecutionError
from nbformat import v4
from pages import REPOSITORY

import notebooks
from notebooks import NOTEBOOKS


_INEXACT = re.compile(r"(?<![\w.])[-+]?(?:\d+\.\d*(?:e[-+]?\d+)?|\d+e[-+]?\d+)(?![\w.])")
# Of whoever ran it: a home, a temporary directory, where packages are installed, addresses in memory.
_OF_A_MACHINE = re.compile(r"/home/|/root\b|/Users/|/tmp/|/var/|[A-Z]:\\|(site|dist)-packages|0x[0-9a-f]{6,}")


def _marked(name: str):
    with_torch = "torch" in notebooks.needs(notebooks.read(name), "modules")
    return pytest.param(name, marks=[pytest.mark.slow, *([pytest.mark.pytorch] if with_torch else [])])


def _code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _texts(cell):
    """What a cell prints, and the plain text of what it shows."""
    for output in cell.outputs:
        text = output.get("text") or output.get("data", {}).get("text/plain", "")
        yield " ".join(text.split())  # a longer number widens a table's column


def _kinds(cell):
    return [sorted(output.get("data", {output.output_type: None})) for output in cell.outputs]


def _same(left: str, right: str) -> bool:
    """Equal words and whole numbers, and about equal other numbers."""
    numbers = [[float(number) for number in _INEXACT.findall(text)] for text in (left, right)]
    return _INEXACT.sub("#", left) == _INEXACT.sub("#", right) and all(
        math.isclose(*pair, rel_tol=0.2, abs_tol=0.01) for pair in zip(*numbers, strict=True)
    )


# -- the runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [_marked(name) for name in NOTEBOOKS])
def test_runs_as_it_is_stored(name):
    stored = notebooks.read(name)
    if reason := notebooks.missing(stored):
        pytest.skip(reason)
    again = notebooks.executed(stored)
    for cell, run in zip(_code(stored), _code(again), strict=True):
        if "varies" in cell.metadata.get("tags", ()):
            continue
        shown = list(_texts(cell)), list(_texts(run))
        hint = f"`make notebooks` stores the outputs anew\n{cell.source}\n"
        assert _kinds(cell) == _kinds(run), hint
        assert all(_same(*pair) for pair in zip(*shown, strict=True)), hint + "\n".join(map(str, shown))


# -- what is stored ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_those_of_one_run(name):
    cells = _code(notebooks.read(name))
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)], "run it from the start"
    kinds = {kind for cell in cells for output in _kinds(cell) for kind in output}
    assert {"stream", "image/png"} <= kinds, "it prints something and shows a picture"
    assert "error" not in kinds
    warned = [output.text for cell in cells for output in cell.outputs if output.get("name") == "stderr"]
    assert not warned


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_nothing_stored_is_of_a_machine(name):
    notebook = notebooks.read(name)
    texts = [cell.source for cell in notebook.cells]
    texts += [text for cell in _code(notebook) for text in _texts(cell)]
    for text in texts:
        assert not _OF_A_MACHINE.search(text) and str(REPOSITORY) not in text and sys.prefix not in text, text
    assert notebook.metadata.language_info == {"name": "python"}
    assert not any("execution" in cell.metadata for cell in notebook.cells), "times of a run"


def test_names_are_numbered_and_on_the_site():
    menu = (REPOSITORY / "mkdocs.yml").read_text("utf-8")
    for name, file in NOTEBOOKS.items():
        assert re.fullmatch(r"\d\d_[a-z0-9_]+", name)
        assert f"- notebooks/{file.name}\n" in menu


# -- the comparison ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "left, right, same",
    [
        ("loss 1.25", "loss 1.27", True),
        ("loss 1.25", "loss 2.25", False),
        ("differ by 3e-07", "differ by 0.0e+00", True),
        ("rank 4", "rank 5", False),
        ("2,048 numbers", "2,049 numbers", False),
        ("True", "False", False),
        ("v0.1.2 of 3", "v0.1.3 of 3", False),
    ],
)
def test_comparison(left, right, same):
    assert _same(left, right) == same


def test_a_cell_that_raises_fails():
    notebook = v4.new_notebook(cells=[v4.new_code_cell("1 / 0")])
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        notebooks.executed(notebook)


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(notebooks, "BASES", tmp_path)
    notebook = v4.new_notebook(metadata={"lora_jax": {"base": "smollm2-135m"}})
    assert "python -m experiments fetch smollm2-135m" in notebooks.missing(notebook)
    notebook.metadata.lora_jax.modules = {"no_such_module": "lora_jax[torch]"}
    assert notebooks.missing(notebook) == "no_such_module is not installed: pip install 'lora_jax[torch]'"
