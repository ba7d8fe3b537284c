"""loralib's checkpoints against loralib itself: what its layers save is read, what we write they read, and
nothing changes on the way.

The layers of the authors stand in the models of transformers, as in their examples. What needs neither runs
without PyTorch.
"""

import functools
import json
import os
import pickle
import zipfile

import encoders
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import AdaLoRA, DeltaLoRA, DoRA, DyLoRA, Full, LoRA, LoRAFA, PiSSA, VeRA
from lora_jax._paths import named_leaves
from lora_jax._tree.nodes import Adapter, is_node
from lora_jax.interop import _torch_files, hf, loralib, OneSided
from lora_jax.models import GPT2, GPT2Config


_SIZES = dict(
    vocab_size=31, hidden_size=12, intermediate_size=20, num_attention_heads=2, labels=("a", "b", "c")
)
CONFIGS = {
    "gpt2": GPT2Config(
        vocab_size=29, n_positions=9, n_embd=12, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=None
    ),
    "roberta": encoders.changed(encoders.ROBERTA, **_SIZES),
    "deberta": encoders.changed(encoders.DEBERTA, **_SIZES),
}
CONFIGS["gpt2 of three layers"] = encoders.changed(CONFIGS["gpt2"], n_layer=3)
IDS = np.random.default_rng(0).integers(2, 29, (3, 7))
C_ATTN = "transformer.h.0.attn.c_attn"
QV = [True, False, True]


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("loralib", reason="loralib is not installed: pip install 'lora_jax[torch]'")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """`bases(family, head)`: a model's directory, with random weights, nothing at 0 or 1."""

    @functools.cache
    def make(family, head=None):
        config, dir = CONFIGS[family], tmp_path_factory.mktemp("base") / f"{family}_{head}"
        config = encoders.changed(config, labels=("start", "end")) if head == "question_answering" else config
        model = GPT2(config) if family.startswith("gpt2") else encoders.ours(config, head)
        hf.save(dir, model, encoders.random_params(model))
        return dir

    return make


# --- here ---------------------------------------------------------------------------------------------------


@functools.cache
def compiled(model):
    return jax.jit(model.apply, compiler_options=encoders.QUICKLY)


def output(model, frozen, delta):
    found = compiled(model)({"params": lora_jax.merge(frozen, delta)}, IDS)
    return np.asarray(found[0] if isinstance(found, tuple) else found)


def assert_close(found, expected):
    assert found.shape == expected.shape and np.abs(expected).max() > 0.1
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def adapters(delta):
    return {
        leaf.spec.path: leaf for leaf in jax.tree.leaves(delta, is_leaf=is_node) if isinstance(leaf, Adapter)
    }


def whole(delta):
    """The paths of what trains without an adapter."""
    return {
        path
        for path, leaf in named_leaves(delta, is_leaf=is_node)
        if leaf is not None and not isinstance(leaf, Adapter)
    }


def axes(scan):
    return (
        {"(h|layer)/.*kernel": "layer in out", ".*embedding": "in out", ".*kernel": "in out"}
        if scan
        else {".*": "in out"}
    )


def trained(tree, seed=5):
    """Another value for every number that trains."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(np.asarray(leaf, np.float32) + draw.normal(0, 0.3, leaf.shape), leaf.dtype),
        tree,
    )


def made(dir, targets, scan=False, **options):
    model, params = hf.load(dir, scan=scan, **options)
    frozen, delta = lora_jax.lorafy(params, targets, axes=axes(scan))
    return model, params, frozen, trained(delta)


# --- in PyTorch ---------------------------------------------------------------------------------------------


def in_torch(dir):
    """The base, of the class that its config names."""
    import transformers

    name = json.loads((dir / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(dir, attn_implementation="eager").eval()


def output_in_torch(torch, model):
    with torch.no_grad():
        return encoders.run_theirs(torch, model, IDS).numpy()


def disturb(torch, parameters):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def with_layers(torch, theirs, model, layers, **every):
    """`model` with loralib's layers, A and B random: `layers` are their options by the ending of the
    module's name.
    """
    every = {"lora_alpha": 6, "merge_weights": False, **every}
    for name, module in list(model.named_modules()):
        for ending, options in layers.items():
            if name.endswith(ending):
                model.set_submodule(name, _layer(torch, theirs, module, **{**every, **options}))
    disturb(torch, [parameter for name, parameter in model.named_parameters() if "lora_" in name])
    return model


def _layer(torch, theirs, module, enable_lora=None, **options):
    if isinstance(module, torch.nn.Embedding):
        layer = theirs.Embedding(*module.weight.shape, padding_idx=module.padding_idx, **options)
    else:
        turned = not isinstance(module, torch.nn.Linear)  # transformers' Conv1D
        ins, outs = module.weight.shape if turned else module.weight.shape[::-1]
        kind = (
            theirs.Linear
            if enable_lora is None
            else functools.partial(theirs.MergedLinear, enable_lora=enable_lora)
        )
        layer = kind(ins, outs, fan_in_fan_out=turned, bias=module.bias is not None, **options)
        layer.bias = module.bias
    assert layer.weight.shape == module.weight.shape
    layer.weight = module.weight  # itself, so that what was tied is tied
    return layer


def read_in_torch(torch, theirs, dir, file, alpha, enable_lora=None):
    """What PyTorch computes with a file of ours: in layers of the ranks and the alpha that belong to it."""
    tensors, model = torch.load(file, weights_only=True), in_torch(dir)
    layers = {}
    for name in (name.removesuffix(".lora_B") for name in tensors if name.endswith(".lora_B")):
        rank = tensors[f"{name}.lora_B"].shape[1]
        layers[name] = {
            "r": rank,
            **({"enable_lora": list(enable_lora)} if enable_lora and name.endswith("c_attn") else {}),
        }
    model = with_layers(torch, theirs, model, layers, lora_alpha=alpha).eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and not [name for name in missing if "lora_" in name]
    return output_in_torch(torch, model)


def check_continued(torch, theirs, dir, tmp_path, model, trees, state, enable_lora=None):
    """Written again, bit for bit what was read, and as good in PyTorch."""
    alpha = loralib.save(tmp_path / "again.pt", model, *trees)
    assert alpha == 6
    written = torch.load(tmp_path / "again.pt", weights_only=True)
    read = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    assert written.keys() <= read.keys() and {name for name in read if "lora_" in name} <= written.keys()
    for name, tensor in written.items():
        assert tensor.dtype == read[name].dtype and torch.equal(tensor, read[name]), name
    assert_close(
        read_in_torch(torch, theirs, dir, tmp_path / "again.pt", alpha, enable_lora), output(model, *trees)
    )


# --- what loralib saves -------------------------------------------------------------------------------------


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


_QUERIES = {"roberta": ("query", "value"), "deberta": ("query_proj", "value_proj")}


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("family", _QUERIES)
def test_encoders_from_loralib_and_back(torch, theirs, bases, tmp_path, family, scan):
    """With the head that was trained beside them, as the authors save it for GLUE, half of it changed."""
    dir = bases(family, "sequence_classification")
    layers = {**{name: {"r": 2} for name in _QUERIES[family]}, "word_embeddings": {"r": 3}}
    adapted = with_layers(torch, theirs, in_torch(dir), layers).eval()
    head = "classifier.out_proj" if family == "roberta" else "classifier"
    disturb(torch, adapted.get_submodule(head).parameters())
    expected = output_in_torch(torch, adapted)
    state = theirs.lora_state_dict(adapted)
    state |= {
        name: tensor
        for name, tensor in adapted.state_dict().items()
        if "classifier" in name or name.startswith("pooler")
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


@pytest.mark.parametrize("bias", ["none", "all", "lora_only", "full", "full, merged on evaluation"])
@pytest.mark.parametrize("kind", _STATES)
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


@pytest.mark.parametrize("family", ["roberta", "deberta"])
def test_a_bias_of_two_names_is_one_leaf(torch, theirs, bases, tmp_path, family):
    """The head of pretraining has its bias twice, and its weight is the embedding's."""
    dir = bases(family, "masked_lm")
    adapted = with_layers(torch, theirs, in_torch(dir), {name: {"r": 2} for name in _QUERIES[family]}).eval()
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


# --- what we write ------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("family", _QUERIES)
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


# --- what is refused ----------------------------------------------------------------------------------------


class Ours:
    """A file of ours, and copies of it with other tensors, as another tool would write them."""

    def __init__(self, dir, root, method, **options):
        self.model, self.params, self.frozen, self.delta = made(
            dir, {"c_attn/kernel": method, "c_attn/bias": Full()}, **options
        )
        self.file, self.other, self.alpha = root / "ours.pt", root / "other.pt", method.alpha
        loralib.save(self.file, self.model, self.frozen, self.delta)
        self.tensors = dict(_torch_files.read(self.file))

    def load(self, tensors=None, **options):
        if tensors is not None:
            _torch_files.write(self.other, tensors, facts={})
        return loralib.load(
            self.file if tensors is None else self.other,
            self.model,
            self.params,
            **{"alpha": self.alpha, **options},
        )


@pytest.fixture(scope="module")
def ours(bases, tmp_path_factory):
    return Ours(bases("gpt2"), tmp_path_factory.mktemp("ours"), LoRA(rank=2, blocks=(True, False, True)))


A, B = f"{C_ATTN}.lora_A", f"{C_ATTN}.lora_B"


def without(*names):
    return lambda tensors: {name: array for name, array in tensors.items() if name not in names}


def renamed(old, new):
    return lambda tensors: {new if name == old else name: array for name, array in tensors.items()}


def also(name, array):
    return lambda tensors: {**tensors, name: array}


def changed(name, change):
    return lambda tensors: {**tensors, name: change(tensors[name])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(B), f"does not hold adapters of this model: '{B}' is missing[.]$"),
        (without(A), f"does not hold adapters of this model: '{A}' is missing[.]$"),
        (renamed(A, f"{C_ATTN}.lora_a"), rf"'{A}' is missing \(is it '{C_ATTN}.lora_a'\?\)"),
        (
            renamed(A, "transformer.h.0.attn.c_atn.lora_A"),
            rf"'{A}' is missing \(is it 'transformer.h.0.attn.c_atn.lora_A'\?\)",
        ),
        (
            renamed(A, f"module.{C_ATTN}.lora_A.weight"),
            rf"'{A}' is missing \(is it 'module.{C_ATTN}.lora_A.weight'\?\)",
        ),
        (
            renamed(A, "transformer.h.2.attn.c_attn.lora_A"),
            "'transformer.h.2.attn.c_attn.lora_A' is unexpected",
        ),
        (renamed(A, "transformer.h.0.ln_1.lora_A"), "'transformer.h.0.ln_1.lora_A' is unexpected"),
        (also("extra", np.ones(1, np.float32)), "'extra' is unexpected"),
        (also("step", np.ones(1, np.int64)), "'step' is unexpected"),
        (
            also("transformer.h.0.attn.c_attn.scale", np.ones(1, np.float32)),
            "'transformer.h.0.attn.c_attn.scale' is unexpected",
        ),
        (
            also(f"module.{A}", np.ones((4, 12), np.float32)),
            f"holds one tensor under two names, '{A}' and 'module.{A}'",
        ),
        (
            also(A.removeprefix("transformer."), np.ones((4, 12), np.float32)),
            f"holds one tensor under two names, '{A}' and 'h.0.attn.c_attn.lora_A'",
        ),
        (changed(A, np.transpose), rf"'{A}' has shape \(12, 4\) and must have"),
        (changed(B, np.transpose), rf"'{B}' has shape \(2, 24\) and must have"),
        (changed(A, lambda array: array[:3]), rf"'{A}' has shape \(3, 12\) and must have \(2, 12\)"),
        (changed(A, lambda array: array[:, :11]), rf"'{A}' has shape \(4, 11\) and must have \(4, 12\)"),
        (changed(B, lambda array: array[:12]), rf"'{B}' has shape \(12, 2\) and must have \(24, 2\)"),
        (changed(B, lambda array: array[:, :0]), rf"'{B}' has shape \(24, 0\) and must have"),
        (changed(A, lambda array: array[:0]), rf"'{A}' has shape \(0, 12\) and must have \(2, 12\)"),
        (changed(A, lambda array: array[None]), rf"'{A}' has shape \(1, 4, 12\) and must have"),
        (changed(A, lambda array: array[0, 0]), rf"'{A}' has shape \(\) and must have"),
        (
            changed(A, lambda array: np.concatenate([array, array])),
            rf"'{A}' has shape \(8, 12\) and must have \(6, 12\)",
        ),
        (
            changed(f"{C_ATTN}.bias", lambda array: array[:35]),
            rf"'{C_ATTN}.bias' has shape \(35,\) and must have \(36,\)",
        ),
        (changed(A, lambda array: array.astype(np.int32)), f"'{A}' has dtype int32 and must have one of"),
        (changed(A, lambda array: array > 0), f"'{A}' has dtype bool and must have one of"),
        (
            changed(A, lambda array: array.astype(np.float64)),
            "'h/0/attn/c_attn/kernel' is float64 in the file and would be narrowed",
        ),
        (
            changed(A, lambda array: np.full_like(array, np.nan)),
            f"48 values in '{A}' that are infinite or no numbers",
        ),
        (
            changed(f"{C_ATTN}.bias", lambda array: np.full_like(array, np.inf)),
            f"36 values in '{C_ATTN}.bias' that are infinite or no numbers",
        ),
        (
            without(A, B, A.replace("h.0", "h.1"), B.replace("h.0", "h.1")),
            rf"holds no `lora_A` of a layer of this model; it has \['{C_ATTN}.bias'",
        ),
        (lambda tensors: {}, r"holds no `lora_A` of a layer of this model; it has \[\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(ours, change, message):
    with pytest.raises(ValueError, match=message):
        ours.load(change(ours.tensors))


def test_values_that_are_not_finite_pass_where_told(ours):
    tensors = changed(A, lambda array: np.full_like(array, np.nan))(ours.tensors)
    assert np.isnan(
        adapters(ours.load(tensors, verify=False).delta)["h/0/attn/c_attn/kernel"].arrays["a"]
    ).all()


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (
            (True, True, False, False),
            rf"adapts 2 of the 3 blocks of '{C_ATTN}', and `blocks` is \(True, True, False, False\), which "
            r"does not say which",
        ),
        ((True, True, True), "pass 3 truth values, 2 of them True"),
        ((True, False, False), "pass 3 truth values, 2 of them True"),
        ((True, True), "pass 3 truth values, 2 of them True"),
        ("qv", "pass 3 truth values, 2 of them True"),
    ],
)
def test_blocks_that_the_file_contradicts_are_refused(ours, blocks, message):
    with pytest.raises(ValueError, match=message):
        ours.load(blocks=blocks)


def test_one_block_of_three_must_be_named(bases, tmp_path):
    key = Ours(bases("gpt2"), tmp_path, LoRA(rank=2, blocks=(False, True, False)))
    with pytest.raises(
        ValueError,
        match=(
            "adapts 1 of the 3 blocks of .*`blocks` is None, which does not say which: pass 3 truth values, "
            "1 of them True"
        ),
    ):
        key.load()
    with pytest.raises(ValueError, match="pass 3 truth values, 1 of them True"):
        key.load(blocks=(True, False, True))
    assert_close(
        output(key.model, *key.load(blocks=(False, True, False))), output(key.model, key.frozen, key.delta)
    )
    # Another block is another model, which the file cannot know.
    assert {
        leaf.spec.method.blocks for leaf in adapters(key.load(blocks=[True, False, False]).delta).values()
    } == {(True, False, False)}


def test_blocks_where_there_are_none_are_refused(bases, tmp_path):
    plain = Ours(bases("gpt2"), tmp_path, LoRA(rank=2))
    with pytest.raises(
        ValueError,
        match=(
            r"`blocks` is \(True, False, True\), and .*ours.pt has the adapters of whole layers "
            r"only: leave it out"
        ),
    ):
        plain.load(blocks=(True, False, True))


@pytest.mark.parametrize("alpha", ["32", None, True, float("nan"), float("inf"), (32,), np.ones(2)], ids=str)
def test_an_alpha_that_is_no_number_is_refused(ours, alpha):
    with pytest.raises(ValueError, match="`alpha` is .*; it must be (a number|finite)"):
        ours.load(alpha=alpha)


def test_an_alpha_that_our_file_contradicts_is_refused(ours):
    with pytest.raises(
        ValueError,
        match=r"`alpha` is 32, and .*ours.pt was saved with 16: pass that; .*`arithmetic.scaled`",
    ):
        ours.load(alpha=32)
    ours.load(alpha=16.0000001)
    # loralib's do not say.
    assert {
        leaf.spec.method.alpha for leaf in adapters(ours.load(ours.tensors, alpha=32).delta).values()
    } == {32}


def test_a_dropout_out_of_range_is_refused(ours):
    with pytest.raises(ValueError, match="`dropout` is 1.5"):
        ours.load(dropout=1.5)


def test_a_part_of_the_layers_does_not_make_a_stack(bases, tmp_path):
    stacked = Ours(bases("gpt2"), tmp_path, LoRA(rank=2), scan=True)
    with pytest.raises(
        ValueError, match=r"has adapters in 1 of 2 layers .*load the base with `hf.load\(dir, scan=False\)`"
    ):
        stacked.load(without(A, B)(stacked.tensors))
    unstacked, params = hf.load(bases("gpt2"))
    assert set(adapters(loralib.load(stacked.other, unstacked, params, alpha=16).delta)) == {
        "h/1/attn/c_attn/kernel"
    }


class Calls:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def test_code_in_a_file_is_refused_and_does_not_run(ours, tmp_path):
    mark = tmp_path / "ran"
    contents = pickle.dumps({"model_state_dict": Calls(os.mkdir, str(mark))}, 2)
    with zipfile.ZipFile(tmp_path / "hostile.pt", "w") as archive:
        archive.writestr("archive/data.pkl", contents)
    for reader in (
        lambda file: loralib.load(file, ours.model, ours.params, alpha=16, verify=False, check_base=False),
        loralib.head_of,
    ):
        with pytest.raises(
            ValueError, match="hostile.pt asks for 'posix.mkdir', and code that files ask for is never run"
        ):
            reader(tmp_path / "hostile.pt")
    assert not mark.exists()
    pickle.loads(contents)  # it would have
    assert mark.exists()


def test_what_is_no_state_dict_is_refused(torch, ours, tmp_path):
    for contents, message in [
        ([torch.ones(2)], "holds a list, not a state dict"),
        ({A: 3.0}, f"has a float under '{A}'"),
    ]:
        torch.save(contents, tmp_path / "theirs.pt")
        with pytest.raises(ValueError, match=message):
            loralib.load(tmp_path / "theirs.pt", ours.model, ours.params, alpha=16)


def test_another_base_is_found_unless_told(ours):
    other = jax.tree.map(lambda leaf: leaf, ours.params)
    other["h"]["1"]["mlp"]["c_fc"]["kernel"] = other["h"]["1"]["mlp"]["c_fc"]["kernel"].at[3, 4].add(1e-6)
    with pytest.raises(
        ValueError,
        match=(
            "beside another base: 'transformer.h.1.mlp.c_fc.weight' of `params` have other "
            "values.*`check_base=False`"
        ),
    ):
        loralib.load(ours.file, ours.model, other, alpha=16)
    loralib.load(ours.file, ours.model, other, alpha=16, check_base=False)
    # What the file replaces may be anything.
    other = jax.tree.map(lambda leaf: leaf, ours.params)
    other["h"]["1"]["attn"]["c_attn"]["bias"] += 1
    loralib.load(ours.file, ours.model, other, alpha=16)


def test_parameters_of_another_model_are_refused(ours, bases):
    with pytest.raises(ValueError, match="`params` are not those of `model`"):
        loralib.load(ours.file, ours.model.clone(scan=True), ours.params, alpha=16)
    model, params = hf.load(bases("roberta", "features"))
    with pytest.raises(ValueError, match="holds no `lora_A` of a layer of this model"):
        loralib.load(ours.file, model, params, alpha=16)


def broken(ours, contents):
    ours.other.write_bytes(contents)
    with pytest.raises(ValueError, match="other.pt"):
        loralib.load(ours.other, ours.model, ours.params, alpha=16)


def test_a_flipped_bit_anywhere_is_found(ours):
    contents = ours.file.read_bytes()
    for position in np.random.default_rng(0).choice(8 * len(contents), 200, replace=False):
        damaged = bytearray(contents)
        damaged[position // 8] ^= 1 << (position % 8)
        broken(ours, bytes(damaged))
    ours.load()


def test_a_torn_file_is_found(ours):
    contents = ours.file.read_bytes()
    for length in (0, 1, 3, 30, 100, len(contents) // 2, len(contents) - 64, len(contents) - 1):
        broken(ours, contents[:length])
    broken(ours, contents + b"\0")
    broken(ours, contents[:1000] + bytes(1000) + contents[2000:])
    ours.load()


# --- any change of the tensors ------------------------------------------------------------------------------

_OTHER_NAMES = [
    "lora_A",
    "extra",
    "module.{}",
    "{}.weight",
    "{}_",
    "base_model.model.{}",
    "model.{}",
    " {}",
    "{}.",
    "transformer.{}",
    "module.module.{}",
]
_RESHAPES = {
    "transposed": lambda array: array.T,
    "flat": lambda array: array.reshape(-1),
    "row": lambda array: array.reshape(1, -1),
    "halves": lambda array: array.reshape(2, -1),
    "thirds": lambda array: array.reshape(-1, 3),
    "first half": lambda array: array[: len(array) // 2],
    "twice": lambda array: np.concatenate([array, array]),
    "one more": lambda array: array[None],
    "number": lambda array: array.reshape(-1)[0],
    "nothing": lambda array: array[:0],
}
_DTYPES = ["float16", "bfloat16", "float32", "float64", "int32", "int64", "uint8", "bool"]
_CHANGES = st.one_of(
    st.just(("drop", None)),
    st.tuples(st.just("rename"), st.sampled_from(_OTHER_NAMES)),
    st.tuples(st.just("reshape"), st.sampled_from(sorted(_RESHAPES))),
    st.tuples(st.just("retype"), st.sampled_from(_DTYPES)),
)


@pytest.fixture(scope="module", params=[False, True], ids=["unscanned", "scanned"])
def full(request, bases, tmp_path_factory):
    """With all weights of the base in the file, adapters of blocks, and biases that train."""
    made = Ours(
        bases("gpt2"),
        tmp_path_factory.mktemp("full"),
        LoRA(rank=2, blocks=(True, False, True)),
        scan=request.param,
    )
    _, params = hf.load(bases("gpt2"))
    made.theirs = dict(_theirs(params))
    made.tensors = {**made.theirs, **made.tensors, "lm_head.weight": made.theirs["transformer.wte.weight"]}
    return made


def _theirs(params):
    """The parameters by PyTorch's names. Written apart from `interop`, so that neither vouches for the
    other.
    """
    for path, leaf in named_leaves(params):
        name = "transformer." + path.replace("/", ".")
        for ours in ("kernel", "scale", "embedding"):
            name = name.removesuffix(ours) + "weight" if name.endswith(f".{ours}") else name
        yield name, np.asarray(leaf)


def _told(trees):
    """What trees say, by the names of the file: every weight, and every A and B."""
    frozen, delta = trees
    joined = jax.tree.map(
        lambda one, other: other if one is None else one,
        frozen,
        delta,
        is_leaf=lambda leaf: leaf is None or is_node(leaf),
    )
    found = dict(_theirs(_unstacked(joined)))
    for path, leaf in adapters(delta).items():
        stacked = bool(leaf.spec.sizes("layer"))
        for index in range(2) if stacked else [None]:
            a, b = (
                np.asarray(leaf.arrays[name] if index is None else leaf.arrays[name][index]) for name in "ab"
            )
            name = "transformer." + path.removesuffix("/kernel").replace(
                "h/", "h/0/" if index == 0 else "h/1/" if index else "h/"
            ).replace("/", ".")
            found[f"{name}.lora_A"] = np.concatenate([block.T for block in a])
            found[f"{name}.lora_B"] = np.concatenate([block.T for block in b])
    return {**found, "lm_head.weight": found["transformer.wte.weight"]}


def _unstacked(params):
    return params if "0" in params["h"] else lora_jax.models.unstack_layers(params)


@hypothesis.given(
    changes=st.dictionaries(st.integers(0, 10**6), _CHANGES, min_size=1, max_size=3),
    adapters_only=st.booleans(),
)
@hypothesis.settings(max_examples=150, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_a_changed_file_is_refused_or_the_result_says_what_it_says(full, changes, adapters_only):
    """Nothing in between: no tensor of the file is passed over, cast or reshaped, and what it lacks is
    the base's.
    """
    tensors = dict(full.tensors)
    names = sorted(name for name in tensors if "lora_" in name or not adapters_only)
    for place, (kind, argument) in changes.items():
        name = names[place % len(names)]
        if name not in tensors:
            continue
        array = tensors.pop(name)
        if kind == "rename":
            tensors[argument.format(name)] = array
        elif kind == "retype":
            tensors[name] = array.astype(argument)
        elif kind == "reshape":
            try:
                tensors[name] = np.ascontiguousarray(_RESHAPES[argument](array)).reshape(
                    _RESHAPES[argument](array).shape
                )
            except (ValueError, TypeError, IndexError):  # what was reshaped before cannot be again
                tensors[name] = array
    try:
        trees = full.load(tensors)
    except ValueError as error:
        hypothesis.event("refused")
        assert "other.pt" in str(error) or "float64" in str(error)
        return
    hypothesis.event("accepted")
    told = _told(trees)
    said = {name.removeprefix("module."): array for name, array in tensors.items()}
    for name, array in said.items():
        assert name in told and told[name].shape == array.shape and np.array_equal(told[name], array), name
    for name, array in told.items():
        assert name in said or np.array_equal(
            array, full.theirs[name.replace("lm_head", "transformer.wte")]
        ), name
