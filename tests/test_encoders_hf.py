"""BERT, RoBERTa and DeBERTa to and from Hugging Face directories."""

import json

import encoders
import jax
import numpy as np
import pytest
from encoders import (
    apply,
    BERT,
    changed,
    DEBERTA,
    named_class,
    ours,
    ROBERTA,
    run_theirs,
    SCALED,
    some_ids,
    theirs,
)
from safetensors.numpy import load_file, save_file

from lora_jax.interop import hf
from lora_jax.models import BertConfig, HEADS, RobertaConfig, stack_layers


CONFIGS = {
    "bert": BERT,
    "bert untied": changed(BERT, tie_word_embeddings=False, labels=("bad", "fair", "good")),
    "roberta": ROBERTA,
    "roberta untied": changed(ROBERTA, tie_word_embeddings=False, labels=("bad", "fair", "good")),
    "deberta": DEBERTA,
    "deberta untied": changed(
        DEBERTA,
        tie_word_embeddings=False,
        share_att_key=False,
        type_vocab_size=2,
        position_biased_input=True,
        embedding_size=20,
    ),
    "deberta v3": SCALED["deberta-v3-base"],
}
FAMILIES = ("bert", "roberta", "deberta")


def equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(
    ("name", "scan"), [(name, False) for name in CONFIGS] + [(name, True) for name in FAMILIES]
)
def test_round_trip_is_exact(tmp_path, name, scan):
    for head in HEADS:
        if head == "question_answering" and len(CONFIGS[name].labels) != 2:
            continue
        model = ours(CONFIGS[name], head, scan=scan)
        params = encoders.random_params(model)
        hf.save(tmp_path / head, model, params)
        loaded, again = hf.load(tmp_path / head, scan=scan)
        assert loaded == model
        equal(again, params)
        assert json.loads((tmp_path / head / "config.json").read_text())["architectures"] == [
            named_class(CONFIGS[name], head)
        ]


# Every head of the families, and the other configs with the head that they change.
@pytest.mark.parametrize(
    ("name", "head"),
    [(name, head) for name in FAMILIES for head in HEADS]
    + [(name, "masked_lm") for name in CONFIGS if name not in FAMILIES]
    + [("roberta untied", "sequence_classification")],
)
def test_pytorch_loads_what_we_save(torch, tmp_path, name, head):
    """No key is missing or unexpected, the labels keep their names, and the logits are the same."""
    import transformers

    config = CONFIGS[name]
    if head == "question_answering" and len(config.labels) != 2:
        config = changed(config, labels=("a", "b"))
    model = ours(config, head, scan=True)
    params = encoders.random_params(model)
    hf.save(tmp_path, model, params)
    loaded, report = getattr(transformers, named_class(config, head)).from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert tuple(loaded.config.id2label.values()) == config.labels
    ids, mask = some_ids(config, 8, "right")
    found = apply(model, params, ids, mask)
    found = np.asarray(found[0] if isinstance(found, tuple) else found)
    expected = run_theirs(torch, loaded.eval(), ids, mask).detach().numpy()
    pick = (lambda x: x[mask == 1]) if found.ndim == 3 else (lambda x: x)
    np.testing.assert_allclose(pick(found), pick(expected), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "head"),
    [(name, "masked_lm") for name in CONFIGS]
    + [(name, head) for name in FAMILIES for head in ("sequence_classification", "features")],
)
def test_we_load_what_pytorch_saves(torch, tmp_path, name, head):
    reference = theirs(torch, CONFIGS[name], head)
    reference.save_pretrained(tmp_path)
    model, params = hf.load(tmp_path)
    assert model.head == head and model.config.labels == CONFIGS[name].labels
    equal(params, encoders.from_torch(torch, reference))


@pytest.mark.parametrize("name", FAMILIES)
def test_untie_gives_the_decoder_its_own_leaf(torch, tmp_path, name):
    import transformers

    config = CONFIGS[name]
    model = ours(config, "masked_lm")
    params = encoders.random_params(model)
    hf.save(tmp_path / "tied", model, params)
    untied, apart = hf.load(tmp_path / "tied", tie="untie")
    assert not untied.config.tie_word_embeddings
    ids, _ = some_ids(config, 6)
    np.testing.assert_allclose(apply(untied, apart, ids), apply(model, params, ids), atol=1e-6)
    hf.save(tmp_path / "untied", untied, apart)
    loaded, report = getattr(transformers, named_class(config, "masked_lm")).from_pretrained(
        tmp_path / "untied", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    np.testing.assert_allclose(
        run_theirs(torch, loaded.eval(), ids).detach().numpy(), apply(model, params, ids), atol=1e-5
    )


def test_a_head_that_is_always_tied_cannot_be_untied(tmp_path):
    model = ours(SCALED["deberta-v3-base"], "masked_lm")
    hf.save(tmp_path, model, encoders.random_params(model))
    with pytest.raises(
        ValueError, match="`tie` is 'untie', and the head of .* is the embedding by definition"
    ):
        hf.load(tmp_path, tie="untie")


@pytest.fixture
def pretrained(tmp_path):
    """A function that writes the masked-LM model of a family, with what published files hold beside it."""

    def write(config):
        model = ours(config, "masked_lm")
        params = encoders.random_params(model)
        hf.save(tmp_path, model, params)
        tensors = load_file(tmp_path / "model.safetensors")
        width = config.hidden_size
        if isinstance(config, BertConfig):
            first = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
            tensors = {
                next((name.replace(later, old) for later, old in first.items() if later in name), name): array
                for name, array in tensors.items()
            } | {
                "bert.pooler.dense.weight": np.ones((width, width), np.float32),
                "bert.pooler.dense.bias": np.ones(width, np.float32),
                "cls.seq_relationship.weight": np.ones((2, width), np.float32),
                "cls.seq_relationship.bias": np.ones(2, np.float32),
                "bert.embeddings.position_ids": np.arange(24)[None],
                "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"],
                "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
            }
        elif isinstance(config, RobertaConfig):
            tensors |= {
                "roberta.pooler.dense.weight": np.ones((width, width), np.float32),
                "roberta.pooler.dense.bias": np.ones(width, np.float32),
            }
            tensors |= {
                "roberta.embeddings.position_ids": np.arange(26)[None],
                "lm_head.decoder.bias": tensors["lm_head.bias"],
            }
        else:
            tensors |= {"deberta.embeddings.position_embeddings.weight": np.ones((24, width), np.float32)}
            tensors |= {"mask_predictions.dense.weight": np.ones((width, width), np.float32)}
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path, model, params

    return write


@pytest.mark.parametrize("name", [*FAMILIES, "deberta v3"])
def test_published_files_load_with_what_they_carry_along(pretrained, name):
    directory, model, params = pretrained(CONFIGS[name])
    loaded, again = hf.load(directory)
    assert loaded == model
    equal(again, params)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_new_head_on_a_pretrained_encoder(pretrained, name):
    """The encoder is the file's; the head is drawn, whole, from the key."""
    directory, _, pretrained_params = pretrained(CONFIGS[name])
    draw = lambda n, **options: hf.load(
        directory, head="sequence_classification", num_labels=3, key=jax.random.key(n), **options
    )
    model, params = draw(0)
    assert model.head == "sequence_classification" and model.config.labels == (
        "LABEL_0",
        "LABEL_1",
        "LABEL_2",
    )
    for room in ("embeddings", "encoder"):
        equal(params[room], pretrained_params[room])
    ids, _ = some_ids(CONFIGS[name], 6)
    assert apply(model, params, ids).shape == (3, 3)
    equal(draw(0)[1], params)
    assert not np.array_equal(*(jax.tree.leaves(draw(n)[1]["classifier"])[-1] for n in (0, 1)))
    scanned, stacked = draw(0, scan=True)
    equal(stacked["encoder"], stack_layers(params, "encoder/layer")["encoder"])
    # A head of the file is taken where it fits, and drawn anew where it does not.
    hf.save(directory, model, params, overwrite=True)
    equal(hf.load(directory, head="sequence_classification")[1], params)
    equal(hf.load(directory)[1], params)
    other, drawn = hf.load(directory, head="sequence_classification", num_labels=5, key=jax.random.key(7))
    assert other.config.num_labels == 5 and apply(other, drawn, ids).shape == (3, 5)
    assert not set(np.ravel(jax.tree.leaves(drawn["classifier"])[-1])) & set(
        np.ravel(jax.tree.leaves(params["classifier"])[-1])
    )


def test_berts_pooler_is_the_files_or_else_new(pretrained):
    """It belongs to the encoder's tensors, and a masked LM as transformers saves it has none."""
    directory, model, params = pretrained(BERT)
    draw = lambda n, head: hf.load(directory, head=head, num_labels=2, key=jax.random.key(n))[1]
    (one, other) = (draw(n, "sequence_classification") for n in (0, 1))
    np.testing.assert_array_equal(one["pooler"]["dense"]["kernel"], np.ones((32, 32)))
    equal(one["pooler"], other["pooler"])
    assert not np.array_equal(one["classifier"]["kernel"], other["classifier"]["kernel"])
    assert "pooler" not in draw(0, "token_classification")

    hf.save(directory, model, params, overwrite=True)
    (one, other) = (draw(n, "sequence_classification") for n in (0, 1))
    assert not np.array_equal(one["pooler"]["dense"]["kernel"], other["pooler"]["dense"]["kernel"])
    equal(one["encoder"], params["encoder"])
    with pytest.raises(ValueError, match="'bert.pooler.dense.weight' is missing"):
        hf.load(directory, head="features")


def test_files_of_the_bare_model_lack_its_prefix(torch, tmp_path):
    """As sentence-transformers publishes them, buffers included."""
    reference = theirs(torch, BERT, "features")
    reference.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "pooler.dense.weight" in tensors
    save_file({**tensors, "embeddings.position_ids": np.arange(24)[None]}, tmp_path / "model.safetensors")
    model, params = hf.load(tmp_path)
    assert model.head == "features"
    equal(params, encoders.from_torch(torch, reference))
    _, again = hf.load(tmp_path, head="sequence_classification")
    equal(again["pooler"], params["pooler"])


@pytest.mark.parametrize("name", FAMILIES)
def test_an_encoder_must_be_whole_whatever_the_head(pretrained, name):
    directory, _, _ = pretrained(CONFIGS[name])
    tensors = load_file(directory / "model.safetensors")
    victim = next(name for name in tensors if "layer.1.output.dense.weight" in name)
    for change, message in [
        (None, f"'{victim}' is missing"),
        (np.zeros((2, 2), np.float32), f"'{victim}' has shape .2, 2."),
    ]:
        broken = {key: value for key, value in {**tensors, victim: change}.items() if value is not None}
        save_file(broken, directory / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            hf.load(directory, head="token_classification")
    prefix = victim.partition(".")[0]
    save_file(
        {**tensors, f"{prefix}.encoder.layer.1.extra": np.zeros(1, np.float32)},
        directory / "model.safetensors",
    )
    with pytest.raises(ValueError, match=f"'{prefix}.encoder.layer.1.extra' is unexpected"):
        hf.load(directory, head="token_classification")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_configs_own_head_must_be_whole_even_when_it_is_asked_for(tmp_path, name):
    """A fine-tuned classifier that lost a tensor is never replaced by a random one."""
    model = ours(CONFIGS[name], "sequence_classification")
    hf.save(tmp_path, model, encoders.random_params(model))
    tensors = load_file(tmp_path / "model.safetensors")
    victim = next(key for key in tensors if key.startswith("classifier."))
    save_file({key: value for key, value in tensors.items() if key != victim}, tmp_path / "model.safetensors")
    for arguments in (
        {},
        {"head": "sequence_classification"},
        {"head": "sequence_classification", "num_labels": 2},
    ):
        with pytest.raises(ValueError, match=f"'{victim}' is missing"):
            hf.load(tmp_path, **arguments)
    hf.load(tmp_path, head="sequence_classification", num_labels=4)


def test_a_head_without_a_decoder_has_nothing_to_untie(tmp_path):
    model = ours(SCALED["deberta-v3-base"], "sequence_classification")
    params = encoders.random_params(model)
    hf.save(tmp_path, model, params)
    equal(hf.load(tmp_path, tie="untie")[1], params)


def test_what_cannot_be_read_is_named(pretrained, tmp_path):
    directory, model, _ = pretrained(ROBERTA)
    settings = json.loads((directory / "config.json").read_text())

    def refused(message, arguments=None, **changes):
        (directory / "config.json").write_text(
            json.dumps({key: value for key, value in {**settings, **changes}.items() if value is not None})
        )
        with pytest.raises(ValueError, match=message):
            hf.load(directory, **arguments or {})

    refused(
        "`architectures` is .'RobertaForMultipleChoice'. in config.json, which is not supported",
        architectures=["RobertaForMultipleChoice"],
    )
    refused(
        "does not name one class in `architectures`; pass `head=`, one of .'features'", architectures=None
    )
    refused("`head` is 'sentiment'; it must be one of", {"head": "sentiment"})
    refused("`num_labels` is 3 without a `head`", {"num_labels": 3})
    refused("'classifier.dense.weight' is missing", architectures=["RobertaForSequenceClassification"])
    refused("`is_decoder` is True in config.json, which is not supported", is_decoder=True)
    (directory / "config.json").write_text(json.dumps(settings))
    tensors = load_file(directory / "model.safetensors")
    save_file(
        {**tensors, "lm_head.decoder.bias": tensors["lm_head.bias"] + 1}, directory / "model.safetensors"
    )
    with pytest.raises(
        ValueError,
        match="'lm_head.decoder.bias' that differs from its 'lm_head.bias', though its config.json ties them",
    ):
        hf.load(directory)
