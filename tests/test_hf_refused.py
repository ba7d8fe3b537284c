"""Hugging Face directories that are not whole are refused, and nothing is lost in saving."""

import json
import shutil
from pathlib import Path

import gpt2_files
import jax
import numpy as np
import pytest
from gpt2_files import assert_same, configure, edit, MODEL, random_params
from safetensors import safe_open

from lora_jax.interop import _safetensors, hf, peft
from lora_jax.models import stack_layers


saved = gpt2_files.saved


def drop(name):
    return lambda dir: edit(dir, lambda tensors: tensors.pop(name) is None)


def put(name, value):
    return lambda dir: edit(dir, lambda tensors: tensors.update({name: value}))


def rename(old, new):
    return lambda dir: edit(dir, lambda tensors: tensors.update({new: tensors.pop(old)}))


def cut(bytes):
    def shorten(dir):
        file = dir / "model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:bytes] if bytes >= 0 else content[: len(content) + bytes])

    return shorten


def write(name, text):
    return lambda dir: (dir / name).write_text(text)


def remove(name):
    return lambda dir: (dir / name).unlink()


BIAS = "transformer.h.1.mlp.c_fc.bias"


@pytest.mark.parametrize(
    "damage, message",
    [
        (drop(BIAS), f"'{BIAS}' is missing"),
        (
            put("transformer.h.1.extra.weight", np.ones(3, np.float32)),
            "'transformer.h.1.extra.weight' is unexpected",
        ),
        (
            put("transformer.h.2.ln_1.bias", np.ones(16, np.float32)),
            "'transformer.h.2.ln_1.bias' is unexpected",
        ),
        (put("wte.weight", np.ones((101, 16), np.float32)), "one tensor under two names.*'wte.weight'"),
        (put(BIAS, np.ones(65, np.float32)), rf"'{BIAS}' has shape \(65,\) and must have \(64,\)"),
        (put("lm_head.weight", np.ones((101, 16), np.float32)), "'lm_head.weight' that differs"),
        (put(BIAS, np.ones(64, np.int32)), f"'{BIAS}' has dtype I32"),
        (
            rename(BIAS, "transformer.h.1.mlp.c_fc.bais"),
            f"'{BIAS}' is missing .is it 'transformer.h.1.mlp.c_fc.bais'",
        ),
        (cut(-1), "model.safetensors is not a complete safetensors file"),
        (cut(100), "model.safetensors is not a complete safetensors file"),
        (cut(0), "model.safetensors is not a complete safetensors file"),
        (
            write("model.safetensors", "not tensors at all"),
            "model.safetensors is not a complete safetensors file",
        ),
        (remove("model.safetensors"), "neither model.safetensors nor .*found there: .'config.json'"),
        (remove("config.json"), "config.json is missing; found there: .'model.safetensors'"),
        (shutil.rmtree, "config.json is missing; found there: no such directory"),
        (write("config.json", '{"n_layer":'), "config.json is not JSON"),
        (write("config.json", "[]"), "config.json holds a JSON list"),
        (
            lambda dir: configure(dir, model_type="mamba"),
            "`model_type` is 'mamba'.*supported are .*'gpt2'.*Any JAX implementation of it will do: "
            "`lorafy` and `adapt` need no model of ours.*https://",
        ),
        (
            lambda dir: configure(dir, architectures=["GPT2DoubleHeadsModel"]),
            "'GPT2DoubleHeadsModel'",
        ),
        (lambda dir: configure(dir, add_cross_attention=True), "`add_cross_attention` is True"),
        (lambda dir: configure(dir, n_layer=3), "'transformer.h.2.attn.c_attn.bias' is missing.*and 4 more"),
        (
            lambda dir: configure(dir, n_positions=8),
            r"wpe.weight' has shape \(16, 16\) and must have \(8, 16\)",
        ),
    ],
)
def test_what_is_wrong_with_a_directory_is_named(saved, damage, message):
    damage(saved)
    with pytest.raises(ValueError, match=message):
        hf.load(saved)


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_a_name_on_the_hub_is_downloaded_first(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for load in (hf.load, peft.head_of):
        with pytest.raises(ValueError, match=f"huggingface_hub.snapshot_download.'{name}'."):
            load(name)
    with pytest.raises(ValueError) as caught:
        hf.load(tmp_path / name)  # a whole path is no name
    assert "huggingface_hub" not in str(caught.value)


def point(name, shard=None):
    """Changes where the index says that a tensor is; to the first shard, if no other is given."""

    def redirect(dir):
        index = json.loads((dir / "model.safetensors.index.json").read_text())
        index["weight_map"][name] = shard or min(index["weight_map"].values())
        (dir / "model.safetensors.index.json").write_text(json.dumps(index))

    return redirect


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            point(BIAS, "model-00099-of-00099.safetensors"),
            "names the file 'model-00099-of-00099.safetensors'",
        ),
        (point(BIAS, "../outside.safetensors"), "names the file '../outside.safetensors'"),
        (point(BIAS), f"holds '{BIAS}', which .* does not place there"),
        (point("a.new.name"), "lists 'a.new.name'"),
        (write("model.safetensors.index.json", "{}"), "no `weight_map`"),
    ],
)
def test_what_is_wrong_with_an_index_is_named(tmp_path, damage, message):
    hf.save(tmp_path / "a", MODEL, random_params(MODEL), shard_bytes=4000)
    shutil.copyfile(min((tmp_path / "a").glob("*.safetensors")), tmp_path / "outside.safetensors")
    damage(tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        hf.load(tmp_path / "a")


# Saving


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda p: p["ln_f"].pop("bias"), ValueError, "'ln_f/bias' is missing"),
        (
            lambda p: p.update(lm_head={"kernel": np.ones((16, 101), np.float32)}),
            ValueError,
            "'lm_head/kernel' is unexp",
        ),
        (
            lambda p: p["ln_f"].update(bias=np.ones(3, np.float32)),
            ValueError,
            r"'ln_f/bias' has shape \(3,\)",
        ),
        (lambda p: p["ln_f"].update(bias=np.ones(16, np.int8)), ValueError, "'ln_f/bias' has dtype int8"),
        (lambda p: p["ln_f"].update(bias=None), TypeError, "NoneType at 'ln_f/bias'.*lora_jax.merge"),
        (lambda p: p.update(stack_layers(p)), ValueError, "unstack_layers"),
    ],
)
def test_params_that_are_not_the_models_are_refused(tmp_path, change, error, message):
    params = random_params(MODEL)
    change(params)
    with pytest.raises(error, match=message):
        hf.save(tmp_path / "a", MODEL, params)
    assert not list(tmp_path.iterdir())


def test_other_wrong_arguments_are_refused(tmp_path):
    params = random_params(MODEL)
    with pytest.raises(TypeError, match="`model` is a dict.*GPT2"):
        hf.save(tmp_path / "a", {}, params)
    with pytest.raises(TypeError, match="`params` is a list"):
        hf.save(tmp_path / "a", MODEL, [params])
    with pytest.raises(ValueError, match="`source` is .*nowhere"):
        hf.save(tmp_path / "a", MODEL, params, source=tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over_unless_told(saved):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    params = jax.tree.map(lambda leaf: leaf + 1, random_params(MODEL))
    with pytest.raises(ValueError, match="not empty.*overwrite=True"):
        hf.save(saved, MODEL, params)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    hf.save(saved, MODEL, params, overwrite=True)
    assert_same(hf.load(saved)[1], params)

    home = saved.parent / "home"
    home.mkdir()
    (home / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="not an earlier export"):
        hf.save(home, MODEL, params, overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        hf.save(home / "letter.txt", MODEL, params, overwrite=True)
    (home / "letter.txt").unlink()
    hf.save(home, MODEL, params)  # empty: nothing is lost
    assert sorted(entry.name for entry in saved.parent.iterdir()) == ["home", "model"]


def test_a_save_that_fails_leaves_everything_as_it_was(saved, monkeypatch):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(hf._save, "write_tensors", fail)
    for dir in (saved, saved.parent / "new"):
        with pytest.raises(OSError, match="disk full"):
            hf.save(dir, MODEL, random_params(MODEL), overwrite=True)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    assert [entry.name for entry in saved.parent.iterdir()] == ["model"]


def test_an_export_survives_when_its_replacement_cannot_take_its_place(saved, monkeypatch):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    rename = Path.rename

    def fail(self, target):
        if target == saved and self.suffix != ".old":
            raise OSError("no permission")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no permission"):
        hf.save(saved, MODEL, random_params(MODEL), overwrite=True)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    assert [entry.name for entry in saved.parent.iterdir()] == ["model"]


def test_one_shard_at_a_time_is_fetched(tmp_path):
    """What lets a model larger than memory be written: tensors are fetched as their shard is, not before."""
    written = []

    def fetch():
        written.append(len(list(tmp_path.glob("*.safetensors"))))
        return np.ones(10, np.float32)

    pending = [_safetensors.Pending(str(i), (10,), np.dtype(np.float32), fetch) for i in range(5)]
    _safetensors.write_tensors(tmp_path, pending, shard_bytes=80)
    assert written == [1, 1, 2, 2, 3]  # the shard that is being written is there
    with safe_open(tmp_path / "model-00003-of-00003.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"} and list(file.keys()) == ["4"]
