"""PEFT's directories against PEFT itself: what it writes is read, what we write it reads, and nothing
changes on the way.
"""

import copy
import dataclasses
import functools
import json
import shutil

import encoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax
from lora_jax import AdaLoRA, DeltaLoRA, DoRA, DyLoRA, Full, LoRA, LoRAFA, PiSSA, VeRA
from lora_jax._tree.nodes import Adapter, is_node
from lora_jax.interop import hf, OneSided, peft
from lora_jax.models import GPT2Config


pytestmark = [
    # PEFT asks transformers for it under the old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # What PEFT says of configs that these tests make on purpose.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True` and:UserWarning"),
    pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A and vera_B:UserWarning"),
]

GPT2 = GPT2Config(
    vocab_size=29, n_positions=9, n_embd=12, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=None
)
_SIZES = dict(vocab_size=31, hidden_size=12, intermediate_size=20, num_attention_heads=2)
ROBERTA = encoders.changed(encoders.ROBERTA, **_SIZES)
DEBERTA = encoders.changed(encoders.DEBERTA, **_SIZES)
IDS = np.random.default_rng(0).integers(2, 29, (3, 7))
FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("peft", reason="PEFT is not installed: pip install 'lora_jax[torch]'")


@pytest.fixture(scope="module")
def bases(torch, tmp_path_factory):
    """`bases(family, head)`: a directory with random weights, nothing at 0 or 1."""
    import transformers

    @functools.cache
    def make(family, head=None):
        dir = tmp_path_factory.mktemp("base") / f"{family}_{head}"
        torch.manual_seed(7)  # or the weights would depend on which tests ran before
        if family.startswith("gpt2"):
            config = dataclasses.replace(GPT2, n_layer=3) if family == "gpt2 of three layers" else GPT2
            model = transformers.GPT2LMHeadModel(
                transformers.GPT2Config(**config.to_hf(), attn_implementation="eager")
            ).eval()
            disturb(torch, model.parameters(), 0.1)
        else:
            config = encoders.changed(
                ROBERTA if family == "roberta" else DEBERTA,
                labels=("a", "b", "c") if "class" in head else ("LABEL_0", "LABEL_1"),
            )
            model = encoders.theirs(torch, config, head)
        model.save_pretrained(dir)
        return dir

    return make


def disturb(torch, parameters, scale):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parameters:
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def in_torch(dir):
    """The base in PyTorch, of the class that its config names."""
    import transformers

    name = json.loads((dir / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(dir, attn_implementation="eager").eval()


def without_head(dir, architecture, copied):
    """A pretrained encoder, as fine-tuning begins with."""
    from safetensors.numpy import save_file

    shutil.copytree(dir, copied)
    tensors = load_file(copied / "model.safetensors")
    save_file(
        {name: array for name, array in tensors.items() if not name.startswith(("classifier", "pooler"))},
        copied / "model.safetensors",
        metadata={"format": "pt"},
    )
    settings = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**settings, "architectures": [architecture]}))
    return copied


def output_of_theirs(torch, model):
    with torch.no_grad():
        return encoders.run_theirs(torch, model, IDS).numpy()


def output(model, frozen, delta):
    found = jax.jit(lora_jax.adapt(model.apply), compiler_options=encoders.QUICKLY)(
        {"params": lora_jax.combine(frozen, delta)}, IDS
    )
    return np.asarray(found[0] if isinstance(found, tuple) else found)


def assert_close(found, expected, tolerance=1e-5):
    assert np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


def trained(delta, seed=5, scale=0.1):
    """Random, and of the size of the base's weights: three times as large, it saturates softmax in some
    models, and rounding counts ten times as much.
    """
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(
            np.asarray(leaf, np.float32) + draw.normal(0, scale, leaf.shape), leaf.dtype
        ),
        delta,
    )


def bytes_of(dir):
    return {name: (dir / name).read_bytes() for name in FILES}


def adapters(delta):
    return [leaf for leaf in jax.tree.leaves(delta, is_leaf=is_node) if isinstance(leaf, Adapter)]


def axes(scan):
    return {"(h|layer)/.*kernel": "layer in out", ".*embedding": "in out"} if scan else None


# --- what PEFT writes ---------------------------------------------------------------------------------------

_GPT2_CONFIGS = {
    "LoRA": dict(r=3, target_modules=["c_attn"], task_type="CAUSAL_LM"),
    "targets of the table": dict(r=2, task_type="CAUSAL_LM"),
    "rsLoRA": dict(r=3, target_modules=["c_attn", "c_proj"], use_rslora=True),
    "DoRA": dict(r=3, target_modules=["c_attn", "c_fc"], use_dora=True),
    "patterns": dict(
        r=3, target_modules=["c_attn", "c_fc"], rank_pattern={"h.0.attn.c_attn": 2}, alpha_pattern={"c_fc": 5}
    ),
    "all-linear": dict(r=2, target_modules="all-linear"),
    "a regular expression": dict(r=2, target_modules=r".*h\.1\..*c_proj"),
    "some layers": dict(r=2, target_modules=["c_attn"], layers_to_transform=[1], layers_pattern="h"),
    "excluded": dict(r=2, target_modules=["c_proj"], exclude_modules=["mlp.c_proj"]),
    "biases of the targets": dict(r=2, target_modules=["c_attn"], bias="lora_only"),
    "all biases": dict(r=2, target_modules=["c_attn"], bias="all"),
    "norms": dict(r=2, target_modules=["c_attn"], modules_to_save=["ln_1", "ln_f"]),
    "PiSSA": dict(r=2, target_modules=["c_attn"], init_lora_weights="pissa"),
    "positions": dict(r=2, target_modules=["wpe", "c_attn"], init_lora_weights="gaussian"),
    "DoRA of positions": dict(r=2, target_modules=["wpe"], use_dora=True),
    "AdaLoRA": dict(init_r=4, target_modules=["c_attn"], total_step=10),
    "VeRA": dict(r=6, target_modules=["c_attn", "c_fc"], task_type="CAUSAL_LM"),
    "VeRA without projections": dict(
        r=6, target_modules=["c_attn", "c_fc"], save_projection=False, projection_prng_key=5
    ),
}
# Adapters of a part of the layers, or different ones.
_NOT_STACKED = {"patterns", "a regular expression", "some layers"}


def config_of(theirs, options):
    kind = (
        theirs.VeraConfig
        if "projection_prng_key" in options or options.get("r") == 6
        else theirs.AdaLoraConfig
        if "init_r" in options
        else theirs.LoraConfig
    )
    return kind(**options)


def written_by_peft(torch, theirs, base, options, dir):
    """An adapter with everything that trains random, and what the model computes with it."""
    torch.manual_seed(7)
    model = theirs.get_peft_model(in_torch(base), config_of(theirs, options)).eval()
    disturb(torch, [parameter for parameter in model.parameters() if parameter.requires_grad], 0.1)
    model.save_pretrained(dir)
    return output_of_theirs(torch, model)


def check_both_ways(torch, theirs, base, dir, tmp_path, expected, tolerance=1e-5, **options):
    """Read, written again and read again, here and in PEFT: one output, and the same bytes from the first
    writing on.
    """
    model, params = hf.load(base, **options)
    frozen, delta = peft.load(dir, model, params)
    assert_close(output(model, frozen, delta), expected, tolerance)
    peft.save(tmp_path / "ours", model, frozen, delta)
    assert_close(
        output_of_theirs(torch, theirs.PeftModel.from_pretrained(in_torch(base), tmp_path / "ours").eval()),
        expected,
        tolerance,
    )
    again = peft.load(tmp_path / "ours", model, params)
    peft.save(tmp_path / "again", model, *again)
    assert bytes_of(tmp_path / "ours") == bytes_of(tmp_path / "again")
    return frozen, delta


@pytest.mark.parametrize("name", _GPT2_CONFIGS)
def test_gpt2_from_peft_and_back(torch, theirs, bases, tmp_path, name):
    base = bases("gpt2")
    expected = written_by_peft(torch, theirs, base, _GPT2_CONFIGS[name], tmp_path / "adapter")
    # Two singular values that are close leave float32 little to tell their vectors apart, in PEFT and here.
    tolerance = 1e-4 if name == "PiSSA" else 1e-5
    check_both_ways(torch, theirs, base, tmp_path / "adapter", tmp_path, expected, tolerance)
    model, params = hf.load(base, scan=True)
    if name in _NOT_STACKED:
        with pytest.raises(
            ValueError,
            match=r"keeps its layers in one array .* load the base with `hf.load\(dir, scan=False\)`",
        ):
            peft.load(tmp_path / "adapter", model, params)
    else:
        assert_close(output(model, *peft.load(tmp_path / "adapter", model, params)), expected, tolerance)


_ENCODERS = {
    "LoRA": lambda q, task: dict(r=3, target_modules=[q, q.replace("query", "value")], task_type=task),
    "DoRA": lambda q, task: dict(
        r=3, target_modules=[q, "intermediate.dense"], use_dora=True, task_type=task
    ),
    "all-linear": lambda q, task: dict(r=2, target_modules="all-linear", task_type=task),
    "all biases": lambda q, task: dict(r=2, target_modules=[q], bias="all", task_type=task),
    "embeddings": lambda q, task: dict(r=2, target_modules=["word_embeddings", q], task_type=task),
    "AdaLoRA": lambda q, task: dict(init_r=4, target_modules=[q], total_step=10, task_type=task),
    "VeRA": lambda q, task: dict(r=6, target_modules=[q, "intermediate.dense"], task_type=task),
}
_TASKS = {
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
    "features": "FEATURE_EXTRACTION",
    "masked_lm": None,
}
# Every kind of adapter with the head of GLUE, every head with the plainest adapter.
_PAIRS = (
    [(kind, "sequence_classification") for kind in _ENCODERS]
    + [("LoRA", head) for head in list(_TASKS)[1:]]
    + [("all biases", "masked_lm")]
)


@pytest.mark.parametrize(("kind", "head"), _PAIRS)
@pytest.mark.parametrize("family", ["roberta", "deberta"])
def test_encoders_from_peft_and_back(torch, theirs, bases, tmp_path, family, kind, head):
    base = bases(family, head)
    options = _ENCODERS[kind]("query" if family == "roberta" else "query_proj", _TASKS[head])
    expected = written_by_peft(torch, theirs, base, options, tmp_path / "adapter")
    scan = family == "deberta"
    check_both_ways(torch, theirs, base, tmp_path / "adapter", tmp_path, expected, scan=scan)


def test_a_convolution_from_peft_and_back(torch, theirs, bases, tmp_path):
    base = bases("deberta", "features")
    for dora in (False, True):
        dir = tmp_path / f"{dora}"
        expected = written_by_peft(
            torch, theirs, base, dict(r=2, target_modules=["conv.conv"], use_dora=dora), dir
        )
        model, params = hf.load(base)
        frozen, delta = peft.load(dir, model, params)
        if dora:  # forms the convolution's norm from other axes than those that it adds to
            assert adapters(delta)[0].arrays["m"].shape == (12,)
        else:
            check_both_ways(torch, theirs, base, dir, tmp_path, expected)
        assert_close(output(model, frozen, delta), expected)


def test_a_new_head_comes_with_its_adapter(torch, theirs, bases, tmp_path):
    """As in fine-tuning: the base has another head, and the adapter brings the one that was trained."""
    expected = written_by_peft(
        torch,
        theirs,
        bases("roberta", "sequence_classification"),
        _ENCODERS["LoRA"]("query", "SEQ_CLS"),
        tmp_path / "adapter",
    )
    options = peft.head_of(tmp_path / "adapter")
    assert options == {"head": "sequence_classification", "num_labels": 3}
    model, params = hf.load(
        without_head(bases("roberta", "sequence_classification"), "RobertaModel", tmp_path / "base"),
        **options,
    )
    frozen, delta = peft.load(tmp_path / "adapter", model, params)
    assert_close(output(model, frozen, delta), expected)
    assert frozen["classifier"]["dense"]["kernel"] is None and delta["classifier"]["dense"][
        "kernel"
    ].shape == (12, 12)

    model, params = hf.load(bases("roberta", "masked_lm"))
    with pytest.raises(ValueError, match=r"`task_type` .* is SEQ_CLS, and `model` has another head.*head_of"):
        peft.load(tmp_path / "adapter", model, params)


def test_adalora_with_a_rank_pattern(torch, theirs, bases, tmp_path):
    """PEFT stores the ranks that are left and a mask; here the others are zero, and the scale is still
    that of the whole rank.
    """
    base = bases("gpt2")
    torch.manual_seed(7)
    model = theirs.get_peft_model(
        in_torch(base),
        theirs.AdaLoraConfig(
            init_r=4, target_r=2, target_modules=["c_attn"], total_step=10, task_type="CAUSAL_LM"
        ),
    ).eval()
    disturb(torch, [parameter for parameter in model.parameters() if parameter.requires_grad], 0.2)
    pattern = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_E" in name:
                kept = [True, False, True, "h.0" in name]
                parameter[~torch.tensor(kept)] = 0.0
                pattern[name.removeprefix("base_model.model.")] = kept
    model.peft_config["default"].rank_pattern = pattern
    expected = output_of_theirs(torch, model)
    model.save_pretrained(tmp_path / "adapter")
    frozen, delta = check_both_ways(torch, theirs, base, tmp_path / "adapter", tmp_path, expected)
    assert {leaf.arrays["e"].shape for leaf in adapters(delta)} == {(4,)}
    assert [int(np.count_nonzero(leaf.arrays["e"])) for leaf in adapters(delta)] == [3, 2]


def test_older_files_of_dora(torch, theirs, bases, tmp_path):
    from safetensors.numpy import save_file

    expected = written_by_peft(torch, theirs, bases("gpt2"), _GPT2_CONFIGS["DoRA"], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(
        {f"{name}.weight" if "magnitude" in name else name: array for name, array in load_file(file).items()},
        file,
        metadata={"format": "pt"},
    )
    model, params = hf.load(bases("gpt2"))
    assert_close(output(model, *peft.load(tmp_path / "adapter", model, params)), expected)


def test_the_bin_file_of_old_is_read(torch, theirs, bases, tmp_path):
    expected = written_by_peft(torch, theirs, bases("gpt2"), _GPT2_CONFIGS["LoRA"], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(
        {name: torch.tensor(array) for name, array in load_file(file).items()}, file.with_suffix(".bin")
    )
    file.unlink()
    model, params = hf.load(bases("gpt2"))
    assert_close(output(model, *peft.load(tmp_path / "adapter", model, params)), expected)


# --- what we write ------------------------------------------------------------------------------------------

_METHODS = {
    "LoRA": LoRA(rank=3, alpha=6),
    "rsLoRA": LoRA(rank=3, alpha=6, rs=True),
    "LoRA of blocks": LoRA(rank=2, alpha=8, blocks=(True, False, True)),
    "rsLoRA of blocks": LoRA(rank=2, alpha=8, rs=True, blocks=(False, True, True)),
    "DoRA": DoRA(rank=2),
    "VeRA": VeRA(rank=5, seed=3),
    "LoRA-FA": LoRAFA(rank=2),
    "DyLoRA": DyLoRA(rank=2),
    "Delta-LoRA": DeltaLoRA(rank=2),
    "AdaLoRA": AdaLoRA(rank=3),
    "PiSSA": PiSSA(rank=2),
}


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", _METHODS)
def test_every_method_computes_the_same_in_peft(torch, theirs, bases, tmp_path, name, scan):
    model, params = hf.load(bases("gpt2"), scan=scan)
    frozen, delta = lora_jax.lorafy(params, "attn/c_attn/kernel", method=_METHODS[name], axes=axes(scan))
    delta = trained(delta)
    expected = output(model, frozen, delta)
    peft.save(tmp_path / "ours", model, frozen, delta, base="gpt2")
    assert_close(
        output_of_theirs(
            torch, theirs.PeftModel.from_pretrained(in_torch(bases("gpt2")), tmp_path / "ours").eval()
        ),
        expected,
    )

    # The layout does not matter: what a scanned model wrote, an unscanned one reads.
    model, params = hf.load(bases("gpt2"), scan=not scan)
    again = peft.load(tmp_path / "ours", model, params)
    assert_close(output(model, *again), expected)
    peft.save(tmp_path / "again", model, *again, base="gpt2")
    assert bytes_of(tmp_path / "ours") == bytes_of(tmp_path / "again")
    if "blocks" in name:
        assert {leaf.spec.method.blocks for leaf in adapters(again.delta)} == {_METHODS[name].blocks}
        assert all(
            leaf.spec.method.rank == 2
            and leaf.spec.method.scale == pytest.approx(_METHODS[name].scale, rel=1e-12)
            for leaf in adapters(again.delta)
        )


def test_lora_drop_computes_the_same_in_peft(torch, theirs, bases, tmp_path):
    base = bases("gpt2 of three layers")  # one keeps its adapter, two share one
    for scan in (False, True):
        model, params = hf.load(base, scan=scan)
        frozen, delta = lora_jax.lorafy(params, "attn/c_attn/kernel", method=LoRA(rank=2), axes=axes(scan))
        importance = {
            leaf.spec.path: np.array([8.0, 1.0, 1.0]) if scan else 8.0 if "h/0/" in leaf.spec.path else 1.0
            for leaf in adapters(delta)
        }
        whole = lora_jax.count(delta)
        delta = trained(lora_jax.drop.share(delta, importance, threshold=0.7))
        assert lora_jax.count(delta) == whole * 2 // 3
        peft.save(tmp_path / str(scan), model, frozen, delta)
        found = output_of_theirs(
            torch, theirs.PeftModel.from_pretrained(in_torch(base), tmp_path / str(scan)).eval()
        )
        assert_close(found, output(model, frozen, delta))


def test_ranks_scales_and_kinds_of_leaves_in_one_adapter(torch, theirs, bases, tmp_path):
    model, params = hf.load(bases("gpt2"))
    targets = {
        "h/0/attn/c_attn/kernel": LoRA(rank=2, alpha=8),
        "attn/c_attn/kernel": LoRA(rank=3, alpha=8, rs=True),
        "mlp/c_fc/kernel": VeRA(rank=5),
        "h/1/mlp/c_proj/kernel": AdaLoRA(rank=3),
        "wpe/embedding": LoRA(rank=1),
        "ln_f/.*": Full(),
    }
    frozen, delta = lora_jax.lorafy(params, targets, axes={".*": "in out"})
    delta = trained(delta)
    peft.save(tmp_path / "ours", model, frozen, delta)
    settings = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["1.mlp.c_proj", "c_attn", "c_fc", "wpe"] and settings[
        "modules_to_save"
    ] == ["transformer.ln_f"]
    assert_close(
        output_of_theirs(
            torch, theirs.PeftModel.from_pretrained(in_torch(bases("gpt2")), tmp_path / "ours").eval()
        ),
        output(model, frozen, delta),
    )
    again = peft.load(tmp_path / "ours", model, params)
    assert_close(output(model, *again), output(model, frozen, delta))


@pytest.mark.usefixtures("relaxed_promotion")  # optax's
def test_peft_trains_we_go_on_peft_reads(torch, theirs, bases, tmp_path):
    """One adapter through both trainers: the gradient here moves what PEFT trained, and PEFT computes
    with the result.
    """
    base = bases("roberta", "sequence_classification")
    torch.manual_seed(7)
    theirs_model = theirs.get_peft_model(
        in_torch(base), theirs.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    )
    labels = torch.tensor([0, 1, 2])
    optimizer = torch.optim.AdamW(
        [parameter for parameter in theirs_model.parameters() if parameter.requires_grad], lr=1e-2
    )
    losses = []
    for _ in range(5):
        loss = theirs_model(torch.tensor(IDS), labels=labels).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    theirs_model.save_pretrained(tmp_path / "first")

    import optax

    model, params = hf.load(base)
    frozen, delta = peft.load(tmp_path / "first", model, params)
    tx = optax.adamw(1e-2)
    forward = lora_jax.adapt(model.apply)

    def loss_fn(delta):
        logits = forward({"params": lora_jax.combine(frozen, delta)}, IDS)
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(3)).mean()

    @jax.jit
    def step(delta, state):
        loss, grads = jax.value_and_grad(loss_fn)(delta)
        updates, state = tx.update(grads, state, delta)
        return optax.apply_updates(delta, updates), state, loss

    state = tx.init(delta)
    for _ in range(5):
        delta, state, loss = step(delta, state)
        losses.append(float(loss))
    assert all(later < earlier for earlier, later in zip(losses, losses[1:], strict=False))
    peft.save(tmp_path / "second", model, frozen, delta)
    theirs_model = theirs.PeftModel.from_pretrained(
        in_torch(base), tmp_path / "second", is_trainable=True
    ).eval()
    with torch.no_grad():
        found = theirs_model(torch.tensor(IDS), labels=labels)
    assert_close(found.logits.numpy(), output(model, frozen, delta))
    assert float(found.loss) < losses[-1]


def test_a_quantised_base_does_not_matter(bases, tmp_path):
    model, params = hf.load(bases("gpt2"))
    frozen, delta = lora_jax.lorafy(params, "attn/c_attn/kernel", method=LoRA(rank=2))
    delta = trained(delta)
    packed = lora_jax.quantize(frozen, "nf4", targets=".*kernel")
    peft.save(tmp_path / "packed", model, packed, delta)
    peft.save(tmp_path / "plain", model, frozen, delta)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("packed", "plain"))
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    found = peft.load(tmp_path / "packed", model, params)
    assert_close(output(model, *found), output(model, frozen, delta))
    # And onto packed parameters.
    found = peft.load(tmp_path / "plain", model, packed)
    assert_close(output(model, *found), output(model, packed, delta))


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


# --- heads and biases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["roberta", "deberta"])
def test_a_head_is_never_left_behind(torch, theirs, bases, tmp_path, family):
    """A frozen random head, and DeBERTa's pooler, are written all the same: PyTorch's would be other
    random ones.
    """
    base = bases(family, "sequence_classification")
    bare = without_head(base, "RobertaModel" if family == "roberta" else "DebertaV2Model", tmp_path / "base")
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
            if name.startswith(("classifier", "pooler"))
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
        ("deberta", "sequence_classification"),
        ("roberta", "token_classification"),
    ],
)
def test_an_adapted_head_is_written_merged(torch, theirs, bases, tmp_path, family, head):
    """PEFT saves it whole, and has no adapter there; and the weight of a new head is in no base."""
    base = bases(family, head)
    bare = without_head(base, "RobertaModel" if family == "roberta" else "DebertaV2Model", tmp_path / "base")
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


@pytest.mark.parametrize("family", ["roberta", "deberta"])
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


@pytest.mark.parametrize("alpha", [0, -2])
def test_adalora_of_no_alpha(torch, theirs, bases, tmp_path, alpha):
    """PEFT takes the rank instead, for this method alone."""
    options = dict(init_r=4, target_modules=["c_attn"], total_step=10, lora_alpha=alpha)
    expected = written_by_peft(torch, theirs, bases("gpt2"), options, tmp_path / "adapter")
    check_both_ways(torch, theirs, bases("gpt2"), tmp_path / "adapter", tmp_path, expected)
    model, params = hf.load(bases("gpt2"))
    frozen, delta = lora_jax.lorafy(params, "c_attn/kernel", method=AdaLoRA(rank=2, alpha=alpha))
    delta = trained(delta)
    peft.save(tmp_path / "own", model, frozen, delta)
    assert_close(
        output_of_theirs(
            torch, theirs.PeftModel.from_pretrained(in_torch(bases("gpt2")), tmp_path / "own").eval()
        ),
        output(model, frozen, delta),
    )


# --- what is refused ----------------------------------------------------------------------------------------


def test_trees_that_do_not_belong_together_are_not_written(bases, tmp_path):
    model, params = hf.load(bases("gpt2"))
    frozen, delta = lora_jax.lorafy(params, "c_attn/kernel", method=VeRA(rank=3))
    other = lora_jax.lorafy(params, "c_attn/kernel", method=VeRA(rank=3, seed=9)).frozen
    lora = lora_jax.lorafy(params, "c_attn/kernel", method=LoRA(rank=3))
    save = functools.partial(peft.save, tmp_path / "ours", model)
    for trees, error, message in (
        ((other, delta), ValueError, "do not belong together"),
        ((params, delta), ValueError, "needs shared_a, shared_b in `frozen`"),
        ((None, delta), ValueError, "do not have the same containers"),
        ((lora.delta, lora.frozen), TypeError, "`frozen` holds adapters: the order is `frozen`, `delta`"),
        ((frozen, lora_jax.combine(frozen, delta)), TypeError, "a combined tree was passed"),
        (
            (lora.frozen, jax.eval_shape(lambda: lora.delta)),
            TypeError,
            "computes with arrays, and was given shapes",
        ),
        (
            (lora.frozen, lora_jax.stack([lora.delta, lora.delta])),
            ValueError,
            r"stacked adapters at 'h/0/attn/c_attn/kernel'; save one of them, `take\(stacked, 0\)`",
        ),
    ):
        with pytest.raises(error, match=message):
            save(*trees)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, lora.delta)
    with pytest.raises(
        ValueError, match="lora_A.weight' has values that are infinite or no numbers, so nothing is written"
    ):
        save(lora.frozen, broken)
    assert not (tmp_path / "ours").exists()


def test_the_largest_dropout_is_written(bases, tmp_path):
    model, params = hf.load(bases("gpt2"))
    peft.save(
        tmp_path / "ours",
        model,
        *lora_jax.lorafy(params, {"c_attn/kernel": LoRA(rank=1, dropout=0.1), "c_fc/kernel": LoRA(rank=1)}),
    )
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["lora_dropout"] == 0.1


@pytest.fixture
def ours(bases, tmp_path):
    """A base and an adapter that we wrote."""
    model, params = hf.load(bases("gpt2"))
    frozen, delta = lora_jax.lorafy(params, "c_attn/kernel", method=LoRA(rank=2))
    peft.save(tmp_path / "adapter", model, frozen, trained(delta))
    return model, params, tmp_path / "adapter"


def configure(dir, **changes):
    settings = json.loads((dir / "adapter_config.json").read_text())
    (dir / "adapter_config.json").write_text(json.dumps({**settings, **changes}))


def edit(dir, change):
    """Rewrites the tensors as another tool would, without our checksum."""
    from safetensors.numpy import save_file

    tensors = load_file(dir / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, dir / "adapter_model.safetensors", metadata={"format": "pt"})


A = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"peft_type": "LOHA"},
            "`peft_type` is 'LOHA' .* is not supported; supported are LORA, ADALORA, VERA",
        ),
        ({"lora_bias": True}, "`lora_bias` is True .* is not supported"),
        ({"trainable_token_indices": [1, 3]}, "`trainable_token_indices`"),
        ({"layer_replication": [[0, 2]]}, "`layer_replication`"),
        ({"target_parameters": ["c_attn.weight"]}, "`target_parameters`"),
        ({"ensure_weight_tying": True}, "`ensure_weight_tying`"),
        ({"alora_invocation_tokens": [1]}, "`alora_invocation_tokens`"),
        (
            {"init_lora_weights": "olora"},
            "`init_lora_weights` is 'olora' .* PEFT changes the base by a start",
        ),
        ({"init_lora_weights": "pissa_niter_4"}, "`init_lora_weights` is 'pissa_niter_4'"),
        ({"init_lora_weights": "loftq"}, "`init_lora_weights` is 'loftq'"),
        ({"use_future_trick": 3}, "`use_future_trick` is 3 .* is not a key of LORA in PEFT 0.21"),
        ({"use_rslroa": True}, r"`use_rslroa` is True .* \(is it 'use_rslora'\?\)"),
        ({"r": 0}, "`r` is 0 .* must be a positive integer"),
        ({"r": 2.0}, "`r` is 2.0 .* must be a positive integer"),
        ({"lora_alpha": "16"}, "`lora_alpha` is '16' .* must be a finite number"),
        ({"lora_alpha": float("nan")}, "`lora_alpha` is nan .* must be a finite number"),
        ({"lora_dropout": 1.0}, "`lora_dropout` is 1.0 .* below 1"),
        ({"use_rslora": "yes"}, "`use_rslora` is 'yes' .* must be true or false"),
        ({"target_modules": [1]}, "`target_modules` is .*; it must be a list of module names"),
        (
            {"target_modules": ["c_atn"]},
            "`target_modules` .* names 'c_atn', which this model does not have: it has c_attn, c_fc",
        ),
        (
            {"target_modules": ["ln_1"]},
            "`target_modules` .* names 'transformer.h.0.ln_1', which is not a linear layer",
        ),
        ({"target_modules": "nothing"}, "matches no module of this model"),
        ({"target_modules": "("}, "`target_modules` is .*, which is not a regular expression"),
        (
            {"rank_pattern": {"h.0.": "2"}},
            "`rank_pattern` is .*; it must be a mapping from module names to positive integers",
        ),
        ({"task_type": "SEQ_CLS"}, "`task_type` .* is SEQ_CLS, and `model` has another head"),
        ({"bias": "some"}, "`bias` is 'some' .* must be one of"),
        (
            {"use_dora": True},
            "'base_model.model.transformer.h.0.attn.c_attn.lora_magnitude_vector' is missing",
        ),
        ({"r": 3}, r"has shape \(2, 12\) and must have \(3, 12\)"),
        (
            {"target_modules": ["c_attn", "c_fc"]},
            "'base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight' is missing",
        ),
        (
            {"target_modules": ["h.0.attn.c_attn"]},
            "'base_model.model.transformer.h.1.attn.c_attn.lora_A.weight' is unexpected",
        ),
        ({"modules_to_save": ["ln_f"]}, "'base_model.model.transformer.ln_f.weight' is missing"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused_by_its_field(ours, changes, message):
    model, params, dir = ours
    edit(dir, lambda tensors: None)
    configure(dir, **changes)
    with pytest.raises(ValueError, match=message):
        peft.load(dir, model, params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(A), f"'{A}' is missing"),
        (
            lambda tensors: tensors.update({A.replace("c_attn", "c_atn"): tensors.pop(A)}),
            f"'{A}' is missing .is it '{A.replace('c_attn', 'c_atn')}'",
        ),
        (
            lambda tensors: tensors.update({A.removeprefix("base_model.model."): tensors.pop(A)}),
            "is it 'transformer.h.0.attn.c_attn.lora_A.weight'",
        ),
        (lambda tensors: tensors.update({"extra": np.ones(1, np.float32)}), "'extra' is unexpected"),
        (
            lambda tensors: tensors.update({A: tensors[A].T.copy()}),
            r"has shape \(12, 2\) and must have \(2, 12\)",
        ),
        (
            lambda tensors: tensors.update({A: tensors[A].astype(np.int32)}),
            "has dtype I32 and must have one of",
        ),
        (
            lambda tensors: tensors.update({A: np.where(tensors[A] > 0, np.nan, tensors[A])}),
            "values in '.*lora_A.weight' that are infinite or no numbers",
        ),
        (
            lambda tensors: tensors.update({A: np.where(tensors[A] > 0, np.inf, tensors[A])}),
            "values in '.*lora_A.weight' that are infinite or no numbers",
        ),
        (
            lambda tensors: tensors.update(
                {"base_model.model.transformer.wte.weight": np.ones((29, 12), np.float32)}
            ),
            "own copy of the base's 'transformer.wte.weight'",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(ours, change, message):
    model, params, dir = ours
    edit(dir, change)
    with pytest.raises(ValueError, match=message):
        peft.load(dir, model, params)


def test_a_flipped_bit_anywhere_is_found(ours):
    model, params, dir = ours
    draw = np.random.default_rng(0)
    for name in FILES:
        whole = (dir / name).read_bytes()
        for position in draw.choice(8 * len(whole), min(150, 8 * len(whole)), replace=False):
            broken = bytearray(whole)
            broken[position // 8] ^= 1 << (position % 8)
            (dir / name).write_bytes(broken)
            with pytest.raises(ValueError):
                peft.load(dir, model, params)
        (dir / name).write_bytes(whole)
    peft.load(dir, model, params)


def test_another_base_is_found_unless_told(ours):
    model, params, dir = ours
    other = copy.deepcopy(jax.tree.map(lambda leaf: leaf, params))
    other["h"]["1"]["mlp"]["c_fc"]["kernel"] = other["h"]["1"]["mlp"]["c_fc"]["kernel"].at[3, 4].add(1e-6)
    with pytest.raises(
        ValueError,
        match=(
            "beside another base: 'transformer.h.1.mlp.c_fc.weight' of `params` have other "
            "values.*`check_base=False`"
        ),
    ):
        peft.load(dir, model, other)
    peft.load(dir, model, other, check_base=False)


def test_nothing_is_overwritten_unless_told_and_nothing_lost(ours, monkeypatch):
    model, params, dir = ours
    frozen, delta = lora_jax.lorafy(params, "c_fc/kernel", method=LoRA(rank=1))
    before = bytes_of(dir)
    with pytest.raises(
        ValueError, match="is not empty; choose another directory, or replace it with `overwrite=True`"
    ):
        peft.save(dir, model, frozen, delta)

    def fail(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(peft._save, "write_tensors", fail)
        peft.save(dir, model, frozen, delta, overwrite=True)
    assert bytes_of(dir) == before and [entry.name for entry in dir.parent.iterdir()] == ["adapter"]
    peft.save(dir, model, frozen, delta, overwrite=True)
    assert bytes_of(dir) != before
    (dir.parent / "home").mkdir()
    (dir.parent / "home" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="no adapter_config.json: not an earlier"):
        peft.save(dir.parent / "home", model, frozen, delta, overwrite=True)
    # What a trainer of PEFT's leaves: its adapter, and much besides.
    (dir / "checkpoint-500").mkdir()
    with pytest.raises(
        ValueError, match="holds 'checkpoint-500', which no export writes, so it is not replaced"
    ):
        peft.save(dir, model, frozen, delta, overwrite=True)
    assert (dir / "checkpoint-500").is_dir()


def test_a_link_is_followed_and_what_appears_meanwhile_stays(ours, tmp_path, monkeypatch):
    model, params, dir = ours
    frozen, delta = lora_jax.lorafy(params, "c_fc/kernel", method=LoRA(rank=1))
    (tmp_path / "link").symlink_to(dir)
    peft.save(tmp_path / "link", model, frozen, delta, overwrite=True)
    assert (tmp_path / "link").is_symlink() and "c_fc" in (dir / "adapter_config.json").read_text()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter", "link"]

    write = peft._save.write_tensors

    def slow(*args, **kwargs):
        write(*args, **kwargs)
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "letter.txt").write_text("dear")

    monkeypatch.setattr(peft._save, "write_tensors", slow)
    with pytest.raises(ValueError, match="appeared while this was being written: nothing is replaced"):
        peft.save(tmp_path / "new", model, frozen, delta)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["letter.txt"]


def test_what_has_no_form_in_peft_is_refused(bases, tmp_path):
    model, params = hf.load(bases("gpt2"))
    save = functools.partial(peft.save, tmp_path / "ours", model)
    with pytest.raises(ValueError, match="holds no adapter.*hf.save"):
        save(*lora_jax.lorafy(params, {"bias": Full()}))
    with pytest.raises(ValueError, match="holds DoRA and, at 'h/0/mlp/c_fc/kernel', LoRA"):
        save(*lora_jax.lorafy(params, {"c_attn/kernel": DoRA(rank=1), "c_fc/kernel": LoRA(rank=1)}))
    with pytest.raises(ValueError, match="`delta` is not of `model`, whose layers are stacked"):
        peft.save(
            tmp_path / "ours",
            model.clone(scan=True),
            *lora_jax.lorafy(params, "c_attn/kernel", method=LoRA(rank=1)),
        )
    with pytest.raises(ValueError, match="was made with the axes 'out in'"):
        save(*lora_jax.lorafy(params, "c_attn/kernel", method=DoRA(rank=1), axes="out in"))
    assert not (tmp_path / "ours").exists()


def test_the_axes_of_lora_may_be_called_either_way(bases, tmp_path):
    model, params = hf.load(bases("gpt2"))
    frozen, delta = lora_jax.lorafy(params, "c_attn/kernel", method=LoRA(rank=2), axes="out in")
    delta = trained(delta)
    peft.save(tmp_path / "ours", model, frozen, delta)
    assert_close(output(model, *peft.load(tmp_path / "ours", model, params)), output(model, frozen, delta))


def test_dtypes_are_kept(bases, tmp_path):
    model, params = hf.load(bases("gpt2"))
    for dtype in (jnp.bfloat16, jnp.float16):
        frozen, delta = lora_jax.lorafy(
            params, {"c_attn/kernel": LoRA(rank=2, dtype=dtype), "ln_f/.*": Full()}
        )
        delta = trained(delta)
        peft.save(tmp_path / "ours", model, frozen, delta, overwrite=True)
        again = peft.load(tmp_path / "ours", model, params)
        for one, other in zip(jax.tree.leaves(delta), jax.tree.leaves(again.delta), strict=True):
            assert one.dtype == other.dtype and np.array_equal(one, other)
        assert {leaf.spec.method.dtype for leaf in adapters(again.delta)} == {np.dtype(dtype)}


def test_the_config_has_few_keys_in_order(ours):
    _, _, dir = ours
    settings = json.loads((dir / "adapter_config.json").read_text())
    assert list(settings) == sorted(settings)
    assert settings == {
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": True,
        "inference_mode": True,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["c_attn"],
        "task_type": "CAUSAL_LM",
    }
    with_weights = dir.parent / "copy"
    shutil.copytree(dir, with_weights)
    assert {file.name for file in with_weights.iterdir()} == set(FILES)


def test_loading_computes_what_the_shapes_say_without_touching_the_base(ours):
    """Of a base of shapes, an adapter can be looked at."""
    model, params, dir = ours
    shapes = jax.eval_shape(lambda: params)
    frozen, delta = peft.load(dir, model, shapes)
    assert lora_jax.count(delta) == 2 * 2 * (12 + 36)
    assert all(type(leaf) is jax.ShapeDtypeStruct for leaf in jax.tree.leaves(frozen))
