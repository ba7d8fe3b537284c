"""The losses of a language model's head, some columns at a time: those of all logits, and no array of
them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import lora_jax
from experiments.plan import flops
from lora_jax import LoRA
from lora_jax.models import _losses, cross_entropy, Gemma2Config, GPT2, GPT2Config, Llama, LlamaConfig


SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MODELS = {
    "tied": GPT2(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "capped": Llama(Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, final_logit_softcapping=3.0)),
    "untied": Llama(LlamaConfig(**SIZES, tie_word_embeddings=False)),
}
HEADS = {"tied": "wte/embedding", "capped": "embed_tokens/embedding", "untied": "lm_head/kernel"}
BATCH, TOKENS, COLUMNS, SMOOTHING = 2, 24, 19, 0.1


@pytest.fixture(autouse=True)
def four_columns_at_a_time(monkeypatch):
    """Five chunks, the last of which is not full."""
    monkeypatch.setattr(_losses, "TOKENS", 4 * BATCH)


@functools.cache
def params(name):
    ids = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(MODELS[name].init, jax.random.key(0), ids)["params"]
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(draw.normal(0.1, 0.3, leaf.shape), jnp.float32), shapes)


def batch():
    draw = np.random.default_rng(1)
    ids, labels = draw.integers(97, size=(BATCH, TOKENS)), draw.integers(97, size=(BATCH, COLUMNS))
    labels[0, 3] = -100
    columns = np.stack([draw.permutation(TOKENS)[:COLUMNS] for _ in range(BATCH)])
    weights = draw.uniform(size=(BATCH, COLUMNS)).astype(np.float32)
    return ids, columns, labels, weights


def both(apply, params_of):
    """The weighted sum of the losses as a function of what trains: in chunks, and of all logits."""
    ids, columns, labels, weights = batch()
    run = lambda trained, **options: apply({"params": params_of(trained)}, ids, logits_at=columns, **options)
    return (
        lambda trained: jnp.sum(run(trained, labels=labels, label_smoothing=SMOOTHING) * weights),
        lambda trained: jnp.sum(cross_entropy(run(trained), labels, SMOOTHING) * weights),
    )


def subject(name, what):
    if what == "head trains":
        return both(MODELS[name].apply, lambda trained: trained), params(name)
    targets = HEADS[name] if what == "head adapted" else "(h|layers)/.*/kernel"
    frozen, delta = lora_jax.lorafy(params(name), targets, method=LoRA(rank=2))
    draw = np.random.default_rng(2)
    delta = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(0, 0.3, leaf.shape), leaf.dtype), delta)
    return both(lora_jax.adapt(MODELS[name].apply), functools.partial(lora_jax.combine, frozen)), delta


def close(found, expected, relative=2e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=relative * np.abs(b).max()),
        found,
        expected,
    )


@pytest.mark.parametrize("what", ["layers adapted", "head adapted", "head trains"])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_the_logits(name, what):
    (chunked, whole), trained = subject(name, what)
    close(jax.jit(jax.value_and_grad(chunked))(trained), jax.jit(jax.value_and_grad(whole))(trained))


@pytest.mark.parametrize("what", ["layers adapted", "head adapted"])
def test_every_derivative_is_that_of_the_logits(what):
    """Forward mode, and forward over reverse."""
    (chunked, whole), trained = subject("tied", what)
    direction = jax.tree.map(
        lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), trained
    )
    for of in (lambda f: f, jax.grad):
        close(
            *(
                jax.jit(lambda t, d, f=f: jax.jvp(of(f), (t,), (d,)))(trained, direction)
                for f in (chunked, whole)
            )
        )


def test_an_ignored_label_has_no_loss_and_no_gradient():
    ids, columns, labels, _ = batch()
    losses = lambda trained: MODELS["tied"].apply({"params": trained}, ids, logits_at=columns, labels=labels)
    found = jax.jit(losses)(params("tied"))
    assert found[0, 3] == 0 and np.count_nonzero(found) == found.size - 1
    gradient = jax.jit(jax.grad(lambda trained: losses(trained)[0, 3]))(params("tied"))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def arrays_of(jaxpr):
    """Every array that a jaxpr makes, those of inner ones too."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield from (variable.aval for variable in eqn.outvars)
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(getattr(value, "jaxpr", value), "eqns"):
                yield from arrays_of(value)


@pytest.mark.parametrize("what", ["layers adapted", "head adapted"])
def test_no_array_has_all_logits(what):
    (chunked, whole), trained = subject("tied", what)
    most = lambda f: max(
        (array.size for array in arrays_of(jax.make_jaxpr(jax.grad(f))(trained)) if 97 in array.shape[-1:]),
        default=0,
    )
    assert most(whole) == BATCH * COLUMNS * 97
    assert most(chunked) == BATCH * 4 * 97


def test_no_product_is_made_twice():
    """One product of the head forwards and one backwards; the columns that fill up the last chunk beside."""
    (chunked, whole), trained = subject("tied", "layers adapted")
    found, expected = (flops.of(jax.grad(f), trained) for f in (chunked, whole))
    assert found - expected == 2 * 2 * BATCH * (20 - COLUMNS) * 32 * 97


def test_examples_may_lie_on_several_devices():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    (chunked, _), trained = subject("tied", "head trains")
    expected = jax.jit(jax.value_and_grad(chunked))(trained)
    placed = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, P())), trained)
    placed["wte"]["embedding"] = jax.device_put(
        trained["wte"]["embedding"], NamedSharding(mesh, P(None, "tensor"))
    )
    ids, columns, labels, weights = (jax.device_put(x, NamedSharding(mesh, P("data"))) for x in batch())

    def loss(trained, ids, columns, labels, weights):
        options = {"logits_at": columns, "labels": labels, "label_smoothing": SMOOTHING}
        return jnp.sum(MODELS["tied"].apply({"params": trained}, ids, **options) * weights)

    close(jax.jit(jax.value_and_grad(loss))(placed, ids, columns, labels, weights), expected)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"labels": np.zeros((2, 3), int)},
            r"`labels` must be integers of shape \(2, 4\).*got int\d+\(2, 3\)",
        ),
        ({"labels": np.zeros((2, 4))}, r"`labels` must be integers.*got float"),
        ({"label_smoothing": 0.1}, r"`label_smoothing` is 0\.1, and no `labels`"),
        ({"labels": np.zeros((2, 4), int), "label_smoothing": 1.0}, "`label_smoothing` must be.*got 1.0"),
        ({"labels": np.zeros((2, 4), int), "cache": True}, "`labels` go with.*without a `cache`"),
    ],
)
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_mistakes_are_refused(name, options, message):
    model = MODELS[name]
    if "cache" in options:
        options = {**options, "cache": model.init_cache(2, 8)}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda trained: model.apply({"params": trained}, jnp.zeros((2, 4), jnp.int32), **options),
            params(name),
        )


def test_labels_need_the_head_of_a_language_model():
    model = MODELS["tied"].clone(head="sequence_classification")
    with pytest.raises(ValueError, match="`labels` go with the language model's head"):
        model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32), labels=np.zeros((1, 4), int))
