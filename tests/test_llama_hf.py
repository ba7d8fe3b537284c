"""The Llama family's files: Hugging Face directories and PEFT adapters, both ways, against those
libraries.
"""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from llama_models import apply, random_params, some_ids, TINY, torch_model
from peft_files import assert_close, check_both_ways, ignored_warnings, output, without_head, written_by_peft
from safetensors.numpy import load_file

import lora_jax
from lora_jax import DoRA, LoRA
from lora_jax.interop import hf, peft
from lora_jax.models import Llama
from lora_jax.models._rope import Rope


pytestmark = ignored_warnings


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


_TARGETS = {
    "query and value": ["q_proj/kernel", "v_proj/kernel"],
    "all": ["(self_attn|mlp)/.*_proj/kernel"],
}


@pytest.mark.pytorch
@pytest.mark.parametrize(
    "method", [LoRA(rank=3, alpha=6), DoRA(rank=2, alpha=4)], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize(
    ("kind", "targets"),
    [("qwen2", "query and value"), *((kind, "all") for kind in TINY if kind != "qwen2")],
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
    ("kind", "settings"),
    [
        *((kind, dict(target_modules="all-linear")) for kind in TINY),
        *((kind, dict(target_modules="all-linear", use_dora=True)) for kind in TINY),
        ("llama", dict(target_modules=["q_proj", "down_proj"], rank_pattern={"layers.1.mlp.down_proj": 5})),
        ("gemma2", dict(target_modules="all-linear", rank_pattern={r"layers.0.*_proj": 2, "o_proj": 4})),
        ("llama", dict(target_modules=["k_proj", "o_proj"], use_dora=True)),
        ("llama", dict(target_modules=["gate_proj"], modules_to_save=["lm_head"])),
    ],
    ids=str,
)
def test_load_reads_what_peft_wrote(torch, tmp_path, kind, settings):
    import peft as theirs
    import transformers

    model, params = random_params(TINY[kind])
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


@pytest.mark.pytorch
@pytest.mark.parametrize("kind", TINY)
def test_a_head_of_classes_comes_with_its_adapter(torch, tmp_path, kind):
    """PEFT trains it whole and saves it, and the base need not have it."""
    import peft as theirs

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    config = dataclasses.replace(TINY[kind], labels=("a", "b", "c"))
    torch_model(torch, config, "sequence_classification").save_pretrained(base)
    settings = dict(r=2, target_modules="all-linear", task_type="SEQ_CLS")
    expected = written_by_peft(torch, theirs, base, settings, adapter)
    frozen, delta = check_both_ways(torch, theirs, base, adapter, tmp_path, expected)
    assert frozen["score"]["kernel"] is None and delta["score"]["kernel"].shape == (32, 3)
    assert theirs.PeftConfig.from_pretrained(tmp_path / "ours").task_type == "SEQ_CLS"

    options = peft.head_of(adapter)
    assert options == {"head": "sequence_classification", "num_labels": 3}
    architecture = {"gemma3_text": "Gemma3TextModel"}.get(kind, f"{kind.capitalize()}Model")
    model, params = hf.load(without_head(base, architecture, tmp_path / "bare"), **options)
    assert_close(output(model, *peft.load(tmp_path / "ours", model, params)), expected)


@pytest.mark.pytorch
def test_an_adapter_of_the_bare_model(torch, tmp_path):
    """As those that make embeddings are. Classes that are the features show what it computes."""
    import peft as theirs

    model, params = random_params(TINY["mistral"], head="sequence_classification")
    hf.save(tmp_path / "base", model, params)
    bare = without_head(tmp_path / "base", "MistralModel", tmp_path / "bare")
    settings = dict(r=2, target_modules=["q_proj", "up_proj"], task_type="FEATURE_EXTRACTION")
    expected = written_by_peft(torch, theirs, bare, settings, tmp_path / "adapter")
    assert peft.head_of(tmp_path / "adapter") == {}
    model, params = hf.load(bare, head="sequence_classification", num_labels=32)
    params = {**params, "score": {"kernel": np.eye(32, dtype=np.float32)}}
    found = output(model, *peft.load(tmp_path / "adapter", model, params))
    assert_close(found, expected[:, -1])


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


# Parameters of the published files, a tied head counted once.
_PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "smollm2-135m": 134_515_008,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b": 999_885_952,
}


def test_published_sizes_have_the_published_numbers_of_parameters():
    counts = {}
    for tiny in TINY.values():
        for name in type(tiny).sizes:
            model = Llama(type(tiny).named(name), scan=True)
            shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), int))["params"]
            counts[name] = lora_jax.count(shapes)
    assert counts == _PUBLISHED


@pytest.mark.pytorch
@pytest.mark.parametrize("kind", TINY)
def test_defaults_are_those_of_transformers(torch, kind):
    """What a config.json leaves out."""
    import transformers

    ours = type(TINY[kind])()
    theirs = type(ours).from_hf(transformers.AutoConfig.for_model(kind).to_dict())
    if kind.startswith("qwen"):  # it forgets a window that is not used
        assert not ours.use_sliding_window
        theirs = dataclasses.replace(theirs, sliding_window=ours.sliding_window)
    assert theirs == ours
