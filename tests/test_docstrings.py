"""Every example in the docstrings of the core runs, and prints what it says."""

import doctest
import importlib
from pathlib import Path

import pytest

import lora_jax

_PACKAGE = Path(lora_jax.__file__).parent
_CORE = sorted(file for files in ("*.py", "methods/*.py", "optim/*.py", "arithmetic/*.py") for file in _PACKAGE.glob(files))
_FILES = [file for file in _CORE if ">>> " in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("file", _FILES, ids=lambda file: file.stem)
def test_examples(file):
    name = ".".join(file.relative_to(_PACKAGE.parent).with_suffix("").parts)
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.attempted and not outcome.failed


def test_every_public_function_has_an_example():
    public = [value for name, value in vars(lora_jax).items() if not name.startswith("_") and callable(value)]
    without = {value.__name__ for value in public if ">>> " not in (value.__doc__ or "")}
    assert without <= {"Lorafied", "MaterializeError"}  # what functions return and raise
