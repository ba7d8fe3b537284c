"""Runs with a baseline: an adapter by itself, and LoRA beside a prefix."""

import dataclasses
import json

import numpy as np
import pytest
from runs import LORA, without_java as without_java
from small_base import TOKENIZER
from training import config as small, optax_promotes as optax_promotes

from experiments.command_line import main
from experiments.tasks.examples import Examples


ARCHITECTURE = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 160}
PARAMETERS = (4096 + 160) * 8 + 2 * (12 * 8 * 8 + 13 * 8) + 2 * 8
CASES = {
    "LoRA beside a prefix": (
        {"baseline": {"name": "PrefixLayer", "prefix": 2, "infix": 1}},
        2 * (3 * 8 + 2 * 2 * (8 + 8)),
        "`PrefixLayer(prefix=2, infix=1, words=(), std=0.02)`, and `LoRA(",
    ),
    "adapters of stacked layers": (
        {
            "base": {"architecture": ARCHITECTURE, "tokenizer": str(TOKENIZER), "scan": True},
            "baseline": {"name": "Houlsby", "bottleneck": 3},
            "method": {"name": "Full"},
            "targets": [],
            "compare_full": True,
        },
        2 * 2 * (2 * 8 * 3 + 3 + 8),
        "`Houlsby(bottleneck=3, activation='gelu_new', dropped=0, std=0.01, up_std=0.0)` |",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_from_a_config_to_texts(tmp_path, capsys, name):
    """A decoder that reads the special tokens before it answers, and the file of what was trained."""
    changes, trainable, words = CASES[name]
    base = {"architecture": ARCHITECTURE, "tokenizer": str(TOKENIZER)}
    settings = {**LORA, "base": base, "compare_full": False, **changes}
    (tmp_path / "tiny.json").write_text(json.dumps(settings))
    done = tmp_path / "done"
    assert main(["run", "--config", str(tmp_path / "tiny.json"), "--workdir", str(done)]) == 0
    facts = json.loads((done / "report.json").read_text())
    assert facts["trainable"] == trainable
    assert facts["comparison"]["max_difference"] < 1e-5 < facts["comparison"]["max_logit"]
    assert len((done / "predictions.txt").read_text().splitlines()) == 4
    assert not (done / "merged").exists() and (done / "trained.safetensors").is_file()
    numbers = facts["numbers"]
    assert numbers["valid_loss"] < numbers["first_valid_loss"]
    assert facts["base"]["parameters"] == PARAMETERS
    if settings["compare_full"]:
        assert facts["cost"]["this run"]["trained parameters"] == trainable
        assert facts["cost"]["full fine-tuning"]["trained parameters"] == PARAMETERS
    assert main(["export", "--workdir", str(done), "--to", str(tmp_path / "hf"), "--format", "hf"]) != 0
    assert "has no merged/: Hugging Face and PEFT have no form for" in capsys.readouterr().err
    page = (done / "report.md").read_text()
    assert words in page
    assert "There is no `adapter/`: Hugging Face and PEFT have no form for " in page


def test_contexts_change_and_completions_stay():
    examples = Examples([([1, 2], [3]), ([4], [5, 6])], seq_len=8)
    changed = examples.with_contexts(lambda ids: [9, *ids, 10])
    assert [changed.ids(index).tolist() for index in range(2)] == [[9, 1, 2, 10, 3], [9, 4, 10, 5, 6]]
    batch = changed.batch(np.arange(2))
    assert batch["labels"][:, :2].tolist() == [[3, 0], [5, 6]]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"targets": ()}, "`targets` is empty"),
        (
            {"baseline": {"name": "Houlsbi"}},
            "`baseline.name` must be one of Houlsby, .*did you mean `Houlsby`",
        ),
        ({"baseline": {"name": "Lin"}}, "`baseline.bottleneck`"),
        (
            {"baseline": {"name": "PrefixLayer", "prefix": 2}},
            '`baseline.name` is PrefixLayer, .* `data.task` is "text", which has none',
        ),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(small(), **settings)
