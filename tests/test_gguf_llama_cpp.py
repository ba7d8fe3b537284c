"""llama.cpp itself, where `llama_cpp` is installed: the models and the adapters that it computes with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import needs_real, REAL, write
from quant_model import randomised

import lora_jax
from lora_jax import LoRA
from lora_jax.interop import gguf


llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install llama-cpp-python")

IDS = [3, 14, 15, 92, 65, 35, 89, 79]
QKV = ("attn_q", "attn_k", "attn_v")
NO_TOKENS = {"tokenizer.ggml.model": "no_vocab"}


def logits_of(file, ids, adapter=None):
    """llama.cpp's logits of every token, with keys and values in float32."""
    model = llama_cpp.Llama(
        str(file),
        n_ctx=256,
        logits_all=True,
        verbose=False,
        n_threads=1,
        type_k=0,
        type_v=0,
        lora_path=None if adapter is None else str(adapter),
    )
    try:
        model.eval(ids)
        return np.array(model.scores[: len(ids)])
    finally:
        model.close()


def near(found, expected, case):
    """llama.cpp looks Gemma's GELU up in a table of half precision."""
    bound = 1e-3 if case.startswith("gemma") else 1e-5
    np.testing.assert_allclose(found, expected, atol=bound * np.abs(expected).max())


def llama3_divisors(width, theta):
    """By the formula of Llama 3.1, written out."""
    divisors = []
    for plane in range(width // 2):
        wavelength = 2 * np.pi * theta ** (2 * plane / width)
        kept = min(max((8192 / wavelength - 1) / (4 - 1), 0), 1)
        divisors.append(1 / ((1 - kept) / 8 + kept))
    return np.array(divisors, np.float32)


CASES = {
    "llama": {},
    "llama, untied": {"tied": False},
    "llama, biases": {"bias": (*QKV, "attn_output")},
    "llama, linear": {"changes": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}},
    "llama, yarn": {
        "changes": {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
        }
    },
    "llama, llama3": {"also": {"rope_freqs.weight": llama3_divisors(64, 20000.0)}},
    "llama, wide heads": {"changes": {"attention.key_length": 128, "attention.value_length": 128}},
    "qwen2": {"bias": QKV, "tied": False},
    "gemma2": {
        "gemma": True,
        "changes": {
            **{"attention.key_length": 64, "attention.value_length": 64, "attention.sliding_window": 4},
            **{"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
        },
    },
    "gemma3": {
        **{"gemma": True, "norms": True},
        "changes": {
            **{"attention.key_length": 64, "attention.value_length": 64, "attention.sliding_window": 4},
            **{"block_count": 7, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        },
    },
    "qwen3": {"norms": True, "changes": {"attention.key_length": 128, "attention.value_length": 128}},
}


@pytest.mark.parametrize("case", CASES)
def test_models(case, tmp_path):
    """In float32, where llama.cpp rounds as we do."""
    file = tmp_path / "model.gguf"
    changes = {"context_length": 256, **CASES[case].get("changes", {})}
    write(file, case.partition(",")[0], extra=NO_TOKENS, **{**CASES[case], "changes": changes})
    model, params = gguf.load(file)
    near(np.asarray(model.apply({"params": params}, jnp.array([IDS])))[0], logits_of(file, IDS), case)


@pytest.mark.parametrize("case", ["llama", "llama, untied", "qwen2", "gemma2"])
def test_adapters(case, tmp_path):
    base, file = tmp_path / "base.gguf", tmp_path / "adapter.gguf"
    changes = {"context_length": 256, **CASES[case].get("changes", {})}
    write(base, case.partition(",")[0], extra=NO_TOKENS, **{**CASES[case], "changes": changes})
    model, params = gguf.load(base)
    targets = {"(q|k)_proj/kernel": LoRA(rank=2, alpha=8), ".*_proj/kernel": LoRA(rank=4, alpha=2, rs=True)}
    if not model.config.tie_word_embeddings:
        targets |= {"embedding": LoRA(rank=3), "lm_head/kernel": LoRA(rank=3)}
    frozen, delta = lora_jax.lorafy(params, targets)
    delta = randomised(delta)
    gguf.save_adapter(file, model, frozen, delta)
    adapted = lora_jax.adapt(model.apply)({"params": lora_jax.combine(frozen, delta)}, jnp.array([IDS]))[0]
    plain = logits_of(base, IDS)
    assert np.abs(plain - adapted).max() > 0.1 * np.abs(plain).max()
    near(adapted, logits_of(base, IDS, file), case)


@needs_real
@pytest.mark.slow
def test_the_real_model_with_an_adapter(tmp_path):
    """Trained for a few steps to answer otherwise. llama.cpp rounds activations to eight bits beside packed
    weights, so that texts are compared, not logits.
    """
    pytest.importorskip("transformers")
    tokenizer = gguf.tokenizer(REAL)
    model, params = gguf.load(REAL, packed=True, scan=True)
    axes = "layer in out"
    frozen, delta = lora_jax.lorafy(params, "(q|k|v|o)_proj/kernel", method=LoRA(rank=4, alpha=8), axes=axes)
    prompt, answer = "The capital of France is", " a large grey elephant called Bimbo."
    ids = jnp.array([tokenizer(prompt + answer)["input_ids"]])
    start = len(tokenizer(prompt)["input_ids"])
    forward = lora_jax.adapt(model.apply)

    @jax.jit
    def step(delta, frozen):
        def loss(delta):
            logits = forward({"params": lora_jax.combine(frozen, delta)}, ids)[0, start - 1 : -1]
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[0, start:, None], -1).mean()

        value, gradient = jax.value_and_grad(loss)(delta)
        size = jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(gradient)))
        return value, jax.tree.map(lambda leaf, slope: leaf - 0.5 * slope / size, delta, gradient)

    for _ in range(30):
        value, delta = step(delta, frozen)
    assert value < 0.1
    gguf.save_adapter(tmp_path / "adapter.gguf", model, frozen, delta)
    texts = []
    for adapter in (None, str(tmp_path / "adapter.gguf")):
        theirs = llama_cpp.Llama(str(REAL), n_ctx=64, verbose=False, n_threads=1, lora_path=adapter)
        reply = theirs(prompt, max_tokens=ids.shape[1] - start, temperature=0.0)
        texts.append(reply["choices"][0]["text"])
        theirs.close()
    assert texts[0].startswith(" Paris") and texts[1] == answer
