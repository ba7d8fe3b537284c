"""What a layer of the models keeps from the forward to the backward pass, in the compiled program of a loop
over layers: the inputs of products, and nothing that can be computed again element by element. And the traced
program, which is the same for every depth.
"""

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from benchmarks.trace_and_compile import equations
from lora_jax import LoRA
from lora_jax.models import GPT2, GPT2Config, Llama, LlamaConfig, Roberta, RobertaConfig


BATCH, TOKENS, WIDTH, INNER, HEADS = 4, 32, 64, 256, 4
FAMILY = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": HEADS}
MODELS = {
    "GPT-2": lambda layers: GPT2(
        GPT2Config(vocab_size=64, n_positions=TOKENS, n_embd=WIDTH, n_layer=layers, n_head=HEADS), scan=True
    ),
    "Llama": lambda layers: Llama(
        LlamaConfig(vocab_size=64, num_hidden_layers=layers, num_key_value_heads=2, **FAMILY), scan=True
    ),
    "RoBERTa": lambda layers: Roberta(
        RobertaConfig(vocab_size=64, num_hidden_layers=layers, max_position_embeddings=40, **FAMILY),
        scan=True,
        head="masked_lm",
    ),
}
# In arrays of (batch, tokens, width). GPT-2: the input of each half and its norm (4), q, k, v and their
# result (4), and c_fc's result (4), from which the input of c_proj is computed again.
KEPT = {"GPT-2": 12.5, "Llama": 15.5, "RoBERTa": 12.5}


def gradient(model):
    """The gradient of a loss with respect to A and B, and the shapes of its arguments."""
    ids = jax.ShapeDtypeStruct((BATCH, TOKENS), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    frozen, delta = lora_jax.lorafy(
        params, ".*(h|layers?)/.*/kernel", method=LoRA(rank=2), axes="layer in out"
    )
    forward = lora_jax.adapt(model.apply)
    loss = lambda delta, frozen, ids: jnp.sum(forward({"params": lora_jax.combine(frozen, delta)}, ids))
    return jax.grad(loss), (delta, frozen, ids)


def temporary_bytes(model):
    function, shapes = gradient(model)
    compiled = jax.jit(function).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", MODELS)
def test_inputs_of_products_are_kept_and_no_more(name):
    few, many = (temporary_bytes(MODELS[name](layers)) for layers in (2, 6))
    kept = (many - few) / 4 / (4 * BATCH * TOKENS * WIDTH)
    assert 0.75 * KEPT[name] < kept < KEPT[name]


@pytest.mark.parametrize("name", MODELS)
def test_a_deeper_model_has_no_equation_more(name):
    few, many = (gradient(MODELS[name](layers)) for layers in (2, 6))
    found = [equations(jax.make_jaxpr(function)(*shapes)) for function, shapes in (few, many)]
    assert found[0] == found[1] > 100
