"""Every example in the docstrings runs, and prints what it says."""

import doctest
import importlib
from pathlib import Path

import pytest

import lora_jax


_ROOT = Path(__file__).resolve().parent.parent
_FILES = [
    file.relative_to(_ROOT)
    for package in ("lora_jax", "experiments")
    for file in sorted((_ROOT / package).rglob("*.py"))
    if ">>> " in file.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("file", _FILES, ids=str)
def test_examples(file):
    name = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.attempted and not outcome.failed


def test_every_public_function_has_an_example():
    public = [value for name, value in vars(lora_jax).items() if not name.startswith("_") and callable(value)]
    assert not {value.__name__ for value in public if ">>> " not in (value.__doc__ or "")}


def test_every_metric_has_an_example():
    named = {file.stem for file in _FILES if file.parts[:2] == ("experiments", "metrics")}
    assert named >= {"ngrams", "mteval", "ptb", "bleu", "nist", "rouge", "cider"}
