"""Tied embeddings, heads and biases that we write in PEFT's format: PEFT reads them and computes the same."""

import json

import jax
import peft_files
import pytest
from peft_files import (
    adapters,
    assert_close,
    check_both_ways,
    disturb,
    in_torch,
    output,
    output_of_theirs,
    trained,
    without_head,
    written_by_peft,
)

import lora_jax
from lora_jax import DoRA, Full, LoRA, PiSSA, VeRA
from lora_jax.interop import hf, OneSided, peft


theirs = peft_files.theirs
bases = peft_files.bases
pytestmark = peft_files.ignored_warnings


# --- tied embeddings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["wte"], ["lm_head"], ["wte", "lm_head"]])
@pytest.mark.parametrize("saved", [False, True])
def test_one_side_of_a_tied_embedding_needs_an_untied_base(torch, theirs, bases, tmp_path, targets, saved):
    base = bases("gpt2")
    options = (
        dict(r=2, target_modules=["c_attn"], modules_to_save=targets)
        if saved
        else dict(r=2, target_modules=targets)
    )
    expected = written_by_peft(torch, theirs, base, options, tmp_path / "adapter")
    model, params = hf.load(base)
    with pytest.raises(
        OneSided, match=r"one array cannot be both. Load the base with `hf.load\(dir, tie='untie'\)`"
    ):
        peft.load(tmp_path / "adapter", model, params)
    check_both_ways(torch, theirs, base, tmp_path / "adapter", tmp_path, expected, tie="untie")


@pytest.mark.parametrize("method", [LoRA(rank=2), PiSSA(rank=2), Full()])
def test_a_tied_embedding_adapted_in_both_uses_comes_back_as_one(torch, theirs, bases, tmp_path, method):
    model, params = hf.load(bases("gpt2"))
    frozen, delta = lora_jax.lorafy(
        params, {"wte/embedding": method, "c_fc/kernel": LoRA(rank=1)}, axes={".*": "in out"}
    )
    delta = trained(delta)
    expected = output(model, frozen, delta)
    peft.save(tmp_path / "ours", model, frozen, delta)
    assert_close(
        output_of_theirs(
            torch, theirs.PeftModel.from_pretrained(in_torch(bases("gpt2")), tmp_path / "ours").eval()
        ),
        expected,
    )
    again = peft.load(tmp_path / "ours", model, params)
    assert_close(output(model, *again), expected)
    assert lora_jax.count(again.delta) == lora_jax.count(lora_jax.arithmetic.as_lora(frozen, delta).delta)


def test_dora_on_a_tied_embedding_is_refused(bases, tmp_path):
    model, params = hf.load(bases("gpt2"))
    trees = lora_jax.lorafy(params, "wte/embedding", method=DoRA(rank=2))
    with pytest.raises(ValueError, match="acts in the head too.*tie='untie'"):
        peft.save(tmp_path / "ours", model, *trees)
    assert not (tmp_path / "ours").exists()


_BARE = {"bert": "BertForMaskedLM", "roberta": "RobertaModel", "deberta": "DebertaV2Model"}


# --- heads and biases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta"])
def test_a_head_is_never_left_behind(torch, theirs, bases, tmp_path, family):
    """A frozen random head, and DeBERTa's pooler, are written all the same: PyTorch's would be other
    random ones.
    """
    base = bases(family, "sequence_classification")
    bare = without_head(base, _BARE[family], tmp_path / "base")
    model, params = hf.load(bare, head="sequence_classification", num_labels=3, key=jax.random.key(1))
    frozen, delta = lora_jax.lorafy(params, "layer/.*(query|query_proj)/kernel", method=LoRA(rank=2))
    delta = trained(delta)
    peft.save(tmp_path / "ours", model, frozen, delta)
    fresh = in_torch(base)
    disturb(
        torch,
        [
            parameter
            for name, parameter in fresh.named_parameters()
            if name.startswith(("classifier", "pooler", "bert.pooler"))
        ],
        3.0,
    )
    assert_close(
        output_of_theirs(torch, theirs.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()),
        output(model, frozen, delta),
    )


def test_biases_as_peft_counts_them(bases, tmp_path):
    model, params = hf.load(bases("gpt2"))

    def word(targets):
        frozen, delta = lora_jax.lorafy(
            params, {"c_attn/kernel": LoRA(rank=1), **{pattern: Full() for pattern in targets}}
        )
        peft.save(tmp_path / "ours", model, frozen, trained(delta), overwrite=True)
        settings = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
        return settings["bias"], settings["modules_to_save"]

    assert word([]) == ("none", None)
    assert word(["c_attn/bias"]) == ("lora_only", None)
    assert word(["bias"]) == ("all", None)
    assert word(["ln_f/bias"]) == ("none", ["transformer.ln_f"])
    with pytest.raises(
        ValueError,
        match=(
            "the bias of 'transformer.h.1.attn.c_attn.bias' is frozen and that of "
            "'transformer.h.0.attn.c_attn.bias' trains"
        ),
    ):
        word(["h/0/attn/c_attn/bias"])


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("roberta", "sequence_classification"),
        ("bert", "sequence_classification"),
        ("deberta", "sequence_classification"),
        ("roberta", "token_classification"),
    ],
)
def test_an_adapted_head_is_written_merged(torch, theirs, bases, tmp_path, family, head):
    """PEFT saves it whole, and has no adapter there; and the weight of a new head is in no base."""
    base = bases(family, head)
    bare = without_head(base, _BARE[family], tmp_path / "base")
    model, params = hf.load(bare, head=head, num_labels=3, key=jax.random.key(1))
    for number, method in enumerate((LoRA(rank=2), VeRA(rank=3), DoRA(rank=2))):
        frozen, delta = lora_jax.lorafy(params, "layer/.*kernel|(classifier|pooler)/.*kernel", method=method)
        delta = trained(delta)
        peft.save(tmp_path / f"{number}", model, frozen, delta)
        found = output_of_theirs(
            torch, theirs.PeftModel.from_pretrained(in_torch(base), tmp_path / f"{number}").eval()
        )
        assert_close(found, output(model, frozen, delta))
        assert_close(
            output(model, *peft.load(tmp_path / f"{number}", model, params)), output(model, frozen, delta)
        )


def test_only_the_head_adapted_and_only_the_encoder_known(torch, theirs, bases, tmp_path):
    """Names that lack the prefix of the model: of a head, and of everything that PEFT trained without one."""
    base = bases("gpt2")
    expected = written_by_peft(
        torch,
        theirs,
        base,
        dict(r=2, target_modules=["lm_head"], modules_to_save=["ln_f"]),
        tmp_path / "head",
    )
    check_both_ways(torch, theirs, base, tmp_path / "head", tmp_path, expected, tie="untie")
    assert peft.head_of(tmp_path / "head") == {}

    bare = bases("roberta", "features")
    written_by_peft(
        torch,
        theirs,
        bare,
        dict(r=2, target_modules=["query"], bias="all", task_type="FEATURE_EXTRACTION"),
        tmp_path / "bare",
    )
    assert peft.head_of(tmp_path / "bare") == {"head": "features"}
    model, params = hf.load(bases("roberta", "sequence_classification"))
    frozen, delta = peft.load(tmp_path / "bare", model, params)
    assert len(adapters(delta)) == 2 and frozen["classifier"]["dense"]["bias"] is not None


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta"])
def test_all_embeddings_trained_in_a_model_without_a_head(torch, theirs, bases, tmp_path, family):
    """PEFT reads `embeddings` as any name that ends so, `word_embeddings` too."""
    base = bases(family, "features")
    model, params = hf.load(base)
    frozen, delta = lora_jax.lorafy(params, {"query(_proj)?/kernel": LoRA(rank=2), "embeddings/.*": Full()})
    delta = trained(delta)
    peft.save(tmp_path / "ours", model, frozen, delta)
    assert_close(
        output_of_theirs(torch, theirs.PeftModel.from_pretrained(in_torch(base), tmp_path / "ours").eval()),
        output(model, frozen, delta),
    )
