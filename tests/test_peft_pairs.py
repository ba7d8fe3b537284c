"""Every two fields of PEFT's config that change the computation, together: PEFT's result, or a refusal.

Fields that are right alone may be wrong together: PEFT's DoRA of PiSSA scales what is left of the base. PEFT
makes the adapter of each pair, with everything that trains random, and its logits are the right ones. Pairs
that PEFT refuses itself are passed over.
"""

import itertools
import json

import jax
import peft_files
import pytest
from peft_files import assert_close, in_torch, output, trained, written_by_peft

import lora_jax
from lora_jax import LoRA
from lora_jax.interop import hf, OneSided, peft


theirs = peft_files.theirs
bases = peft_files.bases
pytestmark = [
    *peft_files.ignored_warnings,
    # Said of fields that stand together here on purpose.
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]

# One value of each kind. Two of the same field make no pair.
_OF_METHOD = {
    "PiSSA": dict(init_lora_weights="pissa"),
    "any start": dict(init_lora_weights=False),
    "orthogonal": dict(init_lora_weights="orthogonal"),
    "DoRA": dict(use_dora=True),
    "rsLoRA": dict(use_rslora=True),
    "all biases": dict(bias="all"),
    "their biases": dict(bias="lora_only"),
    "negative": dict(lora_alpha=-3),
    "a layer": dict(layers_to_transform=[1]),
    "everything linear": dict(target_modules="all-linear"),
}
_TABLES = {
    "gpt2": {
        **_OF_METHOD,
        "norms": dict(modules_to_save=["ln_f"]),
        "embedding saved": dict(modules_to_save=["wte"]),
        "head saved": dict(modules_to_save=["lm_head"]),
        "block saved": dict(modules_to_save=["h.1.mlp"]),
        "ranks": dict(rank_pattern={"h.0.attn.c_attn": 2, "wte|lm_head": 3}),
        "alphas": dict(alpha_pattern={"h.0.attn.c_attn": 5, "wte|lm_head": 3}),
        "excluded": dict(exclude_modules=["h.0.attn.c_attn"]),
        "positions": dict(target_modules=["c_attn", "wpe"]),
        "embedding": dict(target_modules=["c_attn", "wte"]),
        "head": dict(target_modules=["c_attn", "lm_head"]),
        "expression": dict(target_modules=r".*h\.1\..*c_proj|.*c_attn"),
    },
    "roberta": {
        **_OF_METHOD,
        "embedding saved": dict(modules_to_save=["word_embeddings"]),
        "decoder saved": dict(modules_to_save=["decoder"]),
        "head saved": dict(modules_to_save=["lm_head"]),
        "layer saved": dict(modules_to_save=["layer.1"]),
        "ranks": dict(rank_pattern={"query": 2, "word_embeddings|decoder": 3}),
        "embedding": dict(target_modules=["query", "word_embeddings"]),
        "decoder": dict(target_modules=["query", "decoder"]),
        "both": dict(target_modules=["decoder", "word_embeddings"]),
    },
}
_TARGETS = {"gpt2": ["c_attn", "c_fc"], "roberta": ["query", "lm_head.dense"]}
# What cannot be represented, and why.
_SHARED = "`init_lora_weights` is 'pissa' .* from which PEFT subtracts the start as well"
_REFUSED = {
    ("PiSSA", "negative"): "infinite or no numbers",  # PEFT takes a root of the scale
    ("PiSSA", "head"): "which differs from that of `params`",
    ("PiSSA", "decoder"): _SHARED,
    ("PiSSA", "both"): _SHARED,
}


@pytest.mark.slow
@pytest.mark.parametrize("family", _TABLES)
def test_every_two_fields_compute_what_peft_computes_or_are_refused(torch, theirs, bases, tmp_path, family):
    base = bases(family, None if family == "gpt2" else "masked_lm")
    models = {tie: hf.load(base, tie=tie) for tie in ("share", "untie")}
    outcomes = {}
    for number, (one, other) in enumerate(itertools.combinations(_TABLES[family], 2)):
        options = [_TABLES[family][name] for name in (one, other)]
        if options[0].keys() & options[1].keys():
            continue
        options = {"r": 4, "target_modules": _TARGETS[family], **options[0], **options[1]}
        adapter = tmp_path / f"{number}"
        try:
            expected = written_by_peft(torch, theirs, base, options, adapter)
        except ValueError:
            outcomes[one, other] = "refused by PEFT"
            continue
        if (one, other) in _REFUSED:
            with pytest.raises(ValueError, match=_REFUSED[one, other]):
                _read(models, adapter)
            outcomes[one, other] = "refused"
            continue
        model, trees = _read(models, adapter)
        # Two singular values that are close leave float32 little to tell their vectors apart.
        assert_close(output(model, *trees), expected, 1e-4 if "PiSSA" in (one, other) else 1e-5)
        outcomes[one, other] = "right"
    counts = {word: list(outcomes.values()).count(word) for word in set(outcomes.values())}
    assert counts["right"] > 100 and counts["refused"] == {"gpt2": 2, "roberta": 3}[family]
    assert counts.get("refused by PEFT", 0) < 10, outcomes


def _read(models, adapter):
    try:
        return models["share"][0], peft.load(adapter, *models["share"])
    except OneSided:
        return models["untie"][0], peft.load(adapter, *models["untie"])


def test_the_start_of_dora_is_the_base(torch, theirs, bases, tmp_path):
    """PEFT's PiSSA of DoRA, untrained, computes what the base computes."""
    base = bases("gpt2")
    options = dict(r=4, target_modules=["c_attn", "c_fc"], init_lora_weights="pissa", use_dora=True)
    torch.manual_seed(7)
    theirs.get_peft_model(in_torch(base), theirs.LoraConfig(**options)).save_pretrained(tmp_path / "adapter")
    model, params = hf.load(base)
    frozen, delta = peft.load(tmp_path / "adapter", model, params)
    unadapted = jax.tree.map(lambda _: None, params)
    assert_close(output(model, frozen, delta), output(model, params, unadapted))


def test_a_start_that_changes_the_embedding_too_is_refused_without_copies(torch, theirs, bases, tmp_path):
    """PEFT writes the changed embedding beside the adapter of GPT-2's head, unless it is told not to."""
    base = bases("gpt2")
    torch.manual_seed(7)
    model = theirs.get_peft_model(
        in_torch(base), theirs.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights="pissa")
    )
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    for tie in ("share", "untie"):
        with pytest.raises(ValueError, match="`init_lora_weights` is 'pissa' .* 'lm_head' shares its weight"):
            peft.load(tmp_path / "adapter", *hf.load(base, tie=tie))


_UNSUPPORTED = {
    "init_lora_weights": ["pissa_niter_4", "olora", "corda", "loftq", "lora_ga"],
    "lora_bias": [True],
    "ensure_weight_tying": [True],
    "target_parameters": [["mlp.c_fc.weight"]],
    "layer_replication": [[[0, 2]]],
    "alora_invocation_tokens": [[1, 2]],
    "use_qalora": [True],
    "use_bdlora": [{"nblocks": 2}],
    "velora_config": [{"rank": 1}],
    "kasa_config": [{"beta": 1.0}],
    "monteclora_config": [{"num_samples": 2}],
    "arrow_config": [{"top_k": 2}],
}


def test_a_field_that_is_not_supported_is_refused_beside_every_other(bases, tmp_path):
    model, params = hf.load(bases("gpt2"))
    frozen, delta = lora_jax.lorafy(params, "c_attn/kernel", method=LoRA(rank=2))
    peft.save(tmp_path / "adapter", model, frozen, trained(delta))
    file = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text())
    for field, values in _UNSUPPORTED.items():
        for value, options in itertools.product(values, _TABLES["gpt2"].values()):
            if field not in options:
                file.write_text(json.dumps({**settings, **options, field: value}))
                with pytest.raises(ValueError, match=f"`{field}` is .*, which is not supported"):
                    peft.load(tmp_path / "adapter", model, params, verify=False)


@pytest.mark.parametrize(
    ("family", "module"), [("deberta", "rel_embeddings"), ("deberta of version 3", "word_embeddings")]
)
def test_an_adapter_that_peft_passes_by_is_refused_once_it_adds_something(
    torch, theirs, bases, tmp_path, family, module
):
    """DeBERTa reads the weight of such modules itself, so that nothing trains there in PEFT."""
    base = bases(family, "masked_lm")
    options = dict(r=2, target_modules=["query_proj", module])
    written_by_peft(torch, theirs, base, options, tmp_path / "random")
    model, params = hf.load(base)
    with pytest.raises(
        ValueError, match=f"`target_modules` .* takes in '.*{module}', whose weight PyTorch's"
    ):
        peft.load(tmp_path / "random", model, params)
    theirs.get_peft_model(in_torch(base), theirs.LoraConfig(**options)).save_pretrained(tmp_path / "start")
    trees = peft.load(tmp_path / "start", model, params)
    assert_close(output(model, *trees), output(model, params, jax.tree.map(lambda _: None, params)))
