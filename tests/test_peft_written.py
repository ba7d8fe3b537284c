"""What we write in PEFT's format: PEFT reads it and computes the same."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft_files
import pytest
from peft_files import (
    adapters,
    assert_close,
    axes,
    bytes_of,
    check_both_ways,
    IDS,
    in_torch,
    output,
    output_of_theirs,
    trained,
    written_by_peft,
)
from safetensors.numpy import load_file

import lora_jax
from lora_jax import AdaLoRA, DeltaLoRA, DoRA, DyLoRA, Full, LoRA, LoRAFA, PiSSA, VeRA
from lora_jax.interop import hf, peft


theirs = peft_files.theirs
bases = peft_files.bases
pytestmark = peft_files.ignored_warnings


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


_FIELDS = {
    "LoRA": (
        LoRA(rank=3, alpha=5, dropout=0.25, rs=True),
        dict(r=3, lora_alpha=5, lora_dropout=0.25, use_rslora=True, use_dora=False),
    ),
    "DoRA": (
        DoRA(rank=3, alpha=5, dropout=0.25),
        dict(r=3, lora_alpha=5, lora_dropout=0.25, use_rslora=False, use_dora=True),
    ),
    "AdaLoRA": (AdaLoRA(rank=3, alpha=5, dropout=0.25), dict(init_r=3, lora_alpha=5, lora_dropout=0.25)),
    "VeRA": (
        VeRA(rank=5, d_initial=0.3, seed=9, dropout=0.25),
        dict(r=5, d_initial=0.3, projection_prng_key=9, vera_dropout=0.25, save_projection=True),
    ),
}


@pytest.mark.parametrize("name", _FIELDS)
def test_every_field_of_a_method_is_told_and_comes_back(theirs, bases, tmp_path, name):
    """Those too that change only how training would go on."""
    method, fields = _FIELDS[name]
    model, params = hf.load(bases("gpt2"))
    peft.save(tmp_path / "ours", model, *lora_jax.lorafy(params, "c_attn/kernel", method=method))
    config = theirs.PeftConfig.from_pretrained(tmp_path / "ours")
    assert {field: getattr(config, field) for field in fields} == fields
    found = peft.load(tmp_path / "ours", model, params)
    assert {leaf.spec.method for leaf in adapters(found.delta)} == {method}


@pytest.mark.parametrize(
    ("family", "head", "target"),
    [("gpt2", None, "c_attn/kernel"), ("roberta", "features", "query/kernel")],
)
@pytest.mark.parametrize("method", [LoRA(rank=2), VeRA(rank=2)], ids=lambda method: type(method).__name__)
def test_peft_is_told_how_the_weights_lie(theirs, bases, tmp_path, family, head, target, method):
    """A wrong `fan_in_fan_out` PEFT mends by itself, and warns of it, which is an error here."""
    model, params = hf.load(bases(family, head))
    peft.save(tmp_path / "ours", model, *lora_jax.lorafy(params, target, method=method))
    assert theirs.PeftConfig.from_pretrained(tmp_path / "ours").fan_in_fan_out == (family == "gpt2")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fan_in_fan_out is set to")
        theirs.PeftModel.from_pretrained(in_torch(bases(family, head)), tmp_path / "ours")


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
