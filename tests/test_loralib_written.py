"""What we write in loralib's format: its layers read it and compute the same."""

import os
import zipfile

import jax
import jax.numpy as jnp
import loralib_files
import numpy as np
import pytest
from loralib_files import (
    adapters,
    assert_close,
    axes,
    check_continued,
    in_torch,
    made,
    output,
    output_in_torch,
    QUERIES,
    read_in_torch,
    trained,
    whole,
    with_layers,
)

import lora_jax
from lora_jax import AdaLoRA, DeltaLoRA, DoRA, DyLoRA, Full, LoRA, LoRAFA, PiSSA, VeRA
from lora_jax.interop import _torch_files, hf, loralib, OneSided


theirs = loralib_files.theirs
bases = loralib_files.bases


_METHODS = {
    "LoRA": LoRA(rank=3, alpha=6),
    "rsLoRA": LoRA(rank=3, alpha=6, rs=True),
    "LoRA of blocks": LoRA(rank=2, alpha=8, blocks=(True, False, True)),
    "rsLoRA of blocks": LoRA(rank=2, alpha=8, rs=True, blocks=(False, True, True)),
    "LoRA of all blocks": LoRA(rank=2, alpha=8, blocks=(True, True, True)),
    "LoRA-FA": LoRAFA(rank=2),
    "DyLoRA": DyLoRA(rank=2),
    "Delta-LoRA": DeltaLoRA(rank=2),
    "PiSSA": PiSSA(rank=2),
    "AdaLoRA": AdaLoRA(rank=3),
    "VeRA": VeRA(rank=5),
}


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", _METHODS)
def test_every_method_computes_the_same_in_loralib(torch, theirs, bases, tmp_path, name, scan):
    blocks = getattr(_METHODS[name], "blocks", None)
    model, _, frozen, delta = made(bases("gpt2"), {"attn/c_attn/kernel": _METHODS[name]}, scan)
    expected = output(model, frozen, delta)
    alpha = loralib.save(tmp_path / "ours.pt", model, frozen, delta)
    assert_close(read_in_torch(torch, theirs, bases("gpt2"), tmp_path / "ours.pt", alpha, blocks), expected)

    # The layout does not matter: what a scanned model wrote, an unscanned one reads.
    model, params = hf.load(bases("gpt2"), scan=not scan)
    again = loralib.load(tmp_path / "ours.pt", model, params, alpha=alpha, blocks=blocks)
    assert_close(output(model, *again), expected)
    assert {leaf.spec.method.blocks for leaf in adapters(again.delta).values()} == {blocks}
    assert loralib.save(tmp_path / "again.pt", model, *again) == alpha
    assert (tmp_path / "again.pt").read_bytes() == (tmp_path / "ours.pt").read_bytes()


def test_of_different_alphas_b_takes_the_difference(torch, theirs, bases, tmp_path):
    dir = bases("gpt2")
    targets = {
        "attn/c_attn/kernel": LoRA(rank=2, alpha=8),
        "c_fc/kernel": LoRA(rank=3, alpha=6, rs=True),
        "h/0/mlp/c_proj/kernel": LoRA(rank=2, alpha=2),
        "wpe/embedding": PiSSA(rank=1, alpha=8),
    }
    model, params, frozen, delta = made(dir, targets)
    alpha = loralib.save(tmp_path / "ours.pt", model, frozen, delta)
    assert alpha == 8
    assert_close(read_in_torch(torch, theirs, dir, tmp_path / "ours.pt", alpha), output(model, frozen, delta))
    tensors = _torch_files.read(tmp_path / "ours.pt")
    for module, factor in {
        "h.1.attn.c_attn": 1,
        "h.1.mlp.c_fc": 6 * 3**0.5 / 8,
        "h.0.mlp.c_proj": 2 / 8,
    }.items():
        arrays = adapters(delta)[f"{module.replace('.', '/')}/kernel"].arrays
        assert np.array_equal(tensors[f"transformer.{module}.lora_A"], np.asarray(arrays["a"]).T)
        np.testing.assert_allclose(
            tensors[f"transformer.{module}.lora_B"],
            factor * np.asarray(arrays["b"]).T,
            rtol=0 if factor in (1, 0.25) else 1e-6,
        )
    assert_close(
        output(model, *loralib.load(tmp_path / "ours.pt", model, params, alpha=8)),
        output(model, frozen, delta),
    )


def test_an_alpha_of_zero_is_no_common_one(bases, tmp_path):
    model, params, frozen, delta = made(
        bases("gpt2"),
        {"attn/c_attn/kernel": LoRA(rank=2, alpha=0), "h/1/mlp/c_fc/kernel": LoRA(rank=2, alpha=8)},
    )
    assert loralib.save(tmp_path / "ours.pt", model, frozen, delta) == 8
    assert_close(
        output(model, *loralib.load(tmp_path / "ours.pt", model, params, alpha=8)),
        output(model, frozen, delta),
    )


@pytest.mark.parametrize("alpha", [0.9, 16 * 3**0.5, -2.5])
def test_alphas_that_are_no_integers_stay_what_they_are(bases, tmp_path, alpha):
    """To the bit: multiplied by a rank that it was divided by, a number is not always what it was."""
    targets = {
        "h/0/attn/c_attn/kernel": LoRA(rank=3, alpha=alpha),
        "attn/c_attn/kernel": LoRA(rank=5, alpha=alpha),
        "c_fc/kernel": LoRA(rank=7, alpha=alpha),
    }
    model, params, frozen, delta = made(bases("gpt2"), targets)
    assert loralib.save(tmp_path / "ours.pt", model, frozen, delta) == alpha
    again = loralib.load(tmp_path / "ours.pt", model, params, alpha=alpha)
    assert {leaf.spec.method.alpha for leaf in adapters(again.delta).values()} == {alpha}
    for one, other in zip(jax.tree.leaves(delta), jax.tree.leaves(again.delta), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("scan", [False, True])
def test_lora_drop_computes_the_same_in_loralib(torch, theirs, bases, tmp_path, scan):
    dir = bases("gpt2 of three layers")
    model, params = hf.load(dir, scan=scan)
    frozen, delta = lora_jax.lorafy(params, "attn/c_attn/kernel", method=LoRA(rank=2), axes=axes(scan))
    importance = {path: np.ones(leaf.spec.sizes("layer")) for path, leaf in adapters(delta).items()}
    shared = trained(lora_jax.drop.share(delta, importance, threshold=0.01))
    assert lora_jax.count(shared) == lora_jax.count(delta) * 2 // 3, "two layers of three have one adapter"
    alpha = loralib.save(tmp_path / "ours.pt", model, frozen, shared)
    assert_close(
        read_in_torch(torch, theirs, dir, tmp_path / "ours.pt", alpha), output(model, frozen, shared)
    )
    again = loralib.load(tmp_path / "ours.pt", model, params, alpha=alpha)
    assert_close(output(model, *again), output(model, frozen, shared))
    assert lora_jax.count(again.delta) == lora_jax.count(delta)


@pytest.mark.parametrize("family", QUERIES)
def test_heads_that_train_are_written(torch, theirs, bases, tmp_path, family):
    dir = bases(family, "sequence_classification")
    model, params, frozen, delta = made(
        dir, {"layer/.*(query|value)(_proj)?/kernel": LoRA(rank=2), "classifier/.*|pooler/.*": Full()}
    )
    alpha = loralib.save(tmp_path / "ours.pt", model, frozen, delta)
    assert_close(read_in_torch(torch, theirs, dir, tmp_path / "ours.pt", alpha), output(model, frozen, delta))
    again = loralib.load(tmp_path / "ours.pt", model, params, alpha=alpha)
    assert whole(again.delta) == whole(delta) and len(whole(delta)) == 4
    for one, other in zip(jax.tree.leaves(delta), jax.tree.leaves(again.delta), strict=True):
        assert np.array_equal(one, other)


_HEADS = {
    ("roberta", "sequence_classification"): {"head": "sequence_classification", "num_labels": 3},
    ("roberta", "token_classification"): {"head": "token_classification", "num_labels": 3},
    ("roberta", "question_answering"): {"head": "question_answering"},
    ("roberta", "masked_lm"): {},
    ("bert", "sequence_classification"): {"head": "sequence_classification", "num_labels": 3},
    ("bert", "token_classification"): {},  # or the half of a head for sequences
    ("bert", "question_answering"): {"head": "question_answering"},
    ("bert", "masked_lm"): {},
    ("deberta", "sequence_classification"): {"head": "sequence_classification", "num_labels": 3},
    ("deberta", "token_classification"): {},  # or the half of a head for sequences
    ("deberta", "question_answering"): {"head": "question_answering"},
}


@pytest.mark.parametrize(("family", "head"), _HEADS)
@pytest.mark.parametrize("front", ["", "module."])
def test_the_head_that_a_file_brings_is_told_by_its_tensors(bases, tmp_path, family, head, front):
    model, _, frozen, delta = made(
        bases(family, head),
        {"layer/.*query(_proj)?/kernel": LoRA(rank=1), "(classifier|pooler|qa_outputs)/.*|.*bias": Full()},
    )
    loralib.save(tmp_path / "ours.pt", model, frozen, delta)
    tensors = {front + name: array for name, array in _torch_files.read(tmp_path / "ours.pt").items()}
    _torch_files.write(tmp_path / "ours.bin", tensors, facts={})
    assert loralib.head_of(tmp_path / "ours.bin") == _HEADS[family, head]
    # Half a head is none.
    half = {
        name: array
        for name, array in tensors.items()
        if not name.endswith(("out_proj.weight", "classifier.weight", "qa_outputs.weight"))
    }
    _torch_files.write(tmp_path / "half.bin", half, facts={})
    assert loralib.head_of(tmp_path / "half.bin") == {}


def test_adapters_of_heads_are_known_without_a_prefix(torch, theirs, bases, tmp_path):
    dir = bases("roberta", "masked_lm")
    model, params, frozen, delta = made(
        dir, {"layer/.*query/kernel": LoRA(rank=2), "lm_head/.*kernel": LoRA(rank=1)}
    )
    alpha = loralib.save(tmp_path / "ours.pt", model, frozen, delta)
    assert "lm_head.dense.lora_A" in _torch_files.read(tmp_path / "ours.pt")
    assert_close(
        output(model, *loralib.load(tmp_path / "ours.pt", model, params, alpha=alpha)),
        output(model, frozen, delta),
    )


@pytest.mark.parametrize("targets", ["query/kernel", "(query|classifier.*)/kernel"])
def test_a_new_head_comes_along_frozen_or_adapted(torch, theirs, bases, tmp_path, targets):
    """Whoever loads the file has drawn another one."""
    dir = bases("roberta", "sequence_classification")
    model, params, frozen, delta = made(dir, {targets: LoRA(rank=1)})
    alpha = loralib.save(tmp_path / "ours.pt", model, frozen, delta)
    assert loralib.head_of(tmp_path / "ours.pt") == {"head": "sequence_classification", "num_labels": 3}
    assert_close(read_in_torch(torch, theirs, dir, tmp_path / "ours.pt", alpha), output(model, frozen, delta))
    other = {**params, "classifier": jax.tree.map(lambda leaf: leaf + 1, params["classifier"])}
    assert_close(
        output(model, *loralib.load(tmp_path / "ours.pt", model, other, alpha=alpha)),
        output(model, frozen, delta),
    )


def test_what_other_heads_leave_over_is_a_part_of_this_one(bases, tmp_path):
    """RoBERTa's pooler of pretraining, which trains where it is the head."""
    model, params, frozen, delta = made(
        bases("roberta", "features"), {"query/kernel": LoRA(rank=2), "pooler/.*": Full()}
    )
    loralib.save(tmp_path / "ours.pt", model, frozen, delta)
    again = loralib.load(tmp_path / "ours.pt", model, params, alpha=16)
    assert np.array_equal(again.delta["pooler"]["dense"]["kernel"], delta["pooler"]["dense"]["kernel"])


def test_a_bias_that_trains_in_some_layers_is_that_of_a_stack(bases, tmp_path):
    model, params, frozen, delta = made(bases("gpt2"), {"c_attn/kernel": LoRA(rank=2), "c_attn/bias": Full()})
    delta["h"]["0"]["attn"]["c_attn"]["bias"] = params["h"]["0"]["attn"]["c_attn"]["bias"]
    loralib.save(tmp_path / "ours.pt", model, frozen, delta)
    assert whole(loralib.load(tmp_path / "ours.pt", model, params, alpha=16).delta) == {
        "h/1/attn/c_attn/bias"
    }
    model, params = hf.load(bases("gpt2"), scan=True)
    again = loralib.load(tmp_path / "ours.pt", model, params, alpha=16)
    for layer in "01":
        assert np.array_equal(
            again.delta["h"]["attn"]["c_attn"]["bias"][int(layer)],
            delta["h"][layer]["attn"]["c_attn"]["bias"],
        )


def test_dtypes_are_kept(bases, tmp_path):
    for dtype in (jnp.bfloat16, jnp.float16):
        model, params, frozen, delta = made(
            bases("gpt2"), {"c_attn/kernel": LoRA(rank=2, dtype=dtype), "ln_f/.*": Full()}
        )
        loralib.save(tmp_path / "ours.pt", model, frozen, delta, overwrite=True)
        again = loralib.load(tmp_path / "ours.pt", model, params, alpha=16)
        for one, other in zip(jax.tree.leaves(delta), jax.tree.leaves(again.delta), strict=True):
            assert one.dtype == other.dtype and np.array_equal(one, other)
        assert {leaf.spec.method.dtype for leaf in adapters(again.delta).values()} == {np.dtype(dtype)}


def test_a_quantised_base_does_not_matter(bases, tmp_path):
    model, params, frozen, delta = made(bases("gpt2"), {"c_attn/kernel": LoRA(rank=2)})
    packed = lora_jax.quantize(frozen, "nf4", targets=".*kernel")
    loralib.save(tmp_path / "packed.pt", model, packed, delta)
    loralib.save(tmp_path / "plain.pt", model, frozen, delta)
    one, other = (_torch_files.read(tmp_path / f"{name}.pt") for name in ("packed", "plain"))
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    assert_close(
        output(model, *loralib.load(tmp_path / "plain.pt", model, packed, alpha=16)),
        output(model, packed, delta),
    )
    # Whether a weight has been trained, packed parameters cannot tell, and shapes neither.
    other["transformer.h.0.mlp.c_fc.weight"] = np.asarray(params["h"]["0"]["mlp"]["c_fc"]["kernel"])
    _torch_files.write(tmp_path / "full.pt", other, facts={})
    assert not whole(loralib.load(tmp_path / "full.pt", model, params, alpha=16).delta)
    for kind, base in {"quantised": packed, "a shape": jax.eval_shape(lambda: params)}.items():
        with pytest.raises(
            ValueError,
            match=(
                f"'transformer.h.0.mlp.c_fc.weight', and that of `params` is {kind}: .* Load onto plain "
                "parameters"
            ),
        ):
            loralib.load(tmp_path / "full.pt", model, base, alpha=16)
    assert (
        len(
            adapters(
                loralib.load(tmp_path / "plain.pt", model, jax.eval_shape(lambda: params), alpha=16).delta
            )
        )
        == 2
    )


def test_what_has_no_layout_in_loralib_is_refused(bases, tmp_path):
    def save(dir, targets, axes=None, **options):
        model, params = hf.load(dir)
        loralib.save(
            tmp_path / "new" / "ours.pt", model.clone(**options), *lora_jax.lorafy(params, targets, axes=axes)
        )

    with pytest.raises(ValueError, match="the DoRA adapter of 'h/0/attn/c_attn/kernel' is no LoRA"):
        save(bases("gpt2"), {"c_attn/kernel": DoRA(rank=2)})
    with pytest.raises(
        ValueError, match="'deberta.encoder.conv.conv' is a convolution, .* write PEFT's format, `peft.save`"
    ):
        save(
            bases("deberta", "features"),
            {"conv/conv/kernel": LoRA(rank=2), "query_proj/kernel": LoRA(rank=2)},
            {"conv/conv/kernel": "in in out"},
        )
    with pytest.raises(ValueError, match=r"`delta` holds no adapter, .* write the model, `hf.save"):
        save(bases("gpt2"), {"bias": Full()})
    with pytest.raises(ValueError, match="`delta` is not of `model`, whose layers are stacked"):
        save(bases("gpt2"), {"c_attn/kernel": LoRA(rank=2)}, scan=True)
    assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten_unless_told_and_nothing_lost(bases, tmp_path, monkeypatch):
    model, _, frozen, delta = made(bases("gpt2"), {"c_attn/kernel": LoRA(rank=2)})
    file = tmp_path / "ours.pt"
    loralib.save(file, model, frozen, delta)
    before, other = file.read_bytes(), trained(delta, seed=6)
    with pytest.raises(
        ValueError, match="ours.pt exists; choose another name, or replace it with `overwrite=True`"
    ):
        loralib.save(file, model, frozen, other)
    with pytest.raises(ValueError, match="exists; choose another name[.]$"):
        loralib.save(tmp_path, model, frozen, other, overwrite=True)

    def fail(*_):
        raise OSError("disk full")

    for place in ((zipfile.ZipFile, "writestr"), (os, "replace")):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
            patch.setattr(*place, fail)
            loralib.save(file, model, frozen, other, overwrite=True)
        assert file.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["ours.pt"]
    loralib.save(file, model, frozen, other, overwrite=True)
    assert file.read_bytes() != before and [entry.name for entry in tmp_path.iterdir()] == ["ours.pt"]


# --- tied embeddings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [LoRA(rank=2), PiSSA(rank=2), Full()], ids=lambda method: type(method).__name__
)
@pytest.mark.parametrize("family", ["gpt2", "roberta"])
def test_a_tied_embedding_is_in_the_file_for_both_uses_and_comes_back_as_one(
    torch, theirs, bases, tmp_path, family, method
):
    dir = bases(family, None if family == "gpt2" else "masked_lm")
    targets = {"wte/embedding|word_embeddings/embedding": method, "c_fc/kernel|query/kernel": LoRA(rank=1)}
    model, params, frozen, delta = made(dir, {pattern: targets[pattern] for pattern in targets})
    expected = output(model, frozen, delta)
    alpha = loralib.save(tmp_path / "ours.pt", model, frozen, delta)
    uses = (
        ("transformer.wte", "lm_head")
        if family == "gpt2"
        else ("roberta.embeddings.word_embeddings", "lm_head.decoder")
    )
    ending = "weight" if isinstance(method, Full) else "lora_A"
    tensors = _torch_files.read(tmp_path / "ours.pt")
    assert {f"{use}.{ending}" for use in uses} <= tensors.keys()
    assert_close(read_in_torch(torch, theirs, dir, tmp_path / "ours.pt", alpha), expected)

    again = loralib.load(tmp_path / "ours.pt", model, params, alpha=alpha)
    assert_close(output(model, *again), expected)
    assert lora_jax.count(again.delta) == lora_jax.count(lora_jax.arithmetic.as_lora(frozen, delta).delta)

    for use in uses:
        one = {
            name: array
            for name, array in tensors.items()
            if not name.startswith(use + ".") or name.endswith("bias")
        }
        _torch_files.write(tmp_path / "one.pt", one, facts={})
        with pytest.raises(
            OneSided, match=r"one array cannot be both. Load the base with `hf.load\(dir, tie='untie'\)`"
        ):
            loralib.load(tmp_path / "one.pt", model, params, alpha=alpha)


@pytest.mark.parametrize("use", ["wte", "lm_head"])
def test_one_use_of_a_tied_embedding_needs_an_untied_base(torch, theirs, bases, tmp_path, use):
    """What loralib's own layers give, of which each is of one module."""
    dir = bases("gpt2")
    adapted = with_layers(torch, theirs, in_torch(dir), {use: {"r": 2}}).eval()
    torch.save(state := theirs.lora_state_dict(adapted), tmp_path / "theirs.pt")
    model, params = hf.load(dir)
    with pytest.raises(OneSided, match="tie='untie'"):
        loralib.load(tmp_path / "theirs.pt", model, params, alpha=6)
    model, params = hf.load(dir, tie="untie")
    trees = loralib.load(tmp_path / "theirs.pt", model, params, alpha=6)
    assert_close(output(model, *trees), output_in_torch(torch, adapted))
    check_continued(torch, theirs, dir, tmp_path, model, trees, state)
