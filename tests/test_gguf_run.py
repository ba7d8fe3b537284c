"""A run from a GGUF file, through the command line: what it leaves for llama.cpp is what it merged."""

import json

import numpy as np
import pytest
from flax import traverse_util
from gguf_adapters import applied, in_file_order, path_of, read
from gguf_files import CHARACTERS, values, write
from runs import by_transformers, close, GENERATE, refused, without_java as without_java
from training import optax_promotes as optax_promotes

import lora_jax
from experiments.command_line import main
from experiments.progress import read_metrics
from lora_jax.interop import hf, peft


pytestmark = pytest.mark.slow

CONFIG = {
    "name": "packed",
    "source": {"paper": None, "note": "a test"},
    "generate": GENERATE,
    "base": {"path": "./base.gguf"},
    "data": {"task": "e2e", "train": "train.txt", "valid": "valid.txt", "test": "test.txt", "seq_len": 600},
    "method": {"name": "LoRA", "rank": 2, "alpha": 3},
    "targets": ["(q_proj|v_proj|down_proj)/kernel"],
    "train": {"steps": 2, "batch": 2, "lr": 0.01, "eval_batches": 1, "log_every": 1},
    "decode": {"max_tokens": 4, "prompts": 2, "shown": 1, "end": ["."]},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory with the base, the run `done`, and the tensors of the base."""
    root = tmp_path_factory.mktemp("packed")
    layout = {"changes": {"context_length": 640, "vocab_size": 100}, "extra": CHARACTERS}
    tensors = write(root / "base.gguf", kinds=("Q8_0", "Q4_1"), **layout)
    (root / "packed.json").write_text(json.dumps(CONFIG))
    assert main(["run", str(root / "packed.json"), "--workdir", str(root / "done")]) == 0
    return root, tensors


def check_adapter(done, tensors):
    pairs, alpha, settings = read(done / "adapter.gguf")
    assert settings["general.type"] == "adapter" and alpha == 3
    assert len(pairs) == 2 * 3, "two layers of three matrices"
    merged = traverse_util.flatten_dict(hf.load(done / "merged")[1], sep="/")
    for name, (a, b) in pairs.items():
        wanted = merged[path_of(name)].T
        if "attn_q" in name:
            wanted = in_file_order(wanted, 4)
        before = values(tensors, name)
        assert np.abs(before - wanted).max() > 1e-5, "nothing was trained"
        np.testing.assert_allclose(applied(before, name, a, b, alpha), wanted, atol=1e-6)


def test_the_adapter_for_llama_cpp_is_what_was_merged(made):
    root, tensors = made
    check_adapter(root / "done", tensors)


def test_layers_in_a_loop_compute_the_same(made):
    """Stacked layers draw other adapters, which begin at zero too."""
    root, tensors = made
    words = ["run", str(root / "packed.json"), "--workdir", str(root / "scan"), "--set", "base.scan=true"]
    assert main(words) == 0
    check_adapter(root / "scan", tensors)
    first = [read_metrics(root / name / "metrics.jsonl")[0]["valid_loss"] for name in ("done", "scan")]
    assert first[1] == pytest.approx(first[0], rel=1e-5)
    facts = [json.loads((root / name / "report.json").read_text()) for name in ("done", "scan")]
    assert facts[0]["trainable"] == facts[1]["trainable"]
    comparison = facts[1]["comparison"]
    # float32 rounds 1e-4 of a logit of such random weights.
    assert comparison["max_difference"] < 1e-3 * comparison["max_logit"]


def test_the_report_names_it_and_its_base(made):
    root, _ = made
    file, page = root / "done" / "adapter.gguf", (root / "done" / "report.md").read_text()
    facts = json.loads((root / "done" / "report.json").read_text())
    assert facts["llama_cpp"] == {"base": "base.gguf", "bytes": file.stat().st_size, "missing": None}
    assert "`llama-cli -m base.gguf --lora adapter.gguf`" in page


def test_the_tokenizer_of_the_file_goes_with_the_merged_model(made):
    tokenizer = by_transformers(made[0] / "done" / "merged")
    assert tokenizer.decode(tokenizer("The t")["input_ids"]) == "The t"
    assert tokenizer.eos_token == "<|im_end|>"


def test_export_and_convert_write_the_same_adapter(made, tmp_path, capsys, monkeypatch):
    root, _ = made
    done, wanted = root / "done", read(root / "done" / "adapter.gguf")
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--workdir", str(done), "--format", "gguf", "--to", "exported.gguf"]) == 0
    words = ["convert", str(done / "adapter"), "converted.gguf", "--to", "gguf"]
    words += ["--base", str(root / "base.gguf")]
    assert main(words) == 0, "the base is known again by its fingerprint"
    assert "wrote converted.gguf, in llama.cpp's format" in capsys.readouterr().out
    for name in ("exported.gguf", "converted.gguf"):
        pairs, alpha, settings = read(tmp_path / name)
        assert (alpha, settings) == wanted[1:] and pairs.keys() == wanted[0].keys()
        for tensor, arrays in pairs.items():
            for array, other in zip(arrays, wanted[0][tensor], strict=True):
                np.testing.assert_array_equal(array, other, strict=True)
    line = refused(capsys, monkeypatch, *words[:2], "adapter.bin", *words[3:])
    assert "`DST` adapter.bin must be a file .gguf, which is llama.cpp's format, such as" in line


def test_convert_merges_into_the_gguf_base(made, tmp_path):
    root, _ = made
    words = ["convert", str(root / "done" / "adapter"), str(tmp_path / "merged"), "--to", "hf"]
    assert main([*words, "--base", str(root / "base.gguf")]) == 0
    close(hf.load(tmp_path / "merged")[1], hf.load(root / "done" / "merged")[1])
    assert by_transformers(tmp_path / "merged").eos_token == "<|im_end|>"


def test_a_gguf_base_has_no_head_of_classes(made, tmp_path, capsys, monkeypatch):
    root, _ = made
    model, params = hf.load(root / "done" / "merged", head="sequence_classification", num_labels=2)
    targets = {"q_proj/kernel": lora_jax.LoRA(rank=2), "score/kernel": lora_jax.Full()}
    peft.save(tmp_path / "adapter", model, *lora_jax.lorafy(params, targets))
    words = ["convert", tmp_path / "adapter", tmp_path / "merged", "--to", "hf", "--base"]
    line = refused(capsys, monkeypatch, *words, root / "base.gguf")
    assert "base.gguf is a GGUF file, and" in line and "the head of 'sequence_classification'" in line
    line = refused(capsys, monkeypatch, *words, root / "absent.gguf")
    assert "there is no config.json, and no GGUF file" in line


def test_what_llama_cpp_cannot_hold_is_said(made):
    """The run goes on without it."""
    root, _ = made
    words = ["run", str(root / "packed.json"), "--workdir", str(root / "dora"), "--set", "method.name=DoRA"]
    assert main([*words, "--set", "train.steps=1"]) == 0
    assert not (root / "dora" / "adapter.gguf").exists()
    page = (root / "dora" / "report.md").read_text()
    assert "There is no `adapter.gguf`: " in page and "DoRA" in page
    _, params = hf.load(root / "dora" / "merged")
    peft.load(root / "dora" / "adapter", hf.load(root / "dora" / "merged")[0], params, check_base=False)
