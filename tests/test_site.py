"""`make docs` fails for what would be wrong on the site: each fault, planted into a small tree with the
project's own `mkdocs.yml` and `docs/_site/`, is named.

That the site of this tree builds is what `make docs` itself says.
"""

import doctest
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("mkdocs", reason="the extra `docs`, part of `test`, is not installed")

_REPOSITORY = Path(__file__).resolve().parent.parent
_MENU = "\nnav:\n"
_TREE = {
    "README.md": "# Home\n\nTo [a page](docs/page.md#there), [names](docs/api/index.md), [code](run.py).\n",
    "run.py": "print(1)\n",
    "docs/page.md": "# A page\n\n## There\n\nTo [the picture](../figures/a.svg) and [home](../README.md).\n",
    "docs/pictures/site.css": "",
    "docs/api/index.md": "# Names\n\n::: lora_jax.double\n",
    "book.ipynb": json.dumps(
        {
            "cells": [
                {"cell_type": "markdown", "source": ["# A book\n\nOf $x_1$, ", "and not of `$x_2$`."]},
                {
                    "cell_type": "code",
                    "source": ["1 + 1"],
                    "outputs": [
                        {"text": ["two"]},
                        {"data": {"text/plain": ["three"]}},
                        {"data": {"text/plain": ["<Figure>"], "image/png": "iVBORw0K\n"}},
                    ],
                },
            ]
        }
    ),
    "figures/a.svg": "<svg xmlns='http://www.w3.org/2000/svg'/>",
    "lora_jax/__init__.py": "from ._double import double as double\n",
    "lora_jax/_double.py": 'def double(x):\n    """Twice `x`.\n\n    >>> double(2)\n    4\n    """\n',
}
_ENTRIES = "  - README.md\n  - page.md\n  - api/index.md\n  - book.ipynb\n  - Scripts: '*.py'\n"
# What is changed in which file, and what the build says of it.
_FAULTS = {
    "link": ("docs/page.md", "../README.md", "../NOTHING.md", "link 'NOTHING.md'"),
    "anchor": ("README.md", "#there", "#nowhere", "does not contain an anchor"),
    "menu": ("mkdocs.yml", "  - page.md\n", "", "not included in the"),
    "picture": ("docs/page.md", "figures/a.svg", "figures/b.svg", "figures/b.svg"),
    "place": ("docs/api/index.md", "::: lora_jax.double", "", "_double.double is public, and on no page"),
    "docstring": (
        "lora_jax/_double.py",
        _TREE["lora_jax/_double.py"],
        "def double(x): ...\n",
        "has no docstring",
    ),
    "example": (
        "lora_jax/_double.py",
        "\n\n    >>> double(2)\n    4\n",
        "\n",
        "its docstring has no example",
    ),
    "name": (
        "docs/api/index.md",
        "lora_jax.double",
        "lora_jax.double\n\n::: lora_jax.triple",
        "lora_jax.triple",
    ),
}


@pytest.fixture
def tree(tmp_path):
    for name, text in _TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    shutil.copytree(
        _REPOSITORY / "docs" / "_site", tmp_path / "docs" / "_site", ignore=lambda *_: ["__pycache__"]
    )
    settings = (_REPOSITORY / "mkdocs.yml").read_text("utf-8").partition(_MENU)[0]
    (tmp_path / "mkdocs.yml").write_text(settings + _MENU + _ENTRIES, "utf-8")
    return tmp_path


def _build(tree: Path) -> subprocess.CompletedProcess:
    """As `make docs` does it: with `--quiet` a build would count no warning, and nothing would be strict."""
    words = re.search(r"-m (mkdocs build.*)", (_REPOSITORY / "Makefile").read_text("utf-8"))[1].split()
    return subprocess.run([sys.executable, "-m", *words], cwd=tree, capture_output=True, text=True)


def test_a_small_site_builds(tree):
    built = _build(tree)
    assert built.returncode == 0, built.stderr
    home, page = ((tree / "site" / name).read_text("utf-8") for name in ("index.html", "page.html"))
    assert 'href="page.html#there"' in home and 'href="run.py.html"' in home
    assert 'href="figures/a.svg"' in page and (tree / "site" / "figures" / "a.svg").is_file()
    names = (tree / "site" / "api" / "index.html").read_text("utf-8")
    assert "Twice" in names and "<blockquote>" not in names
    book = (tree / "site" / "book.ipynb.html").read_text("utf-8")
    assert book.count("<math") == 1 and "<code>$x_2$</code>" in book and "two" in book
    assert "three" in book and "Figure" not in book and 'src="data:image/png;base64,iVBORw0K"' in book


@pytest.mark.parametrize("fault", _FAULTS)
def test_a_fault_fails_the_build(tree, fault):
    name, old, new, said = _FAULTS[fault]
    file = tree / name
    text = file.read_text("utf-8")
    assert old in text
    file.write_text(text.replace(old, new), "utf-8")
    built = _build(tree)
    assert built.returncode != 0 and said in built.stderr, built.stderr


@pytest.mark.parametrize("name", ["hooks", "doctests"])
def test_examples_of_the_builder(name):
    spec = importlib.util.spec_from_file_location(name, _REPOSITORY / "docs" / "_site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    outcome = doctest.testmod(module)
    assert outcome.attempted and not outcome.failed
