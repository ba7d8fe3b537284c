"""Hugging Face directories of GPT-2: read and written without loss, and accepted by PyTorch."""

import json

import gpt2_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpt2_files import assert_same, CONFIG, edit, IDS, logits_of, MODEL, random_params, UNTIED
from safetensors.numpy import load_file

import lora_jax
from lora_jax import DoRA, Full, LoRA, PiSSA, VeRA
from lora_jax.interop import _safetensors, hf
from lora_jax.models import stack_layers, unstack_layers


saved = gpt2_files.saved


# Without loss


@pytest.mark.parametrize(
    "dtype", [np.float32, jnp.bfloat16, np.float16], ids=["float32", "bfloat16", "float16"]
)
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("shard_bytes", [10**9, 5000], ids=["whole", "shards"])
@pytest.mark.parametrize("model", [MODEL, UNTIED], ids=["tied", "untied"])
def test_round_trip_is_exact(tmp_path, model, scan, shard_bytes, dtype):
    params = random_params(model, dtype)
    hf.save(
        tmp_path / "a",
        model.clone(scan=scan),
        stack_layers(params) if scan else params,
        shard_bytes=shard_bytes,
    )
    loaded, found = hf.load(tmp_path / "a", scan=not scan)
    assert loaded == model.clone(scan=not scan, param_dtype=loaded.param_dtype)
    assert jnp.dtype(loaded.param_dtype) == dtype
    assert_same(found if scan else unstack_layers(found), params)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == jnp.dtype(dtype).name
    sizes = [file.stat().st_size for file in (tmp_path / "a").glob("*.safetensors")]
    assert len(sizes) == 1 if shard_bytes == 10**9 else len(sizes) > 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_others_may_read_what_they_may_list(tmp_path):
    """The writer of safetensors keeps its files to their owner; an export is as open as its directory."""
    hf.save(tmp_path / "a", MODEL, random_params(MODEL))
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "a").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"], modes


def test_the_dtype_of_each_tensor_is_kept(tmp_path):
    params = random_params(MODEL, jnp.bfloat16)
    params["ln_f"]["scale"] = params["ln_f"]["scale"].astype(np.float32)
    hf.save(tmp_path / "a", MODEL, params)
    assert_same(hf.load(tmp_path / "a")[1], params)
    # PyTorch casts to the config's dtype on loading, so that it must hold the widest.
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "float32"


def test_float64_is_kept_or_refused(tmp_path, x64):
    params = random_params(MODEL, np.float64)
    hf.save(tmp_path / "a", MODEL, params)
    assert_same(hf.load(tmp_path / "a")[1], params)
    with jax.enable_x64(False), pytest.raises(ValueError, match="wte/embedding.*float64.*jax_enable_x64"):
        hf.load(tmp_path / "a")


def test_place_decides_where_each_leaf_lives(saved):
    seen = {}
    device = jax.devices()[-1]

    def place(path, array):
        seen[path] = array.shape
        return jax.device_put(array, device)

    _, params = hf.load(saved, scan=True, place=place)
    assert seen["h/attn/c_attn/kernel"] == (2, 16, 48) and seen["wte/embedding"] == (101, 16)
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(params))


# With PyTorch


@pytest.mark.parametrize("shard_bytes", [10**9, 5000], ids=["whole", "shards"])
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("model", [MODEL, UNTIED], ids=["tied", "untied"])
def test_pytorch_loads_what_we_save(torch, tmp_path, model, scan, shard_bytes):
    import transformers

    params = random_params(model)
    hf.save(
        tmp_path / "a",
        model.clone(scan=scan),
        stack_layers(params) if scan else params,
        shard_bytes=shard_bytes,
    )
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "a", output_loading_info=True, attn_implementation="eager"
    )
    assert isinstance(theirs, transformers.GPT2LMHeadModel)
    assert not any(
        report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    ), report
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(IDS, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(logits_of(model, params), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shard", [None, "5KB"])
@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "GPT2Model"])
@pytest.mark.parametrize("tied", [True, False])
def test_we_load_what_pytorch_saves(torch, tmp_path, tied, head, shard):
    import transformers

    settings = transformers.GPT2Config(
        **{**CONFIG.to_hf(), "tie_word_embeddings": tied}, attn_implementation="eager"
    )
    theirs = transformers.GPT2LMHeadModel(settings).eval()
    sizes = {} if shard is None else {"max_shard_size": shard}
    (theirs if head == "GPT2LMHeadModel" else theirs.transformer).save_pretrained(tmp_path / "a", **sizes)
    if head == "GPT2Model" and not tied:
        with pytest.raises(ValueError, match="'lm_head.weight' is missing"):
            hf.load(tmp_path / "a")
        return
    model, params = hf.load(tmp_path / "a")
    assert model.config.tie_word_embeddings == tied
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(logits_of(model, params), expected, atol=1e-5, rtol=0)


def test_the_tokenizer_is_carried_along(data_dir, tmp_path):
    source = data_dir / "gpt2_bpe"
    hf.save(tmp_path / "a", MODEL, random_params(MODEL), source=source)
    found = {file.name for file in (tmp_path / "a").iterdir()}
    assert found == {"config.json", "model.safetensors", "tokenizer.json", "vocab.json", "merges.txt"}
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install transformers"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    assert tokenizer.decode(tokenizer("The Eagle is a coffee shop").input_ids) == "The Eagle is a coffee shop"


# Ties


def test_untie_gives_the_head_its_own_leaf(saved, tmp_path):
    tied_model, tied = hf.load(saved)
    assert "lm_head" not in tied
    model, params = hf.load(saved, tie="untie")
    assert not model.config.tie_word_embeddings
    np.testing.assert_array_equal(params["lm_head"]["kernel"], params["wte"]["embedding"].T)
    np.testing.assert_allclose(logits_of(model, params), logits_of(tied_model, tied), atol=1e-6, rtol=0)

    params["lm_head"]["kernel"] += 1
    hf.save(tmp_path / "untied", model, params)
    for tie in ("share", "untie"):  # an untied directory has nothing to share
        again, found = hf.load(tmp_path / "untied", tie=tie)
        assert again == model
        assert_same(found, params)
    with pytest.raises(ValueError, match="`tie` is 'both'"):
        hf.load(saved, tie="both")


def test_a_head_stored_beside_its_embedding_must_equal_it(saved):
    edit(saved, lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"].copy()}))
    assert "lm_head" not in hf.load(saved)[1]
    edit(saved, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"] + 1}))
    with pytest.raises(ValueError, match="'lm_head.weight' that differs.*tie='untie'"):
        hf.load(saved)
    params = hf.load(saved, tie="untie")[1]
    np.testing.assert_array_equal(params["lm_head"]["kernel"], params["wte"]["embedding"].T + 1)


# Other people's names


def test_buffers_and_missing_prefixes_are_known(saved):
    expected = hf.load(saved)[1]

    def bare(tensors):
        tensors = {name.removeprefix("transformer."): value for name, value in tensors.items()}
        for i in range(2):
            tensors[f"h.{i}.attn.bias"] = np.ones((1, 1, 16, 16), np.uint8)
            tensors[f"h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
        return tensors

    edit(saved, bare)
    assert_same(hf.load(saved)[1], expected)


# --- what `combine` returns ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("method", [LoRA(rank=2), DoRA(rank=2), VeRA(rank=3), PiSSA(rank=2)])
def test_a_combined_tree_is_written_as_the_merged_one(tmp_path, method, scan):
    model = MODEL.clone(scan=scan)
    params = jax.tree.map(jnp.asarray, random_params(model))
    axes = {"h/.*kernel": "layer in out"} if scan else None
    frozen, delta = lora_jax.lorafy(
        params, {"c_attn/kernel": method, "c_fc/kernel": method, "ln_f/.*": Full()}, axes=axes
    )
    delta = jax.tree.map(lambda leaf: leaf + jnp.asarray(0.1, leaf.dtype), delta)
    hf.save(tmp_path / "merged", model, lora_jax.merge(frozen, delta))
    hf.save(tmp_path / "combined", model, lora_jax.combine(frozen, delta))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "combined"))
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    # Beside another base, this would not be it.
    facts = _safetensors.facts_of(tmp_path / "combined" / "model.safetensors")
    assert (
        "transformer.ln_f.weight" not in facts["base"]
        and "transformer.h.0.attn.c_attn.weight" in facts["base"]
    )


def test_a_quantised_base_is_written_with_the_values_it_was_trained_beside(tmp_path):
    params = jax.tree.map(jnp.asarray, random_params(MODEL))
    frozen, delta = lora_jax.lorafy(params, "c_attn/kernel", method=LoRA(rank=2))
    frozen = lora_jax.quantize(frozen, "int8", targets=".*kernel")
    hf.save(tmp_path / "model", MODEL, lora_jax.combine(frozen, delta))
    assert_same(hf.load(tmp_path / "model")[1], lora_jax.merge(frozen, delta))


# --- what else holds weights, and what vouches for them -----------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2])
def test_bin_files_are_read_without_running_them(tmp_path, torch, shards):
    hf.save(tmp_path / "model", MODEL, random_params(MODEL))
    tensors = {
        name: torch.tensor(array)
        for name, array in load_file(tmp_path / "model" / "model.safetensors").items()
    }
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    (tmp_path / "model" / "model.safetensors").unlink()
    names = [f"pytorch_model-{index}.bin" for index in range(shards)] if shards > 1 else ["pytorch_model.bin"]
    places = {name: names[index % shards] for index, name in enumerate(tensors)}
    for file in names:
        torch.save(
            {name: tensor for name, tensor in tensors.items() if places[name] == file},
            tmp_path / "model" / file,
        )
    if shards > 1:
        (tmp_path / "model" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert_same(hf.load(tmp_path / "model")[1], jax.tree.map(jnp.asarray, random_params(MODEL)))
    if shards > 1:
        places["lm_head.weight"], places["other"] = "../pytorch_model.bin", "pytorch_model-0.bin"
        (tmp_path / "model" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
        with pytest.raises(ValueError, match="names the file '../pytorch_model.bin', which is not in"):
            hf.load(tmp_path / "model")


def test_values_that_are_no_numbers_are_named_unless_told(saved):
    edit(saved, lambda tensors: tensors["transformer.ln_f.weight"].__setitem__(3, np.nan))
    with pytest.raises(
        ValueError,
        match=r"has 1 values in 'transformer.ln_f.weight' that are infinite or no numbers.*`verify=False`",
    ):
        hf.load(saved)
    hf.load(saved, verify=False)


def test_a_config_that_changed_since_is_found_unless_told(saved):
    settings = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**settings, "layer_norm_epsilon": 1e-4}))
    with pytest.raises(
        ValueError, match="config.json has changed since it was saved with model.safetensors.*`verify=False`"
    ):
        hf.load(saved)
    assert hf.load(saved, verify=False)[0].config.layer_norm_epsilon == 1e-4


def test_weights_can_stay_on_the_disk(saved):
    _, params = hf.load(saved, place=lambda path, array: array)
    leaves = jax.tree.leaves(params)
    assert all(
        type(leaf) is np.ndarray and not leaf.flags.writeable and not leaf.flags.owndata for leaf in leaves
    )
    assert_same(jax.tree.map(jnp.asarray, params), jax.tree.map(jnp.asarray, random_params(MODEL)))
