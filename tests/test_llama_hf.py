"""The Llama family's files: Hugging Face directories and PEFT adapters, both ways, against those
libraries.
"""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from llama_models import apply, kind_of, random_params, some_ids, TINY, torch_model
from safetensors.numpy import load_file

import lora_jax
from lora_jax import DoRA, LoRA
from lora_jax.interop import hf, peft
from lora_jax.models import Llama, LlamaConfig
from lora_jax.models._rope import Rope


def _rewrite(directory, **changes):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("kind", TINY)
def test_load_gives_what_save_wrote(tmp_path, kind, scan):
    model, params = random_params(TINY[kind], scan=scan)
    hf.save(tmp_path / "model", model, params)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == kind
    again, loaded = hf.load(tmp_path / "model", scan=scan)
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.pytorch
@pytest.mark.parametrize(
    ("kind", "change"),
    [(kind, {}) for kind in TINY]
    + [
        ("llama", dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
        ("llama", dict(rope=Rope(kind="linear", theta=77.0, factor=2.0))),
        ("gemma3_text", dict(rope=Rope(kind="linear", theta=77.0, factor=2.0), local_rope=Rope(33.0))),
    ],
    ids=str,
)
def test_transformers_loads_what_save_wrote(torch, tmp_path, kind, change):
    import transformers

    model, params = random_params(dataclasses.replace(TINY[kind], **change))
    hf.save(tmp_path / "model", model, params)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    ids, _ = some_ids()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(apply(model, params, ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.pytorch
@pytest.mark.parametrize("kind", TINY)
def test_load_reads_what_transformers_wrote(torch, tmp_path, kind):
    """Its newest writer says `rope_parameters`, in one dict or one for each kind of layer."""
    theirs = torch_model(torch, TINY[kind])
    theirs.save_pretrained(tmp_path)
    model, params = hf.load(tmp_path)
    # Of a Qwen without windows it writes none.
    expected = dataclasses.replace(TINY[kind], sliding_window=None) if kind == "qwen3" else TINY[kind]
    assert model.config == expected
    ids, _ = some_ids()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(apply(model, params, ids), expected, atol=1e-5, rtol=1e-5)


# What PEFT does with the newest `transformers`.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
_TARGETS = {
    "query and value": ["q_proj/kernel", "v_proj/kernel"],
    "all": ["(self_attn|mlp)/.*_proj/kernel"],
}


@pytest.mark.pytorch
@pytest.mark.parametrize(
    "method", [LoRA(rank=3, alpha=6), DoRA(rank=2, alpha=4)], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize(
    ("kind", "targets"), [("llama", "all"), ("qwen2", "query and value"), ("qwen3", "all")]
)
def test_peft_reads_what_save_wrote(torch, tmp_path, kind, targets, method):
    import peft as theirs
    import transformers

    model, params = random_params(TINY[kind])
    hf.save(tmp_path / "base", model, params)
    frozen, delta = lora_jax.lorafy(params, _TARGETS[targets], method=method)
    draw = np.random.default_rng(5)
    delta = jax.tree.map(lambda x: (x + 0.1 * draw.normal(size=x.shape)).astype(x.dtype), delta)
    peft.save(tmp_path / "adapter", model, frozen, delta, base=str(tmp_path / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = theirs.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids, _ = some_ids()
    with torch.no_grad():
        expected = adapted(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    ours = apply(model, lora_jax.merge(frozen, delta), ids)
    np.testing.assert_allclose(ours, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.pytorch
@pytest.mark.parametrize(
    "settings",
    [
        dict(target_modules="all-linear"),
        dict(target_modules=["q_proj", "down_proj"], rank_pattern={"layers.1.mlp.down_proj": 5}),
        dict(target_modules=["k_proj", "o_proj"], use_dora=True),
        dict(target_modules=["gate_proj"], modules_to_save=["lm_head"]),
    ],
    ids=str,
)
def test_load_reads_what_peft_wrote(torch, tmp_path, settings):
    import peft as theirs
    import transformers

    model, params = random_params(TINY["llama"])
    hf.save(tmp_path / "base", model, params)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = theirs.get_peft_model(
        base, theirs.LoraConfig(r=3, lora_alpha=7, task_type="CAUSAL_LM", **settings)
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(tmp_path / "adapter")
    ids, _ = some_ids()
    with torch.no_grad():
        expected = adapted.eval()(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    frozen, delta = peft.load(tmp_path / "adapter", model, params)
    ours = apply(model, lora_jax.merge(frozen, delta), ids)
    np.testing.assert_allclose(ours, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(rope_scaling={"rope_type": "longrope", "factor": 2.0}),
            "`rope_type` is 'longrope', which is not",
        ),
        (
            dict(rope_scaling={"rope_type": "llama3", "factor": 2.0}),
            "`rope_type` is 'llama3', which needs `original_max",
        ),
        (
            dict(rope_scaling={"type": "linear", "factor": 0}),
            "`factor` of the rotary positions is 0; it must be",
        ),
        (dict(rope_scaling={"type": "linear", "factor": 2.0, "speed": 1}), "`speed` is 1 among the rotary"),
        (
            dict(rope_parameters={"partial_rotary_factor": 0.5}, rope_scaling=None),
            "`partial_rotary_factor` is 0.5",
        ),
        (dict(attention_multiplier=0.5), "`attention_multiplier` is 0.5 in config.json"),
        (
            dict(num_key_value_heads=3),
            "`num_attention_heads` is 4; it must be a multiple of `num_key_value_he",
        ),
        (dict(head_dim=3), "`head_dim` is 3; rotary positions turn pairs"),
    ],
    ids=str,
)
def test_what_changes_the_computation_is_refused_by_name(tmp_path, changes, message):
    model, params = random_params(TINY["llama"])
    hf.save(tmp_path / "model", model, params)
    _rewrite(tmp_path / "model", **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        hf.load(tmp_path / "model", verify=False)


def test_a_bias_that_a_mistral_has_not_is_refused(tmp_path):
    model, params = random_params(TINY["mistral"])
    hf.save(tmp_path / "model", model, params)
    _rewrite(tmp_path / "model", attention_bias=True)
    with pytest.raises(ValueError, match="`attention_bias` is True in config.json.*Mistral"):
        hf.load(tmp_path / "model", verify=False)


def test_untied_head_of_a_tied_file(tmp_path):
    config = dataclasses.replace(TINY["llama"], tie_word_embeddings=True)
    model, params = random_params(config)
    hf.save(tmp_path / "model", model, params)
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    apart, loaded = hf.load(tmp_path / "model", tie="untie")
    np.testing.assert_array_equal(loaded["lm_head"]["kernel"], params["embed_tokens"]["embedding"].T)
    ids, _ = some_ids()
    np.testing.assert_allclose(apply(apart, loaded, ids), apply(model, params, ids), atol=1e-5)


@pytest.mark.parametrize("kind", TINY)
def test_published_sizes_have_configs(kind):
    """The names are found, and the counts of the two that papers print are theirs."""
    for name in type(TINY[kind]).sizes:
        assert kind_of(type(TINY[kind]).named(name)) == kind
    counts = {"llama-7b": 6_738_415_616, "llama-3-8b": 8_030_261_248, "smollm2-135m": 134_515_008}
    for name in counts.keys() & LlamaConfig.sizes.keys() if kind == "llama" else ():
        model = Llama(LlamaConfig.named(name), scan=True)
        shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), int))["params"]
        assert lora_jax.count(shapes) == counts[name]
