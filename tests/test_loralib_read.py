"""loralib's checkpoints against loralib itself: what its layers save is read, and written again as it was.

The layers of the authors stand in the models of transformers, as in their examples. What needs neither runs
without PyTorch.
"""

import jax
import loralib_files
import numpy as np
import pytest
from loralib_files import (
    adapters,
    assert_close,
    check_continued,
    disturb,
    in_torch,
    output,
    output_in_torch,
    QUERIES,
    QV,
    read_in_torch,
    whole,
    with_layers,
)

from lora_jax import LoRA
from lora_jax._paths import named_leaves
from lora_jax.interop import hf, loralib


theirs = loralib_files.theirs
bases = loralib_files.bases


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    "enable_lora",
    [QV, [False, True, True], [True, True, True], [True, False, False], [False, False, True], None],
    ids=str,
)
def test_gpt2_from_loralib_and_back(torch, theirs, bases, tmp_path, enable_lora, scan):
    dir = bases("gpt2")
    fused = {} if enable_lora is None else {"enable_lora": enable_lora}
    layers = {"attn.c_attn": {"r": 2, **fused}, "mlp.c_fc": {"r": 3}, "wpe": {"r": 1}}
    adapted = with_layers(torch, theirs, in_torch(dir), layers).eval()
    expected = output_in_torch(torch, adapted)
    assert np.abs(expected - output_in_torch(torch, in_torch(dir))).max() > 0.1 * np.abs(expected).max()
    torch.save(state := theirs.lora_state_dict(adapted), tmp_path / "theirs.pt")

    model, params = hf.load(dir, scan=scan)
    blocks = None if enable_lora in (None, QV, [True] * 3) else tuple(enable_lora)
    trees = loralib.load(tmp_path / "theirs.pt", model, params, alpha=6, dropout=0.1, blocks=blocks)
    assert_close(output(model, *trees), expected)
    blocks = None if enable_lora is None else tuple(enable_lora)
    for path, leaf in adapters(trees.delta).items():
        rank = 2 if "c_attn" in path else 3 if "c_fc" in path else 1
        assert leaf.spec.method == LoRA(rank, 6, dropout=0.1, blocks=blocks if "c_attn" in path else None), (
            path
        )
    assert len(adapters(trees.delta)) == (3 if scan else 5) and not whole(trees.delta)
    assert jax.tree.map(id, trees.frozen) == jax.tree.map(id, params), "the base is the caller's, not a copy"
    check_continued(torch, theirs, dir, tmp_path, model, trees, state, enable_lora)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("family", QUERIES)
def test_encoders_from_loralib_and_back(torch, theirs, bases, tmp_path, family, scan):
    """With the head that was trained beside them, as the authors save it for GLUE, half of it changed."""
    dir = bases(family, "sequence_classification")
    layers = {**{name: {"r": 2} for name in QUERIES[family]}, "word_embeddings": {"r": 3}}
    adapted = with_layers(torch, theirs, in_torch(dir), layers).eval()
    head = "classifier.out_proj" if family == "roberta" else "classifier"
    disturb(torch, adapted.get_submodule(head).parameters())
    expected = output_in_torch(torch, adapted)
    state = theirs.lora_state_dict(adapted)
    state |= {
        name: tensor
        for name, tensor in adapted.state_dict().items()
        if "classifier" in name or "pooler" in name
    }
    torch.save(state, tmp_path / "theirs.bin")

    assert loralib.head_of(tmp_path / "theirs.bin") == {"head": "sequence_classification", "num_labels": 3}
    model, params = hf.load(dir, scan=scan)
    trees = loralib.load(tmp_path / "theirs.bin", model, params, alpha=6)
    assert_close(output(model, *trees), expected)
    assert whole(trees.delta) == {f"{head}/bias".replace(".", "/"), f"{head}/kernel".replace(".", "/")}
    assert {leaf.spec.method for leaf in adapters(trees.delta).values()} == {LoRA(2, 6), LoRA(3, 6)}
    check_continued(torch, theirs, dir, tmp_path, model, trees, state)

    # The base of pretraining has another head, of which the file's takes the place.
    model, params = hf.load(bases(family, "masked_lm"), scan=scan, **loralib.head_of(tmp_path / "theirs.bin"))
    assert {"sequence_classification", 3} == {model.head, model.config.num_labels}
    assert whole(loralib.load(tmp_path / "theirs.bin", model, params, alpha=6).delta) == {
        path for path, _ in named_leaves(params) if path.startswith(("classifier", "pooler"))
    }


def _no_prefix(state):
    return {name.removeprefix("transformer."): tensor for name, tensor in state.items()}


_STATES = {
    "alone": lambda state: state,
    "in model_state_dict": lambda state: {"model_state_dict": state, "step": 26289},
    "of training in parallel": lambda state: {
        "model_state_dict": {f"module.{name}": tensor for name, tensor in state.items()}
    },
    "of the bare model": _no_prefix,
}


@pytest.mark.parametrize(
    ("kind", "bias"),
    [("alone", bias) for bias in ("none", "all", "lora_only", "full", "full, merged on evaluation")]
    + [(kind, bias) for kind in _STATES for bias in ("full", "lora_only") if kind != "alone"],
)
def test_state_dicts_of_every_kind(torch, theirs, bases, tmp_path, kind, bias):
    """`full` is `model.state_dict()` of a model in training mode, weights included."""
    dir, full = bases("gpt2"), bias.startswith("full")
    layers = {"attn.c_attn": {"r": 2, "enable_lora": QV}, "mlp.c_fc": {"r": 3}}
    adapted = with_layers(torch, theirs, in_torch(dir), layers, merge_weights="merged" in bias)
    if not full:
        theirs.mark_only_lora_as_trainable(adapted, bias)
        disturb(torch, [parameter for parameter in adapted.parameters() if parameter.requires_grad])
    torch.save(
        _STATES[kind](adapted.state_dict() if full else theirs.lora_state_dict(adapted, bias)),
        tmp_path / "theirs.pt",
    )
    expected = output_in_torch(torch, adapted.eval())
    for scan in (False, True):
        model, params = hf.load(dir, scan=scan)
        frozen, delta = loralib.load(tmp_path / "theirs.pt", model, params, alpha=6)
        assert_close(output(model, frozen, delta), expected)
        biases = {path for path, _ in named_leaves(params) if path.endswith("/bias")}
        targets = {path for path in biases if "c_attn" in path or "c_fc" in path}
        assert whole(delta) == {"all": biases, "lora_only": targets}.get(bias, set())
        assert {leaf.spec.method for leaf in adapters(delta).values()} == {
            LoRA(2, 6, blocks=tuple(QV)),
            LoRA(3, 6),
        }


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta"])
def test_a_bias_of_two_names_is_one_leaf(torch, theirs, bases, tmp_path, family):
    """The head of pretraining has its bias twice, and its weight is the embedding's."""
    dir = bases(family, "masked_lm")
    adapted = with_layers(torch, theirs, in_torch(dir), {name: {"r": 2} for name in QUERIES[family]}).eval()
    theirs.mark_only_lora_as_trainable(adapted, "all")
    disturb(
        torch,
        [
            parameter
            for name, parameter in adapted.named_parameters()
            if parameter.requires_grad and "lora_" not in name
        ],
    )
    expected = output_in_torch(torch, adapted)
    for state in (theirs.lora_state_dict(adapted, "all"), adapted.state_dict()):
        torch.save(state, tmp_path / "theirs.pt")
        model, params = hf.load(dir)
        trees = loralib.load(tmp_path / "theirs.pt", model, params, alpha=6)
        assert_close(output(model, *trees), expected)
        assert whole(trees.delta) == {path for path, _ in named_leaves(params) if path.endswith("/bias")}
        loralib.save(tmp_path / "again.pt", model, *trees, overwrite=True)
        assert_close(read_in_torch(torch, theirs, dir, tmp_path / "again.pt", 6), expected)


@pytest.mark.parametrize("back", [False, True])
def test_weights_with_the_adapter_in_them_are_refused(torch, theirs, bases, tmp_path, back):
    """Evaluation mode merges, and the adapter would count twice; going `back` to training mode takes it
    out again, and leaves roundings.
    """
    adapted = with_layers(
        torch,
        theirs,
        in_torch(bases("gpt2")),
        {"attn.c_attn": {"r": 2, "enable_lora": QV}},
        merge_weights=True,
    )
    adapted.train().eval()
    torch.save(adapted.train(back).state_dict(), tmp_path / "theirs.pt")
    model, params = hf.load(bases("gpt2"))
    message = (
        r"'transformer.h.\d.attn.c_attn.weight' that differs .* merges adapters into the weights in "
        r"evaluation mode.*lora.lora_state_dict\(model\)"
    )
    with pytest.raises(ValueError, match=message):
        loralib.load(tmp_path / "theirs.pt", model, params, alpha=6)
    torch.save(theirs.lora_state_dict(adapted), tmp_path / "theirs.pt")
    assert_close(
        output(model, *loralib.load(tmp_path / "theirs.pt", model, params, alpha=6)),
        output_in_torch(torch, adapted.eval()),
    )


def test_the_mask_in_older_files_is_left_out(torch, theirs, bases, tmp_path):
    """With biases asked for, what older GPT-2s call `attn.bias` comes along."""
    adapted = with_layers(
        torch, theirs, in_torch(bases("gpt2")), {"attn.c_attn": {"r": 2, "enable_lora": QV}}
    ).eval()
    values = {"bias": torch.ones(1, 1, 9, 9), "masked_bias": torch.tensor(-1e4)}
    masks = {f"transformer.h.{i}.attn.{name}": value for i in range(2) for name, value in values.items()}
    torch.save(theirs.lora_state_dict(adapted, "all") | masks, tmp_path / "theirs.pt")
    model, params = hf.load(bases("gpt2"))
    trees = loralib.load(tmp_path / "theirs.pt", model, params, alpha=6)
    assert_close(output(model, *trees), output_in_torch(torch, adapted))
    assert not whole(trees.delta)
