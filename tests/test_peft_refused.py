"""Directories of PEFT's format that do not fit, or are damaged, and what the format cannot say: refused."""

import copy
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft_files
import pytest
from peft_files import assert_close, FILES, in_torch, output, output_of_theirs, written_by_peft
from safetensors.numpy import load_file

import lora_jax
from lora_jax import DoRA, Full, LoRA, VeRA
from lora_jax.interop import _fingerprint, hf, peft


theirs = peft_files.theirs
bases = peft_files.bases
ours = peft_files.ours
pytestmark = peft_files.ignored_warnings


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
        ({"trainable_token_indices": [1, 1]}, "`trainable_token_indices` is .*different tokens"),
        (
            {"trainable_token_indices": [1, 29]},
            "`trainable_token_indices` .* has the token 29, .* has 29 rows",
        ),
        ({"trainable_token_indices": {"wpe": [1]}}, "`trainable_token_indices` of .* names 'wpe'"),
        (
            {"trainable_token_indices": [1], "modules_to_save": ["wte"]},
            "trains tokens of 'transformer.wte', and 'transformer.wte' is adapted or saved whole too",
        ),
        ({"trainable_token_indices": [1]}, "wte.token_adapter.trainable_tokens_delta' is missing"),
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


def test_neutral_values_of_any_field_are_what_they_are_in_peft(torch, theirs, bases, tmp_path):
    """Null and empty values. What PEFT reads as before, we read as before; what it reads otherwise, we do not
    read.
    """
    base = bases("gpt2")
    options = dict(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM")
    expected = written_by_peft(torch, theirs, base, options, tmp_path / "adapter")
    model, params = hf.load(base)
    file = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text())
    same = set()
    for field, value in itertools.product(settings, (None, False, [], {})):
        file.write_text(json.dumps({**settings, field: value}))
        try:
            found = theirs.PeftModel.from_pretrained(in_torch(base), tmp_path / "adapter").eval()
            unchanged = np.abs(output_of_theirs(torch, found) - expected).max() < 1e-6
        except Exception:  # PEFT meets such values with any error of Python's
            unchanged = None
        try:
            trees = peft.load(tmp_path / "adapter", model, params)
        except ValueError as error:
            assert f"`{field}`" in str(error) or "does not hold the adapter" in str(error)
            # Of another type than the field's, and refused as such.
            assert not unchanged or value is not None and type(value) is not type(settings[field]), field
            continue
        assert unchanged is not False, (field, value)
        assert_close(output(model, *trees), expected)
        same.add((field, str(value)))
    assert {("layer_replication", "[]"), ("megatron_config", "{}")} <= same
    off = {"lora_bias", "use_dora", "use_rslora", "ensure_weight_tying", "use_qalora", "use_bdlora"}
    assert {(field, "None") for field in off} <= same
    assert not {("kasa_config", "{}"), ("use_bdlora", "{}"), ("arrow_config", "{}")} & same


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


def test_a_base_of_the_same_bytes_and_another_dtype_is_another(bases, tmp_path):
    model, params = hf.load(bases("gpt2"))
    zeros = lambda dtype: {**params, "ln_f": {**params["ln_f"], "bias": jnp.zeros(12, dtype)}}
    frozen, delta = lora_jax.lorafy(zeros(jnp.float16), "c_attn/kernel", method=LoRA(rank=2))
    peft.save(tmp_path / "adapter", model, frozen, delta)
    peft.load(tmp_path / "adapter", model, zeros(jnp.float16))
    with pytest.raises(ValueError, match="beside another base: 'transformer.ln_f.bias'"):
        peft.load(tmp_path / "adapter", model, zeros(jnp.bfloat16))


def test_the_digits_of_a_tensor_are_of_its_dtype_its_shape_and_its_values():
    array = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
    same_bytes = [array.view(np.int32), array.view(np.float16), array.reshape(3, 2), array.reshape(6)]
    assert _fingerprint._digits(array) == _fingerprint._digits(array.copy())
    assert len({_fingerprint._digits(other) for other in [array, *same_bytes, array + 1, array.T]}) == 7


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
