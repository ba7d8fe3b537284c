"""Adapters for llama.cpp: read back and applied by hand, they are what `merge` adds."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from gguf_adapters import applied, in_file_order, path_of, read
from gguf_files import values, write
from quant_model import randomised

import lora_jax
from lora_jax import AdaLoRA, DeltaLoRA, DoRA, DyLoRA, Full, LoRA, LoRAFA, PiSSA, VeRA
from lora_jax.interop import gguf, hf
from lora_jax.models import GPT2, GPT2Config


def check(tmp_path, method, targets, *, architecture="llama", scan=False, layout=None, **how):
    tmp_path.mkdir(exist_ok=True)
    base, file = tmp_path / "base.gguf", tmp_path / "adapter.gguf"
    tensors = write(base, architecture, kinds=("Q8_0", "F32"), **(layout or {}))
    model, params = gguf.load(base, scan=scan, **how)
    axes = {"layers/.*": "layer in out"} if scan else None
    frozen, delta = lora_jax.lorafy(params, targets, method=method, axes=axes)
    delta = randomised(delta)
    gguf.save_adapter(file, model, frozen, delta)
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []
    pairs, alpha, settings = read(file)
    assert settings["general.type"] == "adapter" and settings["adapter.type"] == "lora"
    assert settings["general.architecture"] == architecture
    merged = traverse_util.flatten_dict(lora_jax.merge(frozen, delta), sep="/")
    changed = traverse_util.flatten_dict(
        jax.tree.map(lambda leaf: leaf is not None, delta, is_leaf=is_leaf), sep="/"
    )
    expected = {name for name in tensors if name.endswith(".weight") and "norm" not in name}
    expected = {name for name in expected if changed[stacked(name) if scan else path_of(name)]}
    assert set(pairs) == expected and expected
    for name, (a, b) in pairs.items():
        found = applied(values(tensors, name), name, a, b, alpha)
        wanted = merged[stacked(name)] if scan else merged[path_of(name)]
        wanted = np.asarray(wanted[int(name.split(".")[1])] if scan else wanted)
        wanted = wanted if name == "token_embd.weight" else wanted.T
        if architecture == "llama" and name.split(".")[-2] in ("attn_q", "attn_k"):
            wanted = in_file_order(wanted, 4 if "attn_q" in name else 2)
        scale = np.abs(wanted).max()
        assert np.abs(found - values(tensors, name)).max() > 1e-3 * scale, "the adapter changes nothing"
        np.testing.assert_allclose(found, wanted, atol=3e-6 * scale)
    return pairs, alpha


def is_leaf(leaf):
    return leaf is None or isinstance(leaf, lora_jax.Adapter)


def stacked(name):
    return re.sub(r"^layers/\d+/", "layers/", path_of(name))


EVERY = "(q|k|v|o|gate|up|down)_proj/kernel"


@pytest.mark.parametrize("scan", [False, True])
def test_every_matrix(tmp_path, scan):
    pairs, alpha = check(tmp_path, LoRA(rank=3, alpha=6), EVERY, scan=scan)
    assert alpha == 6
    shapes = {name.split(".")[2]: (a.shape, b.shape) for name, (a, b) in pairs.items()}
    assert shapes["attn_k"] == ((3, 256), (128, 3)) and shapes["ffn_down"] == ((3, 512), (256, 3))


@pytest.mark.parametrize(
    "architecture, layout",
    [
        ("qwen2", {"bias": ("attn_q", "attn_k", "attn_v")}),
        ("qwen3", {"norms": True, "changes": {"attention.key_length": 32}}),
    ],
    ids=["qwen2", "qwen3"],
)
def test_other_architectures(tmp_path, architecture, layout):
    """Whose rows are in the order of Hugging Face."""
    check(tmp_path, LoRA(rank=2), EVERY, architecture=architecture, layout=layout)


def test_beside_packed_weights(tmp_path):
    base = tmp_path / "base.gguf"
    write(base, kinds=("Q4_K",))
    trees = []
    for packed in (False, True):
        model, params = gguf.load(base, packed=packed)
        frozen, delta = lora_jax.lorafy(params, EVERY, method=LoRA(rank=2))
        gguf.save_adapter(tmp_path / f"{packed}.gguf", model, frozen, randomised(delta))
        trees.append((tmp_path / f"{packed}.gguf").read_bytes())
    assert trees[0] == trees[1]


def test_embedding_and_head(tmp_path):
    pairs, _ = check(tmp_path, LoRA(rank=2), "embedding|lm_head/kernel", layout={"tied": False})
    a, b = pairs["token_embd.weight"]
    assert (a.shape, b.shape) == ((96, 2), (256, 2))
    check(tmp_path / "untied", LoRA(rank=2), "lm_head/kernel|q_proj/kernel", layout={"tied": False})


def test_different_ranks_and_alphas(tmp_path):
    """One alpha is in the file; the others are in their B."""
    targets = {
        "q_proj/kernel": LoRA(rank=2, alpha=8),
        "k_proj/kernel": LoRA(rank=4, alpha=8),
        "v_proj/kernel": LoRA(rank=4, alpha=2),
        "o_proj/kernel": LoRA(rank=4, alpha=5, rs=True),
        "up_proj/kernel": LoRA(rank=1, alpha=0.5),
    }
    _, alpha = check(tmp_path, None, targets)
    assert alpha == 8


def test_a_scale_of_zero(tmp_path):
    """llama.cpp takes an alpha of zero for a scale of one."""
    write(tmp_path / "base.gguf")
    model, params = gguf.load(tmp_path / "base.gguf")
    frozen, delta = lora_jax.lorafy(params, "q_proj/kernel", method=LoRA(rank=2, alpha=0))
    gguf.save_adapter(tmp_path / "adapter.gguf", model, frozen, randomised(delta))
    pairs, alpha, _ = read(tmp_path / "adapter.gguf")
    assert alpha == 1 and all((b == 0).all() for _, b in pairs.values())


@pytest.mark.parametrize(
    "method",
    [LoRAFA(rank=2), VeRA(rank=4), PiSSA(rank=2), DyLoRA(rank=2), DeltaLoRA(rank=2), AdaLoRA(rank=2)],
    ids=lambda method: type(method).__name__,
)
def test_methods_that_lora_expresses(tmp_path, method):
    check(tmp_path, method, "(q|down)_proj/kernel")


def test_refused(tmp_path):
    write(tmp_path / "base.gguf")
    model, params = gguf.load(tmp_path / "base.gguf")
    file = tmp_path / "adapter.gguf"
    save = lambda *trees, **how: gguf.save_adapter(file, model, *trees, **how)
    frozen, delta = lora_jax.lorafy(params, "q_proj/kernel", method=DoRA(rank=2))
    with pytest.raises(ValueError, match="DoRA"):
        save(frozen, delta)
    targets = {"q_proj/kernel": LoRA(rank=2), "norm/scale": Full()}
    with pytest.raises(ValueError, match="`delta` trains 'model.norm.weight' itself.*convert that"):
        save(*lora_jax.lorafy(params, targets))
    with pytest.raises(ValueError, match="adapts the embedding, which is the head too: llama.cpp aborts"):
        save(*lora_jax.lorafy(params, "embedding", method=LoRA(rank=2)))
    with pytest.raises(ValueError, match="`delta` holds no adapter"):
        save(*lora_jax.lorafy(params, "norm/scale", method=Full()))
    frozen, delta = lora_jax.lorafy(params, "q_proj/kernel", method=LoRA(rank=2))
    with pytest.raises(TypeError, match="the order is `frozen`, `delta`"):
        save(delta, frozen)
    broken = jax.tree.map(lambda array: array * jnp.nan, delta)
    with pytest.raises(
        ValueError, match="'blk.0.attn_q.weight.lora_a' has values that are infinite or no numbers"
    ):
        save(frozen, broken)
    assert not file.exists() and [entry.name for entry in tmp_path.iterdir()] == ["base.gguf"]
    save(frozen, delta)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="adapter.gguf exists; .*overwrite=True"):
        save(frozen, randomised(delta))
    assert file.read_bytes() == before
    save(frozen, randomised(delta), overwrite=True)
    assert file.read_bytes() != before
    with pytest.raises(ValueError, match="type 'adapter' .`general.type`., not a model"):
        gguf.load(file)


def test_other_models(tmp_path):
    model = GPT2(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    trees = lora_jax.lorafy(params, "c_attn/kernel", method=LoRA(rank=2))
    with pytest.raises(
        TypeError,
        match=(
            "`model` is of the kind 'gpt2', whose adapters .* gemma2, gemma3_text, llama, mistral, qwen2, "
            "qwen3"
        ),
    ):
        gguf.save_adapter(tmp_path / "adapter.gguf", model, *trees)
    write(tmp_path / "base.gguf")
    model, params = gguf.load(tmp_path / "base.gguf")
    hf.save(tmp_path / "hf", model, params)
    model, params = hf.load(tmp_path / "hf", head="sequence_classification", num_labels=3)
    trees = lora_jax.lorafy(params, "q_proj/kernel", method=LoRA(rank=2))
    with pytest.raises(TypeError, match="of the kind 'llama' with the head 'sequence_classification'"):
        gguf.save_adapter(tmp_path / "adapter.gguf", model, *trees)
