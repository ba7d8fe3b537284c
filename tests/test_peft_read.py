"""PEFT's directories against PEFT itself: what it writes is read, and written again as it was."""

import json

import numpy as np
import peft_files
import pytest
from peft_files import (
    adapters,
    assert_close,
    check_both_ways,
    disturb,
    GPT2_CONFIGS,
    in_torch,
    NOT_STACKED,
    output,
    output_of_theirs,
    without_head,
    written_by_peft,
)
from safetensors.numpy import load_file, save_file

from lora_jax import AdaLoRA, DoRA, LoRA, VeRA
from lora_jax.interop import hf, peft
from lora_jax.interop.peft._targets import pattern_value


theirs = peft_files.theirs
bases = peft_files.bases
pytestmark = peft_files.ignored_warnings


@pytest.mark.parametrize("name", GPT2_CONFIGS)
def test_gpt2_from_peft_and_back(torch, theirs, bases, tmp_path, name):
    base = bases("gpt2")
    expected = written_by_peft(torch, theirs, base, GPT2_CONFIGS[name], tmp_path / "adapter")
    # Two singular values that are close leave float32 little to tell their vectors apart, in PEFT and here.
    tolerance = 1e-4 if name == "PiSSA" else 1e-5
    check_both_ways(torch, theirs, base, tmp_path / "adapter", tmp_path, expected, tolerance)
    model, params = hf.load(base, scan=True)
    if name in NOT_STACKED:
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
@pytest.mark.parametrize("family", ["bert", "roberta", "deberta"])
def test_encoders_from_peft_and_back(torch, theirs, bases, tmp_path, family, kind, head):
    base = bases(family, head)
    options = _ENCODERS[kind]("query_proj" if family == "deberta" else "query", _TASKS[head])
    expected = written_by_peft(torch, theirs, base, options, tmp_path / "adapter")
    scan = family == "deberta"
    check_both_ways(torch, theirs, base, tmp_path / "adapter", tmp_path, expected, scan=scan)
    assert theirs.PeftConfig.from_pretrained(tmp_path / "ours").task_type == _TASKS[head]


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


def test_keys_of_patterns_match_as_in_peft(theirs):
    """The whole of a name, or its end after a dot; of several keys, the first."""
    from peft.utils.other import get_pattern_key

    names = [f"transformer.h.{layer}.{module}" for layer in (0, 10) for module in ("attn.c_attn", "mlp.c_fc")]
    keys = ["c_attn", "attn", "attn.c_attn", "h.0.attn.c_attn", "0.attn.c_attn", "h.0", "transformer"]
    keys += ["c_att", "_attn", "c_attn|c_fc", r"h\.\d+\.mlp\.c_fc", "h.?.attn.c_attn", ".*attn", ".*fc", ""]
    keys += names
    matched = 0
    for name in names:
        for key in keys:
            found = pattern_value({key: 7}, name, 1) == 7
            assert found == (get_pattern_key([key], name) == key), (key, name)
            matched += found
        for order in (["c_attn", ".*attn"], [".*attn", "c_attn"], ["fc", "c_fc", name]):
            pattern = {key: key for key in order}
            assert pattern_value(pattern, name, name) == get_pattern_key(order, name)
    assert 10 < matched < len(keys) * len(names) / 2


_OF_TRAINING = [
    (dict(r=3, lora_alpha=5, lora_dropout=0.25), LoRA(rank=3, alpha=5, dropout=0.25)),
    (
        dict(r=3, lora_alpha=5, lora_dropout=0.25, use_dora=True, use_rslora=True),
        DoRA(rank=3, alpha=5, dropout=0.25, rs=True),
    ),
    (
        dict(init_r=4, lora_alpha=5, lora_dropout=0.25, total_step=10),
        AdaLoRA(rank=4, alpha=5, dropout=0.25),
    ),
    (
        dict(r=6, vera_dropout=0.25, d_initial=0.3, projection_prng_key=5),
        VeRA(rank=6, d_initial=0.3, seed=5, dropout=0.25),
    ),
]


@pytest.mark.parametrize(("options", "method"), _OF_TRAINING, ids=lambda value: type(value).__name__)
def test_every_field_of_a_method_is_read(torch, theirs, bases, tmp_path, options, method):
    """Those too that change only how training would go on."""
    written_by_peft(torch, theirs, bases("gpt2"), {"target_modules": ["c_attn"], **options}, tmp_path / "a")
    _, delta = peft.load(tmp_path / "a", *hf.load(bases("gpt2")))
    assert {leaf.spec.method for leaf in adapters(delta)} == {method}


def test_older_files_of_dora(torch, theirs, bases, tmp_path):
    expected = written_by_peft(torch, theirs, bases("gpt2"), GPT2_CONFIGS["DoRA"], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(
        {f"{name}.weight" if "magnitude" in name else name: array for name, array in load_file(file).items()},
        file,
        metadata={"format": "pt"},
    )
    model, params = hf.load(bases("gpt2"))
    assert_close(output(model, *peft.load(tmp_path / "adapter", model, params)), expected)


def test_the_bin_file_of_old_is_read(torch, theirs, bases, tmp_path):
    expected = written_by_peft(torch, theirs, bases("gpt2"), GPT2_CONFIGS["LoRA"], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(
        {name: torch.tensor(array) for name, array in load_file(file).items()}, file.with_suffix(".bin")
    )
    file.unlink()
    model, params = hf.load(bases("gpt2"))
    assert_close(output(model, *peft.load(tmp_path / "adapter", model, params)), expected)


@pytest.mark.parametrize("saved", [["wte"], ["lm_head"], ["wte", "lm_head"]])
def test_whole_weights_under_the_names_of_wrappers_too(torch, theirs, bases, tmp_path, saved):
    """As PEFT writes them when it is told to save the embeddings beside the adapter."""
    base = bases("gpt2 untied")
    torch.manual_seed(7)
    model = theirs.get_peft_model(
        in_torch(base), theirs.LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=saved)
    ).eval()
    disturb(torch, [parameter for parameter in model.parameters() if parameter.requires_grad], 0.1)
    expected = output_of_theirs(torch, model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    names = load_file(file)
    assert any(".modules_to_save." in name for name in names)
    check_both_ways(torch, theirs, base, tmp_path / "adapter", tmp_path, expected)
    # A copy that differs is no copy.
    changed = next(name for name in names if ".modules_to_save." in name)
    save_file({**names, changed: names[changed] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="two different values of one tensor, '.*modules_to_save"):
        peft.load(tmp_path / "adapter", *hf.load(base))


def test_a_whole_name_is_chosen_in_any_layer(torch, theirs, bases, tmp_path):
    base = bases("gpt2 untied")
    options = dict(r=2, target_modules=["c_attn", "lm_head"], layers_to_transform=[1])
    expected = written_by_peft(torch, theirs, base, options, tmp_path / "adapter")
    frozen, delta = check_both_ways(torch, theirs, base, tmp_path / "adapter", tmp_path, expected)
    assert sorted(leaf.spec.path for leaf in adapters(delta)) == ["h/1/attn/c_attn/kernel", "lm_head/kernel"]


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("family", ["bert", "roberta", "roberta untied"])
def test_the_bias_of_a_head_that_is_adapted(torch, theirs, bases, tmp_path, family, bias):
    """PyTorch has it under two names, which are one parameter where the head is tied."""
    base = bases(family, "masked_lm")
    options = dict(r=2, target_modules=["query", "decoder"], bias=bias)
    expected = written_by_peft(torch, theirs, base, options, tmp_path / "adapter")
    check_both_ways(torch, theirs, base, tmp_path / "adapter", tmp_path, expected, tie="untie")


def test_a_target_that_matches_nothing_beside_others_is_warned_of(torch, theirs, bases, tmp_path):
    options = dict(r=2, target_modules=["c_attn", "gate_proj"])
    expected = written_by_peft(torch, theirs, bases("gpt2"), options, tmp_path / "adapter")
    model, params = hf.load(bases("gpt2"))
    with pytest.warns(UserWarning, match="names 'gate_proj', which this model does not have"):
        trees = peft.load(tmp_path / "adapter", model, params)
    assert_close(output(model, *trees), expected)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_with_an_index(torch, theirs, bases, tmp_path, kind):
    expected = written_by_peft(torch, theirs, bases("gpt2"), GPT2_CONFIGS["LoRA"], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    names = {name: f"adapter_model-0000{1 + index % 2}-of-00002.{kind}" for index, name in enumerate(tensors)}
    for shard in set(names.values()):
        own = {name: tensors[name] for name in tensors if names[name] == shard}
        if kind == "bin":
            torch.save({name: torch.tensor(array) for name, array in own.items()}, file.with_name(shard))
        else:
            save_file(own, file.with_name(shard), metadata={"format": "pt"})
    index = file.with_name(f"adapter_model.{kind}.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    model, params = hf.load(bases("gpt2"))
    assert_close(output(model, *peft.load(tmp_path / "adapter", model, params)), expected)
    file.with_name(names.popitem()[1]).unlink()
    with pytest.raises(ValueError, match="names the file 'adapter_model-0000"):
        peft.load(tmp_path / "adapter", model, params)


@pytest.mark.parametrize(
    ("family", "head", "tokens"),
    [
        ("gpt2", None, [5, 2, 28]),
        ("gpt2 untied", None, {"wte": [5, 2]}),
        ("roberta", "features", {"word_embeddings": [7, 3]}),
    ],
)
def test_tokens_that_train_by_themselves(torch, theirs, bases, tmp_path, family, head, tokens):
    """They take the place of the base's rows, in the head too where it is tied."""
    base = bases(family, head)
    targets = ["c_attn"] if "gpt2" in family else ["query"]
    options = dict(r=2, target_modules=targets, trainable_token_indices=tokens)
    expected = written_by_peft(torch, theirs, base, options, tmp_path / "adapter")
    frozen, delta = check_both_ways(torch, theirs, base, tmp_path / "adapter", tmp_path, expected)
    embedding = delta["wte"] if "gpt2" in family else delta["embeddings"]["word_embeddings"]
    assert embedding["embedding"].shape[1] == 12  # trains whole from here on


def test_tokens_of_a_tied_head_with_a_bias_are_refused(torch, theirs, bases, tmp_path):
    """PEFT computes that head without its bias."""
    base = bases("roberta", "masked_lm")
    options = dict(r=2, target_modules=["query"], trainable_token_indices={"word_embeddings": [7, 3]})
    written_by_peft(torch, theirs, base, options, tmp_path / "adapter")
    with pytest.raises(ValueError, match="`trainable_token_indices` is set .* has a bias, which PEFT leaves"):
        peft.load(tmp_path / "adapter", *hf.load(base))


@pytest.mark.parametrize("saved", [None, ["wte", "lm_head"]])
@pytest.mark.parametrize("family", ["gpt2", "gpt2 untied"])
def test_rows_of_added_tokens_come_with_the_adapter(torch, theirs, bases, tmp_path, family, saved):
    """The base's file has no row for them. PEFT writes the embeddings beside such adapters."""
    base = bases(family)
    torch.manual_seed(7)
    model = in_torch(base)
    model.resize_token_embeddings(31, mean_resizing=False)
    config = theirs.LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=saved)
    model = theirs.get_peft_model(model, config).eval()
    disturb(torch, [parameter for parameter in model.parameters() if parameter.requires_grad], 0.1)
    expected = output_of_theirs(torch, model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=saved is None)
    with pytest.raises(ValueError, match=r"trained with 31 tokens .* `hf.load\(dir, vocab_size=31\)`"):
        peft.load(tmp_path / "adapter", *hf.load(base))
    # Saved whole, a tied embedding and its head are two.
    tie = "untie" if saved and family == "gpt2" else "share"
    ours, params = hf.load(base, vocab_size=31, tie=tie)
    frozen, delta = peft.load(tmp_path / "adapter", ours, params)
    assert_close(output(ours, frozen, delta), expected)
    # The rows are not lost when the adapter is written again.
    peft.save(tmp_path / "again", ours, frozen, delta)
    assert_close(output(ours, *peft.load(tmp_path / "again", ours, params)), expected)
    with pytest.raises(ValueError, match="`vocab_size` is 28, and the base has 29 tokens"):
        hf.load(base, vocab_size=28)
