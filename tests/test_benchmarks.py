"""The bounds of `benchmarks/`, on a GPT-2 small enough to compile in seconds: counts only, no timing."""

import functools

import pytest

from benchmarks import counted_positions, step_cost
from benchmarks.training_steps import Setting, training_step
from lora_jax.models import GPT2Config


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


def test_adapting_costs_less_than_full_training():
    assert measured("adapt", "qv")["flops"] < 0.75 * measured("full", "qv")["flops"]


@pytest.mark.parametrize("adapted", ["qv", "all"])
def test_the_optimiser_keeps_two_moments_of_a_and_b_and_a_counter(adapted):
    step = training_step("adapt", Setting(adapted))  # GPT-2 small itself: shapes cost nothing
    matrices = 2 * (768 + 768) if adapted == "qv" else (768 + 2304) + (768 + 768) + 2 * (768 + 3072)
    assert step.trained_bytes == 12 * 4 * matrices * 4  # layers, rank, bytes
    assert step.optimizer_bytes == 2 * step.trained_bytes + 4


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
    config = GPT2Config(vocab_size=2048, n_positions=128, n_embd=64, n_layer=1, n_head=2)
    for way in ("LoRA, q, v", "full fine-tuning"):
        found = {
            share: counted_positions.measure(config, way, counted_positions.COUNTED[share])
            for share in ("all", "100%", "30%")
        }
        rows = counted_positions.compare(config, way, found)
        assert counted_positions.missed(rows) == []
        assert rows[2]["FLOPs / all"] < 0.6
    rows[1]["bytes / all"], rows[2]["spared / head's products"] = 1.03, 0.98
    low, gather = "0.9800 of the head's products are spared", "1.0300 of the bytes, above 1.02"
    missed = counted_positions.missed(rows)
    assert len(missed) == 2 and gather in missed[0] and low in missed[1]
