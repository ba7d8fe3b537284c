"""The names that docs/coming_from.md says other libraries have are names that these have."""

import dataclasses
import re
from pathlib import Path

import pytest


pytestmark = pytest.mark.pytorch

_PAGE = (Path(__file__).resolve().parent.parent / "docs" / "coming_from.md").read_text("utf-8")


def _theirs(section: str) -> set[str]:
    """What stands in backticks in the first column of a section's table."""
    table = _PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (.*?) \|", table, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_calls_of_peft():
    peft = pytest.importorskip("peft")
    from peft.tuners.lora import LoraModel

    combinations = {"cat", "svd", "ties", "dare_ties", "dare_linear", "linear"}
    named = _theirs("PEFT: what you call") - combinations - {"adapter_names"}  # an argument of `forward`
    assert {"get_peft_model", "disable_adapter", "add_weighted_adapter"} <= named
    for name in named:
        assert any(hasattr(owner, name) for owner in (peft, peft.PeftModel, LoraModel)), name
    described = LoraModel.add_weighted_adapter.__annotations__["combination_type"]
    assert all(f"'{name}'" in str(described) for name in combinations)


def test_fields_of_peft():
    peft = pytest.importorskip("peft")
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    named = {text.partition("=")[0] for text in _theirs("PEFT: what you configure")}
    assert {"target_modules", "rank_pattern", "modules_to_save"} <= named
    elsewhere = {name for name in named - fields if hasattr(peft, name)}
    # The last is an argument of `get_peft_model` and of `from_pretrained`.
    assert named - fields - elsewhere == {"autocast_adapter_dtype"}


def test_names_of_loralib():
    lora = pytest.importorskip("loralib")
    named = {text.removeprefix("lora.") for text in _theirs("loralib") if text.startswith("lora.")}
    assert {"Linear", "MergedLinear", "lora_state_dict"} <= named
    assert all(hasattr(lora, name) for name in named)
