"""GPT-2 with a head of classes, beside `transformers` and PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import Full, LoRA
from lora_jax.interop import hf, peft
from lora_jax.models import GPT2, GPT2Config


SIZES = dict(vocab_size=13, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
LABELS = ("no", "maybe", "yes")
PAD = 0
# Padding on the right, on the left, within a row and none.
IDS = np.array([[3, 4, 5, PAD, PAD], [PAD, PAD, 6, 7, 8], [9, PAD, 10, PAD, PAD], [2, 3, 4, 5, 6]], np.int32)


def model_of(**changes):
    config = GPT2Config(**SIZES, labels=LABELS, **{"pad_token_id": PAD, **changes})
    return GPT2(config, head="sequence_classification")


def random_params(model, seed=0):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    draw = np.random.default_rng(seed).normal
    return jax.tree.map(lambda leaf: jnp.asarray(draw(size=leaf.shape) * 0.5, leaf.dtype), shapes)


def theirs(directory):
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2ForSequenceClassification.from_pretrained(directory).eval()


def output(torch, model, ids, mask):
    with torch.no_grad():
        return model(torch.tensor(ids, dtype=torch.long), attention_mask=torch.tensor(mask)).logits.numpy()


@pytest.mark.parametrize("scan", [False, True])
def test_logits_are_those_of_transformers(tmp_path, torch, scan):
    """Written, read by PyTorch, and read again: one set of logits, with their labels' names."""
    model = model_of()
    params = random_params(model)
    hf.save(tmp_path, model, params)
    other, again = theirs(tmp_path), hf.load(tmp_path, scan=scan)
    assert other.config.id2label == dict(enumerate(LABELS)) and again[0].config.labels == LABELS
    mask = (IDS != PAD).astype(np.int32)
    expected = output(torch, other, IDS, mask)
    assert expected.shape == (4, 3)
    for found, own in ((model, params), again):
        logits = found.apply({"params": own}, IDS, mask)
        np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_without_a_padding_token_one_row_at_a_time(torch, tmp_path):
    model = model_of(pad_token_id=None)
    params = random_params(model)
    with pytest.raises(ValueError, match="`input_ids` has 4 rows, and `pad_token_id` is None"):
        model.apply({"params": params}, IDS)
    hf.save(tmp_path, model, params)
    expected = output(torch, theirs(tmp_path), IDS[:1], np.ones_like(IDS[:1]))
    np.testing.assert_allclose(model.apply({"params": params}, IDS[:1]), expected, atol=1e-5)


def test_a_new_head_on_a_language_model(tmp_path):
    language_model = GPT2(GPT2Config(**SIZES, pad_token_id=PAD))
    params = random_params(language_model)
    hf.save(tmp_path, language_model, params)
    assert hf.load(tmp_path)[0].head is None
    model, found = hf.load(tmp_path, head="sequence_classification", num_labels=5, key=jax.random.key(3))
    assert found["score"]["kernel"].shape == (8, 5) and model.config.num_labels == 5
    jax.tree.map(np.testing.assert_array_equal, {k: v for k, v in found.items() if k != "score"}, params)
    with pytest.raises(
        ValueError, match=r"`head` is 'masked_lm'; it must be one of \['sequence_classification'\]"
    ):
        hf.load(tmp_path, head="masked_lm")
    with pytest.raises(ValueError, match="`num_labels` is 2 without a `head`"):
        hf.load(tmp_path, num_labels=2)


def test_what_goes_with_the_language_model_alone():
    model = model_of()
    params = random_params(model)
    with pytest.raises(
        ValueError, match="`cache`, `segment_ids`, `logits_at` and `last_only` go with the language"
    ):
        model.apply({"params": params}, IDS, last_only=True)
    with pytest.raises(ValueError, match="`head` is 'regression'; it must be None"):
        GPT2(model.config, head="regression").init(jax.random.key(0), IDS)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_go_to_peft_and_come_back(tmp_path, torch):
    """The head trains whole and is in the adapter's file, from which `head_of` knows it."""
    library = pytest.importorskip("peft")
    language_model = GPT2(GPT2Config(**SIZES, pad_token_id=PAD))
    hf.save(tmp_path / "base", language_model, random_params(language_model))
    model, params = hf.load(tmp_path / "base", head="sequence_classification", num_labels=3)
    targets = {"attn/c_attn/kernel": LoRA(rank=2, alpha=4), "score/kernel": Full()}
    frozen, delta = lora_jax.lorafy(params, targets)
    draw = np.random.default_rng(1).normal
    delta = jax.tree.map(lambda leaf: jnp.asarray(draw(size=leaf.shape) * 0.3, leaf.dtype), delta)
    peft.save(tmp_path / "adapter", model, frozen, delta)

    mask = (IDS != PAD).astype(np.int32)
    expected = model.apply({"params": lora_jax.merge(frozen, delta)}, IDS, mask)
    transformers = pytest.importorskip("transformers")
    base = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    adapted = library.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    np.testing.assert_allclose(output(torch, adapted, IDS, mask), expected, atol=1e-5)

    options = peft.head_of(tmp_path / "adapter")
    assert options == {"head": "sequence_classification", "num_labels": 3}
    model, params = hf.load(tmp_path / "base", **options)
    frozen, delta = peft.load(tmp_path / "adapter", model, params)
    found = model.apply({"params": lora_jax.merge(frozen, delta)}, IDS, mask)
    np.testing.assert_allclose(found, expected, atol=1e-5)
