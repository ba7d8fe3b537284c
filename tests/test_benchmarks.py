"""The bounds of `benchmarks/`, on a GPT-2 small enough to compile in seconds: counts only, no timing."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from compiling import xla_flags

from benchmarks import (
    accelerator,
    counted_positions,
    in_turn,
    kept_and_copied,
    live_arrays,
    low_rank_forms,
    many_adapters,
    packing,
    profile_step,
    quantised_step,
    step_cost,
    trace_and_compile,
)
from benchmarks.peers import __main__ as peers
from benchmarks.training_steps import Setting, training_step
from experiments import config as configs
from experiments.plan import accelerators, models
from experiments.tasks.examples import Examples
from lora_jax import DoRA, LoRA
from lora_jax.models import GPT2, GPT2Config, LlamaConfig


pytestmark = pytest.mark.usefixtures("relaxed_promotion")  # optax's bias correction counts on it

# Wide against the rank and with a small vocabulary, so that what the adapters cost is not lost in rounding.
SMALL = {
    "config": GPT2Config(vocab_size=64, n_positions=32, n_embd=128, n_layer=2, n_head=4),
    "batch": 4,
    "tokens": 32,
}


@functools.cache
def measured(way, adapted, checkpoint=False, dtype="float32"):
    return step_cost.measure(way, Setting(adapted, checkpoint=checkpoint, dtype=dtype, **SMALL))


@pytest.mark.parametrize(
    "adapted, checkpoint, dtype",
    [("qv", False, "float32"), ("all", False, "float32"), ("all", True, "bfloat16")],
)
def test_adapting_costs_what_writing_it_by_hand_costs(adapted, checkpoint, dtype):
    """Rank 4 is a thirty-second of this width, not a 192nd: the copies of s·B weigh more here than in
    GPT-2 small.
    """
    ours, hand = (measured(way, adapted, checkpoint, dtype) for way in ("adapt", "handwritten"))
    assert ours["flops"] <= 1.005 * hand["flops"]
    assert ours["temporary_bytes"] <= 1.03 * hand["temporary_bytes"]


def test_the_length_of_dora_makes_no_product_again():
    """Its gradient needs the product before it, also of a layer whose input the models compute again."""
    options = {**SMALL, "batch": 32}  # so that the columns' lengths weigh little
    lora, dora = (
        step_cost.measure("adapt", Setting("all", method=method, **options))["flops"]
        for method in (LoRA(4, 32), DoRA(4, 32))
    )
    assert dora <= 1.03 * lora


def test_adapting_costs_less_than_full_training():
    assert measured("adapt", "qv")["flops"] < 0.75 * measured("full", "qv")["flops"]


@pytest.mark.parametrize("adapted", ["qv", "all"])
def test_the_optimiser_keeps_two_moments_of_a_and_b_and_a_counter(adapted):
    step = training_step("adapt", Setting(adapted))  # GPT-2 small itself: shapes cost nothing
    matrices = 2 * (768 + 768) if adapted == "qv" else (768 + 2304) + (768 + 768) + 2 * (768 + 3072)
    assert step.trained_bytes == 12 * 4 * matrices * 4  # layers, rank, bytes
    assert step.optimizer_bytes == 2 * step.trained_bytes + 4


@pytest.mark.parametrize("adapted, losses, checkpoint", [("qv", False, True), ("all", True, False)])
def test_a_step_in_a_loop_has_no_equation_more_for_a_deeper_model(adapted, losses, checkpoint):
    def found(layers, scan):
        config = dataclasses.replace(SMALL["config"], n_layer=layers)
        options = {**SMALL, "config": config, "losses": losses, "checkpoint": checkpoint}
        return trace_and_compile.of_step(Setting(adapted, scan=scan, **options))

    assert found(2, scan=True) == found(6, scan=True)
    assert found(2, scan=False) < found(6, scan=False)  # and so they are counted


def test_a_missed_bound_of_compiling_is_reported():
    row = {"setting": "q, v", "what": "both, wall", "ratio": 1.26}
    deeper = [{**row, "what": "equations", "ratio": 1.001}, {**row, "what": "compile, cpu", "ratio": 2.0}]
    assert trace_and_compile.missed([row, *deeper]) == [
        "q, v: both, wall: 1.260, above 1.25",
        "q, v: equations: 1.001, above 1.0",
    ]


def test_a_missed_bound_is_reported():
    row = {
        "FLOPs / handwritten": 1.0049,
        "bytes / handwritten": 1.006,
        "FLOPs / full": 0.69,
        "optimizer bytes": 24,
        "A and B bytes": 10,
    }
    missed = step_cost.missed(Setting("qv"), row)
    assert [line.split(": ")[1].split(" is ")[0] for line in missed] == [
        "bytes / handwritten",
        "FLOPs / full",
    ]


def test_the_head_costs_the_positions_that_are_counted():
    config = GPT2Config(vocab_size=4096, n_positions=128, n_embd=64, n_layer=1, n_head=2)
    for row in (counted_positions.ROWS[0], counted_positions.ROWS[2]):
        lines = counted_positions.measure(dataclasses.replace(row, config=config), rounds=2)
        assert [line["counted"] for line in lines] == ["all", "100%", "60%", "30%"]
        assert counted_positions.missed(lines) == []
        assert lines[3]["FLOPs / all"] < 0.6
        assert all(line["s"] > 0 for line in lines)
    lines[1]["bytes / all"], lines[3]["spared / head's products"] = 1.03, 0.98
    low, gather = "0.9800 of the head's products are spared", "1.0300 of the bytes, above 1.02"
    missed = counted_positions.missed(lines)
    assert len(missed) == 2 and gather in missed[0] and low in missed[1]


def test_packed_rows_cost_what_they_hold():
    """Eight examples of a context of 9 and a completion of 3 to 31 tokens, in rows of their own and in
    two.
    """
    found = Examples([([1] * 9, [2] * (3 + 4 * number)) for number in range(8)], 64)
    steps = [np.arange(8), np.array([0, 0, 0, 0, 1, 1, 1, 1])]
    config = configs.load(Path(packing.__file__).parent.parent / packing.CONFIG)
    subject = models.named("smollm2-135m", "float32", checkpoint=False)
    small = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    subject = dataclasses.replace(subject, model=subject.model.clone(config=small))
    apart, packed = (packing.shares(found, steps, rows) for rows in (None, 2))
    tokens, counted = [208, 8 * 14], [136, 8 * 5]
    assert dict(apart["programs"]) == {(8, 48, 32): 1, (8, 16, 16): 1}
    assert dict(packed["programs"]) == {(2, 112, 80): 1, (2, 64, 32): 1}
    for row, positions in ((apart, 8 * (48 + 16)), (packed, 2 * (112 + 64))):
        assert row["counted"] == sum(counted) / positions
        assert row["context"] == (sum(tokens) - sum(counted)) / positions
        assert row["counted"] + row["context"] + row["padding"] == pytest.approx(1)
    assert apart["logits"] == sum(counted) / (8 * 48) and packed["logits"] == sum(counted) / (2 * 112)
    each, ours = (packing.traced(subject, config, row) for row in (apart, packed))
    assert ours < 0.8 * each
    made = packing.compiled(subject, config, packed)
    assert made["commonest"] == "2 × 112, 80 logits, 1 steps"
    assert made["traced / XLA's"] == pytest.approx(
        1, rel=0.1
    )  # of so small a model more is element by element


def test_a_missed_bound_of_packing_is_reported():
    row = {"examples": 8, "rows": 2, "padding": 0.101, "FLOPs / a row each": 0.81, "traced / XLA's": 0.98}
    assert [line.split(": ")[1] for line in packing.missed([row])] == [
        "0.1010 of the positions are padding, above 0.10",
        "0.8100 of the FLOPs, above 0.80",
        "the traced step has 0.9800 of the compiled one's FLOPs",
    ]
    assert packing.missed([{**row, "rows": 4, "traced / XLA's": 1.0}]) == []


def test_a_missed_bound_of_many_adapters_is_reported():
    bytes_ = {"base MB": 500.0, "of one, argument MB": 510.0, "argument MB": 580.0}
    row = {
        "model": "m",
        "batches": "b",
        "over separate": 0.6,
        "products with W": 9,
        "of one": 9,
        "batched": 0,
    }
    assert many_adapters.missed(row | bytes_, "cpu") == []
    assert [line.split(": ")[1] for line in many_adapters.missed(row | bytes_, "gpu")] == [
        "0.600 of the time of separate steps, above 0.5"
    ]
    worse = {"batched": 1, "argument MB": 4080.0}
    assert len(many_adapters.missed(row | bytes_ | worse, "cpu")) == 2


def test_heads_are_the_only_arrays_that_are_transposed():
    """In a process with one device, as a user has it: the tests have eight, which keep batch and tokens
    apart.
    """
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.kept_and_copied", "--layers", "1", "--only", "adapt, losses"],
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "all bounds are met" in found.stdout


def test_copies_are_counted():
    text = """
  %copy.3 = f32[4,128,768]{2,1,0} copy(%transpose.1), metadata={op_name="copy(x)"}
  ROOT %copy = bf16[3]{0} copy(%a)
  %copy_fusion = f32[9]{0} fusion(%copy.3), kind=kLoop
"""
    assert kept_and_copied.copied(text) == 4 * 128 * 768 * 4 + 3 * 2


@pytest.mark.parametrize("form", low_rank_forms.FORMS)
def test_the_forms_of_the_low_rank_product_are_one_function(form):
    arrays = low_rank_forms.arrays_of(24, (16, 8), 12)
    with jax.default_matmul_precision("highest"):
        found, wanted = (
            low_rank_forms.compiled(low_rank_forms.FORMS[name], *arrays)(*arrays) for name in (form, "apart")
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, wanted)


def test_peers_that_compute_something_else_are_refused():
    """Full fine-tuning has the weights before they were quantised."""
    losses = {
        "lora_jax": 2.0,
        "qwix": 2.0001,
        "full fine-tuning, JAX": 2.01,
        "full fine-tuning, PyTorch": 2.01,
    }
    found = {way: {"first loss": loss} for way, loss in losses.items()} | {"PEFT": {"cannot": "a reason"}}
    quantised, plain = peers.Row(method="QLoRA"), peers.Row()
    peers.check_losses(quantised, found, 1e-3)
    with pytest.raises(RuntimeError, match="first losses of 'gpt2, 8 x 64, all-linear, LoRA' differ"):
        peers.check_losses(plain, found, 1e-3)
    for way in ("qwix", "full fine-tuning, PyTorch"):
        with pytest.raises(RuntimeError, match="differ, so that not the same is timed"):
            peers.check_losses(quantised, found | {way: {"first loss": 2.1}}, 1e-3)


def test_the_table_of_peers_keeps_the_rows_of_earlier_runs():
    first, second, third = (row.name for row in peers.ROWS[:3])
    kept = [{"row": third, "way": "qwix", "commit": "old"}, {"row": "gone", "way": "qwix", "commit": "old"}]
    found = [{"row": first, "way": "lora_jax"}, {"row": first, "way": "qwix"}]
    lines = peers.in_order(kept, found, {"commit": "new", "rounds": 5})
    assert [(line["row"], line["way"], line["commit"]) for line in lines] == [
        (first, "lora_jax", "new"),
        (first, "qwix", "new"),
        (third, "qwix", "old"),
    ]


def test_operations_of_a_profile_have_their_kind_from_the_names_of_the_compiler():
    names = {
        "products": ["dot.32", "dot", "ynn_fusion.3", "dot_add_fusion.1"],
        "copies": ["copy.1", "transpose_copy_fusion", "copy_bitcast_fusion.12"],
        "element by element": ["multiply_add_fusion.2", "fusion.7", "reduce"],
    }
    for kind, operations in names.items():
        assert [profile_step.kind(name) for name in operations] == [kind] * len(operations)


def test_what_the_run_on_an_accelerator_needs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["accelerator", "--data", str(tmp_path)])
    assert accelerator.main() == 2
    said = capsys.readouterr().err
    assert "--base DIR: the weights of GPT-2 medium" in said and "--parts table adapters" in said
    assert f"no file `{tmp_path / 'e2e/lora_nlg_txt/train.txt.xz'}`" in said
    (tmp_path / "config.json").touch()
    names = [line.rpartition("/")[2] for line in accelerator.missing(tmp_path, tmp_path) if "--base" in line]
    assert names == ["model.safetensors`", "tokenizer.json`"]


def test_utilisation_is_of_the_products_that_a_way_needs():
    lines = [
        {"way": "lora_jax", "GFLOP": 200.0, "s": 0.01},
        {"way": "PEFT", "s": 0.02},
        {"way": "full fine-tuning, JAX", "GFLOP": 300.0, "s": 0.01},
        {"way": "full fine-tuning, PyTorch", "s": 0.03},
        {"way": "qwix", "note": "not installed"},
    ]
    accelerator.utilisation(lines, accelerators.peak("NVIDIA H200", "float32"))
    assert [line.get("utilisation") for line in lines] == [0.0404, 0.0202, 0.0607, 0.0202, None]
    assert accelerators.peak("NVIDIA H200 NVL", "float32") is accelerators.peak("cpu", "bfloat16") is None
    assert accelerators.peak("TPU v5 lite", "bfloat16") == 197e12
    assert set(accelerators.TERAFLOPS) == set(accelerators.GIGABYTES)


@pytest.mark.slow
@pytest.mark.pytorch  # a finished run compares what it has written with PyTorch
def test_the_script_for_an_accelerator_runs_small_on_a_cpu():
    options = "--parts table run --ways lora_jax --layers 1 --rounds 2 --steps 3"
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.accelerator", *options.split()],
        env={**os.environ, "XLA_FLAGS": xla_flags(devices=1), "PATH": ""},  # METEOR would start java
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "| gpt2, 8 x 64, all-linear, LoRA | lora_jax |" in found.stdout
    assert "| e2e_small | 3 |" in found.stdout


def test_a_step_on_a_quantised_base_unpacks_one_matrix_at_a_time(monkeypatch):
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=256, n_layer=2, n_head=4)
    model = lambda row, layers: GPT2(config, scan=row.scan)
    monkeypatch.setattr(quantised_step.Row, "described", model)
    formats = {name: quantised_step.FORMATS[name] for name in ("nf4", "Q4_K")}
    monkeypatch.setattr(quantised_step, "FORMATS", formats)
    row = dataclasses.replace(quantised_step.ROWS[0], batch=4, tokens=20, scan=True)
    lora, *lines = quantised_step.measure(row, layers=0, rounds=2)
    assert [line["base"] for line in lines] == ["nf4", "Q4_K"]
    for line in lines:
        assert line["unpacked at once"] == 1
        assert 1 < line["FLOPs over LoRA"] < 1.5
        assert line["frozen MB"] < 0.3 * lora["frozen MB"]
        assert quantised_step.missed([{**line, "over LoRA": 1.3}]) == []
        worse = {"over LoRA": 1.31, "unpacked at once": 2, "more than LoRA, MB": 2.0}
        missed = quantised_step.missed([{**line, **worse}])
        assert len(missed) == (3 if line["base"] == "nf4" else 2)


def test_lives_of_arrays_are_counted():
    """A weight lives on by another name, as a part of a tuple, and inside a loop beside those outside."""
    text = """HloModule step, is_scheduled=true

%fused (p: f32[6]) -> f32[2,3] {
  %p = f32[6]{0} parameter(0)
  ROOT %b = f32[2,3]{1,0} bitcast(%p)
}

%body (state: (s32[], f32[2,3])) -> (s32[], f32[2,3]) {
  %state = (s32[], f32[2,3]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %inner = f32[2,3]{1,0} fusion(%n), kind=kLoop, calls=%fused
  %sum = f32[4]{0} dot(%inner, %inner)
  ROOT %result = (s32[], f32[2,3]{1,0}) tuple(%n, %inner)
}

ENTRY %main (w: f32[2,3], x: f32[4]) -> f32[4] {
  %w = f32[2,3]{1,0} parameter(0)
  %x = f32[4]{0} parameter(1)
  %first = f32[2,3]{1,0} fusion(%w), kind=kLoop, calls=%fused
  %flat = f32[6]{0} bitcast(%first)
  %second = f32[3,2]{1,0} transpose(%flat), dimensions={1,0}
  %y = f32[4]{0} dot(%x, %second)
  %zero = s32[] constant(0)
  %tuple = (s32[], f32[2,3]{1,0}) tuple(%zero, %first)
  %while = (s32[], f32[2,3]{1,0}) while(%tuple), condition=%condition, body=%body
  ROOT %z = f32[4]{0} add(%y, %y)
}
"""
    assert live_arrays.most_at_once(text, {6}) == 2
    assert live_arrays.most_at_once(text, {4}) == 2
    assert live_arrays.most_at_once(text.replace("tuple(%zero, %first)", "tuple(%zero, %w)"), {6}) == 2
    alone = text.replace("tuple(%zero, %first)", "tuple(%zero, %w)").replace("transpose(%flat)", "dot(%flat)")
    assert live_arrays.most_at_once(alone.replace("f32[3,2]", "f32[5]"), {6}) == 1


def test_what_is_timed_takes_turns():
    asked = []
    found = in_turn.taken({way: functools.partial(asked.append, way) for way in "abc"}, 3)
    assert "".join(asked) == "abcbcacab"
    assert found == {way: [None] * 3 for way in "abc"}
    own, base = [2.0, 9.0, 8.0, 4.0, 12.0], [2.0, 3.0, 4.0, 1.0, 2.0]
    assert in_turn.ratio(own, base) == (3.0, 1.75)  # of 1, 2, 3, 4 and 6: quartiles at 1.5 and 5
