"""The published all-MiniLM-L6-v2, a BERT as sentence-transformers trains and stores them."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft_files
import pytest

import lora_jax
from lora_jax import LoRA
from lora_jax.interop import hf, peft
from lora_jax.models import Bert, BertConfig


theirs = peft_files.theirs
pytestmark = peft_files.ignored_warnings

NAME = "all-minilm-l6-v2"
TEXTS = [
    "A man is playing a guitar on the stage.",
    "Someone performs music with a stringed instrument.",
    "The price of wheat fell sharply in autumn.",
]


@pytest.fixture(scope="module")
def directory():
    bases = os.environ.get("LORA_JAX_BASES") or Path(__file__).resolve().parent.parent / "bases"
    found = Path(bases) / NAME
    if not (found / "config.json").is_file():
        pytest.skip(f"no {found}: fetch it with `python -m experiments fetch {NAME} --to bases`")
    return found


@pytest.fixture(scope="module")
def loaded(directory):
    return hf.load(directory, scan=True)


@pytest.fixture(scope="module")
def inputs(directory):
    tokenizers = pytest.importorskip(
        "tokenizers", reason="tokenizers is not installed: pip install tokenizers"
    )
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.no_truncation()
    rows = tokenizer.encode_batch(TEXTS)
    # It was trained with padding to a fixed length, which its tokenizer remembers.
    width = max(sum(row.attention_mask) for row in rows)
    return tuple(np.array([getattr(row, name)[:width] for row in rows]) for name in ("ids", "attention_mask"))


def pooled(states_BxTxD, mask_BxT):
    """The mean over the tokens, of length one, as sentence-transformers has it."""
    mask_BxTx1 = mask_BxT[..., None]
    mean_BxD = (np.asarray(states_BxTxD) * mask_BxTx1).sum(1) / mask_BxTx1.sum(1)
    return mean_BxD / np.linalg.norm(mean_BxD, axis=1, keepdims=True)


def test_the_published_size(loaded):
    model, params = loaded
    assert isinstance(model, Bert) and model.head == "features"
    assert model.config == BertConfig.named("all-MiniLM-L6-v2")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 22_713_216


def test_states_are_pytorchs(torch, directory, loaded, inputs):
    import transformers

    model, params = loaded
    ids, mask = inputs
    assert (mask == 0).any()
    states, first = jax.jit(model.apply)({"params": params}, ids, mask)
    with torch.no_grad():
        expected = transformers.BertModel.from_pretrained(directory).eval()(
            torch.tensor(ids), attention_mask=torch.tensor(mask)
        )
    real = mask == 1
    np.testing.assert_allclose(
        np.asarray(states)[real], expected.last_hidden_state.numpy()[real], atol=1e-5, rtol=0
    )
    np.testing.assert_allclose(first, expected.pooler_output.numpy(), atol=1e-5, rtol=0)


def test_a_paraphrase_is_nearer_than_another_subject(loaded, inputs):
    model, params = loaded
    ids, mask = inputs
    own, paraphrase, other = pooled(jax.jit(model.apply)({"params": params}, ids, mask)[0], mask)
    assert own @ paraphrase > 0.4 > 0.2 > own @ other


def test_saved_again_it_is_the_same(torch, directory, loaded, tmp_path):
    import transformers

    model, params = loaded
    hf.save(tmp_path / "saved", model, params, source=directory)
    saved, report = transformers.AutoModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    own = transformers.BertModel.from_pretrained(directory).state_dict()
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, own[name]), name
    assert (tmp_path / "saved" / "tokenizer.json").is_file()


def test_an_adapter_in_peft(torch, theirs, directory, loaded, inputs, tmp_path):
    import transformers

    model, params = loaded
    ids, mask = inputs
    axes = {"encoder/.*kernel": "layer in out"}
    frozen, delta = lora_jax.lorafy(params, "self/(query|value)/kernel", method=LoRA(rank=4), axes=axes)
    draw = np.random.default_rng(0)
    delta = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(0, 0.1, leaf.shape), leaf.dtype), delta)
    peft.save(tmp_path / "adapter", model, frozen, delta)
    adapted = lora_jax.adapt(model.apply)
    found = jax.jit(lambda delta: adapted({"params": lora_jax.combine(frozen, delta)}, ids, mask))(delta)[0]
    base = transformers.BertModel.from_pretrained(directory).eval()
    with torch.no_grad():
        before = base(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
        expected = theirs.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(
            torch.tensor(ids), attention_mask=torch.tensor(mask)
        )
    real = mask == 1
    expected = expected.last_hidden_state.numpy()
    assert np.abs(expected - before)[real].max() > 0.1
    np.testing.assert_allclose(np.asarray(found)[real], expected[real], atol=2e-5, rtol=0)
