"""What is no whole GGUF file of a model that is supported is one clear error."""

import sys

import numpy as np
import pytest
from gguf_files import gguf as package, write

from lora_jax.interop import gguf


def refused(file, match, **options):
    with pytest.raises(ValueError, match=match) as caught:
        gguf.load(file, **options)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    "how, match",
    [
        ({"drop": r"blk\.1\.attn_k\.weight"}, r"'blk.1.attn_k.weight' is missing"),
        (
            {"also": {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}},
            "'blk.0.attn_sinks.weight' is unexpected",
        ),
        ({"told": {"feed_forward_length": 256}}, r"'blk.0.ffn_\w+.weight' has shape"),
        (
            {"changes": {"attention.scale": 0.5}},
            "0.5 for `llama.attention.scale`, which is not supported: it may",
        ),
        ({"changes": {"rope.dimension_count": 32}}, "32 for `llama.rope.dimension_count`.* must be 64"),
        ({"changes": {"attention.causal": False}}, "False for `llama.attention.causal`.* must be True"),
        ({"changes": {"rope.scaling.type": "longrope"}}, "'longrope' for `llama.rope.scaling.type`"),
        ({"changes": {"expert_count": 8}}, "8 for `llama.expert_count`"),
        (
            {"told": {"attention.head_count_kv": [2, 2]}},
            r"\[2, 2\] for `llama.attention.head_count_kv`.*one int",
        ),
        ({"told": {"block_count": 3}}, "3 for `llama.block_count`.* of 2 layers"),
        ({"extra": {"general.type": "adapter"}}, "type 'adapter' .`general.type`., not a model"),
        ({"extra": {"split.count": 3}}, "one of 3 parts of a model; join them first.*--merge"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)
def test_other_contents(how, match, tmp_path):
    file = tmp_path / "model.gguf"
    write(file, **how)
    refused(file, match)


def test_other_settings(tmp_path):
    file = tmp_path / "model.gguf"
    write(file, "gptneox")
    refused(file, "architecture 'gptneox' .*supported are .'gemma2', 'gemma3', 'llama', 'qwen2', 'qwen3'")
    write(file, "qwen2", changes={"attention.sliding_window": 8}, bias=("attn_q", "attn_k", "attn_v"))
    refused(file, "8 for `qwen2.attention.sliding_window`")
    write(file, changes={"context_length": None})
    refused(file, "no `llama.context_length`, which every model needs")
    write(file, changes={"attention.layer_norm_rms_epsilon": 1})
    refused(file, "has 1 for `llama.attention.layer_norm_rms_epsilon`.*one float")
    with pytest.raises(ValueError, match="`tie` is 'knot'; it must be 'share' or 'untie'"):
        gguf.load(file, tie="knot")
    with pytest.raises(ValueError, match="has no tokenizer .`tokenizer.ggml.tokens`"):
        gguf.tokenizer(file)
    pytest.importorskip("transformers")
    write(file, extra={"tokenizer.ggml.model": "plamo2", "tokenizer.ggml.tokens": ["a"]})
    with pytest.raises(ValueError, match="has a tokenizer that transformers .* cannot make .*'plamo2'"):
        gguf.tokenizer(file)


def test_not_finite(tmp_path):
    file = tmp_path / "model.gguf"
    write(file, drop="output_norm.weight", also={"output_norm.weight": np.full(256, np.nan, np.float32)})
    refused(file, "256 values in 'output_norm.weight' that are infinite or no numbers")
    gguf.load(file, verify=False)


def test_a_type_that_is_not_dequantised(tmp_path):
    file = tmp_path / "model.gguf"
    write(file, kinds=("F32", "Q8_K"))
    refused(file, "'blk.0.attn_q.weight' as Q8_K, which the `gguf` package cannot dequantise")


# -- damage --------------------------------------------------------------------------------------------------


def test_no_file(tmp_path):
    refused(tmp_path / "nowhere.gguf", "is no file")
    refused(tmp_path, "is a directory; pass the .gguf file in it")
    for content in (b"", b"GG", b"PK\x03\x04" + bytes(64)):
        (tmp_path / "other.gguf").write_bytes(content)
        refused(tmp_path / "other.gguf", "is not a GGUF file")


def test_cut_off_anywhere(tmp_path):
    file, part = tmp_path / "model.gguf", tmp_path / "part.gguf"
    write(file, kinds=("Q8_0",), extra={"tokenizer.ggml.tokens": ["a", "b"], "x": [1, 2, 3]})
    content = file.read_bytes()
    header = package.GGUFReader(file).data_offset
    rng = np.random.default_rng(0)
    for length in [*rng.integers(4, header, 150), header, len(content) - 40]:
        part.write_bytes(content[:length])
        refused(part, "was cut off")


def test_a_flipped_byte_never_hangs(tmp_path):
    """In the header, where a length decides how long a reader runs: an error of ours, or a model."""
    file, other = tmp_path / "model.gguf", tmp_path / "other.gguf"
    write(file, changes={"block_count": 1}, extra={"tokenizer.ggml.tokens": ["a", "b"], "x": [1, 2, 3]})
    content = file.read_bytes()
    header = package.GGUFReader(file).data_offset
    rng = np.random.default_rng(1)
    refusals = 0
    for at in rng.integers(4, header, 250):
        damaged = bytearray(content)
        damaged[at] ^= 1 << rng.integers(8)
        other.write_bytes(damaged)
        try:
            gguf.load(other, place=lambda path, array: None)
        except ValueError:
            refusals += 1
    assert refusals > 150


def test_other_versions(tmp_path):
    file = tmp_path / "model.gguf"
    write(file)
    content = file.read_bytes()
    file.write_bytes(content[:4] + b"\x01" + content[5:])
    refused(file, "is GGUF of version 1; versions 2 and 3 are read")
    writer = package.GGUFWriter(str(file), "llama", endianess=package.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    refused(file, "was written for big-endian machines")


def test_a_type_that_is_too_new(tmp_path):
    file = tmp_path / "model.gguf"
    write(file, kinds=("Q8_0",))
    content = file.read_bytes()
    name = b"token_embd.weight"
    at = content.index(name) + len(name) + 4 + 16
    file.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
    refused(file, "stores 'token_embd.weight' in type 255, which the installed `gguf` package does not know")


# -- packages ------------------------------------------------------------------------------------------------


def test_what_is_not_installed(tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    write(file, extra={"tokenizer.ggml.tokens": ["a"]})
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"tokenizer` needs 'transformers'.*lora_jax\[experiments\]"
    ):
        gguf.tokenizer(file)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r"`lora_jax.interop.gguf` needs 'gguf'.*lora_jax\[gguf\]"):
        gguf.load(file)
