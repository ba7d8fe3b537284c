"""The Llama family against itself: its cache, windows, precision, dropout and meshes; and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from llama_models import apply, random_params, some_ids, TINY

import lora_jax
from lora_jax import LoRA
from lora_jax.models import LlamaConfig
from lora_jax.models._rope import Rope
from lora_jax.sharding import partition_specs, shardings


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
def test_alternatives_share_the_slots_of_a_row(kind):
    """Windows count positions there: the slots of two alternatives stand one after the other."""
    model, params = random_params(TINY[kind])
    prompt, steps = some_ids(batch=1, tokens=5)[0], some_ids(batch=2, tokens=6, seed=8)[0]
    alone = apply(model, params, np.concatenate([np.repeat(prompt, 2, axis=0), steps], axis=1))[:, 5:]

    _, cache = apply(model, params, prompt, cache=model.init_cache(1, 17))
    seen = np.zeros((1, 2, 17), bool)
    seen[..., :5] = True
    for t in range(6):
        seen[0, 0, 5 + 2 * t] = seen[0, 1, 6 + 2 * t] = True
        logits, cache = apply(
            model,
            params,
            steps[:, t][None],
            position_ids=np.full((1, 2), 5 + t),
            cache=cache,
            visible=jnp.asarray(seen),
        )
        np.testing.assert_allclose(logits[0], alone[:, t], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", TINY)
def test_logits_of_some_columns_are_those_of_all(kind):
    model, params = random_params(TINY[kind])
    ids, mask = some_ids("right")
    columns = np.array([[4, 0], [1, 1], [-1, 3]])
    every = apply(model, params, ids, mask)
    some = apply(model, params, ids, mask, logits_at=columns)
    np.testing.assert_allclose(some, np.take_along_axis(every, columns[..., None], 1), atol=1e-6)


def test_a_full_cache_gives_nan():
    model, params = random_params(TINY["llama"])
    ids, _ = some_ids(tokens=4)
    logits, cache = apply(model, params, ids, cache=model.init_cache(3, 5))
    assert np.isfinite(logits).all()
    logits, cache = apply(model, params, ids[:, :1], cache=cache)
    assert np.isfinite(logits).all()
    logits, _ = apply(model, params, ids[:, :1], cache=cache)
    assert np.isnan(logits).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_precision_follows_the_parameters(dtype):
    with jax.enable_x64(True):
        model, params = random_params(TINY["qwen3"])
        ids, _ = some_ids()
        logits = model.apply({"params": jax.tree.map(lambda x: jnp.asarray(x, dtype), params)}, ids)
        exact = model.apply({"params": jax.tree.map(lambda x: jnp.asarray(x, "float64"), params)}, ids)
    assert logits.dtype == ("float64" if dtype == "float64" else "float32")
    assert np.abs(np.asarray(logits, np.float64) - np.asarray(exact)).max() < (
        0.3 if dtype == "bfloat16" else 1e-12
    )
    assert not np.array_equal(logits, logits.astype(jnp.bfloat16))  # neighbouring logits do not tie


def test_dropout_is_drawn_from_its_key_and_off_by_default():
    model, params = random_params(dataclasses.replace(TINY["llama"], attention_dropout=0.5))
    ids, _ = some_ids()

    def drawn(seed):
        return apply(model, params, ids, deterministic=False, rngs={"dropout": jax.random.key(seed)})

    np.testing.assert_array_equal(drawn(0), drawn(0))
    assert not np.allclose(drawn(0), drawn(1))
    still = apply(model.clone(config=TINY["llama"]), params, ids)
    np.testing.assert_array_equal(apply(model, params, ids), still)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_adapted_is_merged(kind):
    """All projections of scanned layers, on a mesh by the model's own rules."""
    model, params = random_params(TINY[kind], scan=True)
    ids, mask = some_ids("right")
    frozen, delta = lora_jax.lorafy(
        params, ["layers/.*_proj/kernel"], method=LoRA(rank=2, alpha=4), axes="layer in out"
    )
    draw = np.random.default_rng(1)
    delta = jax.tree.map(lambda x: jnp.asarray(draw.normal(0, 0.1, x.shape), x.dtype), delta)
    expected = apply(model, lora_jax.merge(frozen, delta), ids, mask)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(1, 2, 2), ("data", "fsdp", "tensor"))
    frozen = jax.device_put(frozen, shardings(mesh, partition_specs(frozen, model.partition_rules), frozen))
    weight = frozen["layers"]["self_attn"]["q_proj"]["kernel"]
    assert weight.addressable_shards[0].data.size == weight.size / 4
    forward = jax.jit(lora_jax.adapt(model.apply))
    ours = forward({"params": lora_jax.combine(frozen, delta)}, ids, mask)
    np.testing.assert_allclose(ours[mask == 1], expected[mask == 1], atol=1e-5, rtol=1e-5)


def test_a_stretched_plane_turns_slower():
    """Yarn and Llama 3 keep the fastest plane and divide the slowest one by the factor."""
    kinds = [
        Rope(kind="yarn", factor=4.0, original_max_position_embeddings=4096),
        Rope(
            kind="llama3",
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=4096,
        ),
    ]
    plain = Rope().frequencies(64, 16384, 1)
    for rope in kinds:
        ratio = rope.frequencies(64, 16384, 1) / plain
        assert ratio[0] == 1 and np.isclose(ratio[-1], 1 / 4) and (np.diff(ratio) <= 1e-12).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(hidden_size=33), "`hidden_size` is 33; it must be a multiple of `num_attention_heads`=32"),
        (dict(hidden_act="swiglu"), "`hidden_act` is 'swiglu', which is not supported"),
        (dict(rms_norm_eps=0.0), "`rms_norm_eps` is 0.0; it must be positive"),
        (dict(num_key_value_heads=5), "multiple of `num_key_value_heads`=5"),
    ],
    ids=str,
)
def test_configs_that_cannot_be_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**settings)


def test_layers_without_their_window_are_refused():
    with pytest.raises(ValueError, match="`layer_types` has 'sliding_attention', and there is no window"):
        dataclasses.replace(TINY["qwen2"], use_sliding_window=False)
    with pytest.raises(ValueError, match="`layer_types` is .*for each of the 2 layers"):
        dataclasses.replace(TINY["gemma2"], layer_types=("full_attention",))


def test_wrong_calls_say_what_was_passed():
    model, params = random_params(TINY["llama"])
    with pytest.raises(ValueError, match="`slots` is 0; it must be at least 1"):
        model.init_cache(2, 0)
    with pytest.raises(ValueError, match="`cache` is for 2 rows and `input_ids` has 1"):
        apply(model, params, np.ones((1, 3), int), cache=model.init_cache(2, 4))
    with pytest.raises(TypeError, match="`input_ids` must be integers"):
        apply(model, params, np.ones((1, 3)))
