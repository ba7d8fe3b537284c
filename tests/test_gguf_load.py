"""GGUF files as models: every value is that of the `gguf` package, and the model is that of
`transformers`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from gguf_files import CHARACTERS, halves, needs_real, REAL, SCALES, values, write

from lora_jax.interop import gguf, hf
from lora_jax.interop._families import family_of_model
from lora_jax.interop._tensors import tensors_of
from lora_jax.models._rope import Rope


IDS = np.array([[3, 14, 15, 92, 65, 35, 89, 79], [1, 2, 3, 4, 5, 6, 7, 8]])


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


def test_every_value_is_gguf_s(tmp_path):
    """With all types in one file: blocks of every kind are in the order of their rows, but for the rows of
    query and key.
    """
    kinds = ("F16", *SCALES, "BF16", "F32")
    file = tmp_path / "model.gguf"
    tensors = write(file, kinds=kinds, bias=("attn_q", "attn_k", "attn_v", "attn_output"), tied=False)
    assert {kind for _, kind in tensors.values()} >= set(kinds)
    model, params = gguf.load(file)
    found = flat(params)
    assert model.param_dtype == jnp.float32 and {leaf.dtype for leaf in found.values()} == {
        jnp.dtype("float32")
    }
    same = np.testing.assert_array_equal
    same(found["embed_tokens/embedding"], values(tensors, "token_embd.weight"))
    same(found["lm_head/kernel"], values(tensors, "output.weight").T)
    same(found["norm/scale"], values(tensors, "output_norm.weight"))
    for i in range(2):
        for theirs, ours, heads in [("q", "q", 4), ("k", "k", 2), ("v", "v", None), ("output", "o", None)]:
            for last, leaf in [("weight", "kernel"), ("bias", "bias")]:
                array = values(tensors, f"blk.{i}.attn_{theirs}.{last}")
                array = array if heads is None else halves(array, heads)
                same(found[f"layers/{i}/self_attn/{ours}_proj/{leaf}"], array.T)
        for name in ("gate", "up", "down"):
            same(found[f"layers/{i}/mlp/{name}_proj/kernel"], values(tensors, f"blk.{i}.ffn_{name}.weight").T)
        same(found[f"layers/{i}/input_layernorm/scale"], values(tensors, f"blk.{i}.attn_norm.weight"))
        same(found[f"layers/{i}/post_attention_layernorm/scale"], values(tensors, f"blk.{i}.ffn_norm.weight"))


CASES = {
    "llama": ("llama", {}, {}),
    "llama, untied": ("llama", {}, {"tied": False}),
    "qwen2": ("qwen2", {}, {"bias": ("attn_q", "attn_k", "attn_v"), "tied": False}),
    "qwen3": ("qwen3", {"attention.key_length": 128}, {"norms": True}),
    "gemma2": ("gemma2", {"attention.key_length": 256, "attention.sliding_window": 4}, {"gemma": True}),
    "gemma3": (
        "gemma3",
        {"attention.key_length": 256, "attention.sliding_window": 4, "block_count": 6},
        {"gemma": True, "norms": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_model_is_that_of_transformers(case, tmp_path, theirs):
    """Its own reader of GGUF files: the same parameters, and the same logits."""
    architecture, changes, layout = CASES[case]
    write(tmp_path / "model.gguf", architecture, kinds=("Q8_0", "Q4_K", "Q5_1"), changes=changes, **layout)
    check_against(theirs, tmp_path / "model.gguf", IDS, wide=True)


def check_against(theirs, file, ids, wide=False):
    """`wide`: logits in float64, because rounding grows in Gemma's norms of random weights."""
    import torch

    model, params = gguf.load(file)
    reference = theirs.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    state = reference.state_dict()
    found, names = flat(params), set()
    for tensor in tensors_of(model, family_of_model(model)[2]):
        np.testing.assert_array_equal(tensor.to_theirs(found[tensor.path]), state[tensor.name].numpy())
        names.add(tensor.name)
    assert names | {"lm_head.weight"} == set(state) | {"lm_head.weight"}
    reference = (reference.double() if wide else reference).eval()
    with torch.no_grad(), jax.enable_x64(wide):
        expected = reference(torch.tensor(ids)).logits.numpy()
        cast = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params) if wide else params
        logits = np.asarray(model.apply({"params": cast}, jnp.asarray(ids)))
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
    return logits


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    transformers.utils.logging.disable_progress_bar()
    return transformers


@needs_real
@pytest.mark.slow
def test_the_real_model(theirs):
    tokenizer = gguf.tokenizer(REAL)
    ids = tokenizer("The capital of France is")["input_ids"]
    logits = check_against(theirs, REAL, np.array([ids]))
    assert tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"


def test_a_tokenizer(tmp_path):
    """A token for each character, counted from '!', and one for a space with a t."""
    pytest.importorskip("transformers")
    write(tmp_path / "model.gguf", extra=CHARACTERS)
    tokenizer = gguf.tokenizer(tmp_path / "model.gguf")
    space, space_t, end = 93, 94, 95
    expected = [ord("a") - 33, space_t, ord("o") - 33, space, ord("b") - 33, end]
    assert tokenizer("a to b<|im_end|>")["input_ids"] == expected
    assert tokenizer.decode(expected) == "a to b<|im_end|>"
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", end)
    assert tokenizer.chat_template == CHARACTERS["tokenizer.chat_template"]
    pytest.importorskip("jinja2")
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "a<|im_end|>b<|im_end|>"


TEXTS = ("The Alimentum is not family friendly.", "x = 1\n\n\tprint(x)  # naïve", "£20-25 日本 🙂", "")


@needs_real
def test_the_real_tokenizer():
    pytest.importorskip("transformers")
    tokenizer = gguf.tokenizer(REAL)
    assert all(tokenizer.decode(tokenizer(text)["input_ids"]) == text for text in TEXTS)
    assert tokenizer("The capital of France is")["input_ids"] == [504, 3575, 282, 4649, 314]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|im_end|>",
    )
    assert tokenizer("<|im_end|>")["input_ids"] == [2] == [tokenizer.eos_token_id]
    pytest.importorskip("jinja2")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHello<|im_end|>\n")


@needs_real
@pytest.mark.slow
def test_the_real_tokenizer_is_that_of_transformers(theirs):
    tokenizer = gguf.tokenizer(REAL)
    reference = theirs.AutoTokenizer.from_pretrained(REAL.parent, gguf_file=REAL.name)
    for text in (*TEXTS, "<|im_start|>user\n<repo_name> a<|im_end|>"):
        assert tokenizer(text)["input_ids"] == reference(text)["input_ids"]
        assert tokenizer.tokenize(text) == reference.tokenize(text)
    assert tokenizer.get_vocab() == reference.get_vocab() and len(tokenizer) == 49152
    assert tokenizer.special_tokens_map == reference.special_tokens_map
    assert set(tokenizer.all_special_ids) == set(reference.all_special_ids)
    assert tokenizer.chat_template == reference.chat_template
    for name in ("add_bos_token", "add_eos_token", "padding_side"):
        assert getattr(tokenizer, name) == getattr(reference, name)


@pytest.mark.parametrize("says", [None, True, False])
def test_where_texts_begin(says, tmp_path, theirs):
    """A vocabulary of SentencePiece, with BOS unless the file says otherwise."""
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab", "▁ab"]
    extra = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, *(-float(i) for i in range(6))],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1, 1],
        **{f"tokenizer.ggml.{name}_token_id": i for i, name in enumerate(("unknown", "bos", "eos"))},
        **({} if says is None else {"tokenizer.ggml.add_bos_token": says}),
    }
    write(tmp_path / "model.gguf", extra=extra)
    tokenizer = gguf.tokenizer(tmp_path / "model.gguf")
    reference = theirs.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in ("ab a", "b", " ab</s>"):
        ids = tokenizer(text)["input_ids"]
        assert ids == reference(text)["input_ids"] and (ids[0] == 1) == (says is not False)
    assert tokenizer.special_tokens_map == reference.special_tokens_map


# -- options -------------------------------------------------------------------------------------------------


def test_scanned_cast_and_placed(tmp_path):
    file = tmp_path / "model.gguf"
    write(file, kinds=("Q8_0", "F32"))
    _, params = gguf.load(file)
    expected = flat(params)
    model, stacked = gguf.load(file, scan=True, checkpoint=True, param_dtype=jnp.bfloat16, dtype=jnp.float32)
    assert (model.scan, model.checkpoint, model.dtype) == (True, True, jnp.float32)
    for path, leaf in flat(stacked).items():
        whole = (
            np.stack([expected[path.replace("layers/", f"layers/{i}/")] for i in range(2)])
            if path.startswith("layers/")
            else expected[path]
        )
        np.testing.assert_array_equal(leaf, jnp.asarray(whole, jnp.bfloat16))
    seen = {}
    _, mapped = gguf.load(file, place=lambda path, array: seen.setdefault(path, array))
    assert set(seen) == set(expected) and all(isinstance(array, np.ndarray) for array in seen.values())
    base = seen["norm/scale"]  # float32 in the file: a map of it
    while base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)


def test_untied(tmp_path):
    file = tmp_path / "model.gguf"
    write(file)
    model, params = gguf.load(file, tie="untie")
    assert not model.config.tie_word_embeddings
    np.testing.assert_array_equal(params["lm_head"]["kernel"], params["embed_tokens"]["embedding"].T)
    tied, own = gguf.load(file)
    ids = jnp.asarray(IDS)
    np.testing.assert_allclose(
        model.apply({"params": params}, ids), tied.apply({"params": own}, ids), atol=2e-5
    )


@pytest.mark.parametrize("scan", [True, False])
def test_split_over_a_mesh(tmp_path, scan):
    """Every device gets its own part, whichever way rows and columns are split."""
    file = tmp_path / "model.gguf"
    write(file, kinds=("Q8_0", "Q6_K", "F32"))
    _, expected = gguf.load(file, scan=scan)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 4, 2), ("data", "fsdp", "tensor"))
    model, params = gguf.load(file, scan=scan, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    kernel = flat(params)["layers/self_attn/q_proj/kernel" if scan else "layers/1/self_attn/q_proj/kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8


def test_saved_for_hugging_face(tmp_path):
    """What was read from a GGUF file is a model like any other."""
    write(tmp_path / "model.gguf", kinds=("Q4_0",))
    model, params = gguf.load(tmp_path / "model.gguf")
    hf.save(tmp_path / "saved", model, params)
    again, same = hf.load(tmp_path / "saved")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, same, params)


# -- settings ------------------------------------------------------------------------------------------------


def config_of(tmp_path, architecture="llama", **how):
    write(tmp_path / "model.gguf", architecture, **how)
    return gguf.load(tmp_path / "model.gguf")[0].config


def test_settings(tmp_path):
    config = config_of(
        tmp_path, extra={"tokenizer.ggml.bos_token_id": 7, "tokenizer.ggml.padding_token_id": 9}
    )
    assert (config.rope, config.rms_norm_eps, config.vocab_size) == (Rope(20000.0), 1e-5, 96)
    assert (config.bos_token_id, config.pad_token_id, config.max_position_embeddings) == (7, 9, 64)
    assert (config.head_dim, config.num_key_value_heads) == (64, 2)
    tokens = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(96)]}
    changes = {"vocab_size": None, "rope.freq_base": None, "attention.head_count_kv": 4}
    config = config_of(tmp_path, changes=changes, extra=tokens)
    assert (config.vocab_size, config.rope.theta, config.num_key_value_heads) == (96, 10000.0, 4)
    assert config_of(tmp_path, changes={"attention.key_length": 32, "expert_count": 0}).head_dim == 32
    config = config_of(tmp_path, changes={"attention.sliding_window": 16})
    assert (config.family, config.windows) == ("Mistral", (16, 16))
    config = config_of(tmp_path, bias=("ffn_gate", "ffn_up", "ffn_down"))
    assert config.mlp_bias and not config.attention_bias


def test_gemma_s_settings(tmp_path):
    changes = {"attention.key_length": 32, "attention.value_length": 32, "rope.freq_base": None}
    config = config_of(tmp_path, "gemma2", changes=changes, gemma=True)
    assert (config.attention_cap, config.logit_cap, config.windows) == (50, 30, (4096, None))
    assert config.attention_scale == 32**-0.5
    small = {"embedding_length": 64, "feed_forward_length": 32, "block_count": 46}
    config = config_of(tmp_path, "gemma2", changes={**changes, **small}, gemma=True)  # a 27B
    assert config.attention_scale == 16**-0.5
    more = {"attention.sliding_window": 8, "rope.freq_base_swa": 500.0, "rope.freq_base": 1e6}
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    config = config_of(tmp_path, "gemma3", changes={**changes, **more, **linear}, gemma=True, norms=True)
    assert config.ropes == (Rope(500.0), Rope(1e6, "linear", 8.0)) and config.windows == (8, 8)
    assert (config.attention_cap, config.logit_cap) == (None, None)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"rope.scaling.type": "none", "rope.scaling.factor": 8.0}, {}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, {"kind": "linear", "factor": 8.0}),
        ({"rope.scale_linear": 2.0}, {"kind": "linear", "factor": 2.0}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 32,
                "rope.scaling.yarn_beta_fast": 16.0,
                "rope.scaling.finetuned": True,
            },
            {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
        ),
    ],
)
def test_scaled_positions(tmp_path, changes, expected):
    assert config_of(tmp_path, changes=changes).rope == Rope(20000.0, **expected)


def test_llama3_s_positions(tmp_path):
    """The file has divisors of frequencies; these are by the formula of `transformers`."""
    transformers = pytest.importorskip("transformers")
    scaling = {
        **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        **{"original_max_position_embeddings": 8192, "rope_theta": 20000.0},
    }
    pytest.importorskip("torch")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=65536, rope_parameters=scaling
    )
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()
    divisors = (20000.0 ** -(np.arange(0, 64, 2) / 64) / scaled).astype(np.float32)
    assert len(set(divisors.round(3))) > 3  # some of them on the ramp
    also = {"rope_freqs.weight": divisors}
    rope = config_of(tmp_path, also=also).rope
    assert (rope.kind, rope.factor, rope.original_max_position_embeddings) == ("llama3", 8.0, 8192)
    with pytest.raises(ValueError, match="`rope_freqs.weight` that is not Llama 3.1's"):
        config_of(tmp_path, also={"rope_freqs.weight": divisors**0.9})
