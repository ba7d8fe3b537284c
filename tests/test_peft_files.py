"""Directories of PEFT's format as files: what is in them, and when one is replaced."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peft_files
import pytest
from peft_files import adapters, assert_close, bytes_of, FILES, output, trained

import lora_jax
from lora_jax import Full, LoRA
from lora_jax.interop import hf, peft


bases = peft_files.bases
ours = peft_files.ours
pytestmark = peft_files.ignored_warnings


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
