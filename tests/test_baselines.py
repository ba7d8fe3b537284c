"""Adapters: where they start, what trains, and the same adapters by hand in PyTorch's models."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from encoders import BERT, DEBERTA, ours, QUICKLY, ROBERTA
from gpt2_models import SMALL_VOCABULARY
from llama_models import TINY

import lora_jax
from lora_jax import Full, LoRA
from lora_jax.baselines import attach, Houlsby, Lin, Pfeiffer, PrefixEmbedding, PrefixLayer, top_layers
from lora_jax.models import GPT2, Llama, unstack_layers


MODELS = {
    "gpt2": GPT2(SMALL_VOCABULARY),
    "gpt2 stacked": GPT2(SMALL_VOCABULARY, scan=True, checkpoint=True),
    "llama": Llama(TINY["llama"]),
    "gemma": Llama(TINY["gemma3_text"], scan=True),
    "bert": ours(BERT, "masked_lm"),
    "roberta stacked": ours(ROBERTA, "sequence_classification", scan=True),
    "deberta": ours(DEBERTA, "sequence_classification"),
}
ADAPTERS = [Houlsby(3), Pfeiffer(3), Lin(3)]
PREFIXES = [PrefixEmbedding(2, 1), PrefixLayer(2, 1)]
IDS = np.asarray([[5, 6, 7, 8, 9], [9, 3, 4, 2, 5]])


def start(model, seed=0):
    """Random parameters, the ones that start as 0 or 1 included."""
    params = jax.jit(model.init, compiler_options=QUICKLY)(jax.random.key(seed), IDS)["params"]
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    moved = [leaf + 0.05 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, moved)


def named(tree):
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


class Same:
    """Equal to this object alone."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return other is self.value


def texts(model, baseline, ids=IDS):
    """The ids with the special tokens that the baseline has."""
    if not hasattr(baseline, "insert"):
        return ids
    return np.asarray([baseline.insert(model, row) for row in ids.tolist()])


def random(delta, scale=0.3):
    leaves, treedef = jax.tree.flatten(delta)
    generator = np.random.default_rng(0)
    return jax.tree.unflatten(
        treedef, [jnp.asarray(generator.normal(0, scale, leaf.shape), leaf.dtype) for leaf in leaves]
    )


# All of them on a decoder, and on the others what reaches every site.
CASES = [
    *(("gpt2 stacked", each) for each in (*ADAPTERS, *PREFIXES)),
    *(("roberta stacked", each) for each in (Houlsby(3), Pfeiffer(3), PrefixLayer(2, 1))),
    *(("deberta", PrefixEmbedding(2, 1)), ("llama", PrefixLayer(2, 1))),
    *(("gemma", Houlsby(3)), ("bert", Lin(3))),
]


@pytest.mark.parametrize("name, baseline", CASES, ids=str)
def test_one_step_trains_what_was_added_and_nothing_else(name, baseline):
    model = MODELS[name]
    params = start(model)
    extended, more = attach(model, params, baseline)
    frozen, delta = lora_jax.lorafy(more, baseline.targets)
    assert dict(named(frozen)) == {path: Same(leaf) for path, leaf in named(params)}
    ids = texts(model, baseline)

    def loss(delta, frozen):
        logits = lora_jax.adapt(extended.apply)({"params": lora_jax.combine(frozen, delta)}, ids)
        return jnp.square(logits.astype(jnp.float32) - 1).mean(), logits

    both = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICKLY)
    (before, logits), gradient = both(delta, frozen)
    if baseline in ADAPTERS:  # they start at zero
        expected = jax.jit(model.apply, compiler_options=QUICKLY)({"params": params}, ids)
        np.testing.assert_allclose(logits, expected, atol=2e-6, rtol=0)
    assert jax.tree.structure(gradient) == jax.tree.structure(delta)
    reached = [leaf for path, leaf in named(gradient) if "'down'" not in path and "'norm'" not in path]
    assert reached and all(np.all(np.isfinite(leaf)) and np.any(leaf) for leaf in reached)
    moved = jax.tree.map(lambda leaf, slope: leaf - 3e-3 * jnp.sign(slope), delta, gradient)
    (after, _), gradient = both(moved, frozen)
    assert after < before
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))  # all is reached once `up` has moved


@pytest.mark.parametrize(
    "name, baseline", [("gpt2", Houlsby(3)), ("gpt2", Lin(3)), ("bert", Pfeiffer(3))], ids=str
)
def test_the_start_is_the_base_to_the_last_bit(name, baseline):
    """Operation by operation: compiled as a whole, two programs round differently."""
    model = MODELS[name]
    params = start(model)
    extended, more = attach(model, params, baseline)
    np.testing.assert_array_equal(extended.apply({"params": more}, IDS), model.apply({"params": params}, IDS))


def test_stacked_layers_are_single_ones():
    model, single = MODELS["gpt2 stacked"], MODELS["gpt2"]
    params = start(model)
    for baseline in (*ADAPTERS, *PREFIXES):
        extended, more = attach(model, params, baseline)
        frozen, delta = lora_jax.lorafy(more, baseline.targets)
        more = lora_jax.merge(frozen, random(delta))
        ids = texts(model, baseline)
        found = jax.jit(extended.apply, compiler_options=QUICKLY)({"params": more}, ids)
        apart = extended.clone(scan=False, checkpoint=False)
        assert apart.base == single
        expected = jax.jit(apart.apply, compiler_options=QUICKLY)({"params": unstack_layers(more)}, ids)
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def test_dropped_layers_have_no_adapter():
    model = MODELS["gpt2"]
    params = start(model)
    baseline = Houlsby(3, dropped=1)
    extended, more = attach(model, params, baseline)
    assert "adapter" not in more["h"]["0"]["attn"] and "adapter" in more["h"]["1"]["mlp"]
    frozen, delta = lora_jax.lorafy(more, baseline.targets)
    more = lora_jax.merge(frozen, random(delta))
    whole, both = attach(model, params, Houlsby(3))
    both["h"]["1"] = more["h"]["1"]
    np.testing.assert_allclose(
        extended.apply({"params": more}, IDS), whole.apply({"params": both}, IDS), atol=1e-6, rtol=0
    )


def test_decoding_with_a_cache_and_losses_of_labels():
    model = MODELS["gpt2"]
    params = start(model)
    for baseline in (Houlsby(3), PrefixLayer(2, 1)):
        extended, more = attach(model, params, baseline)
        frozen, delta = lora_jax.lorafy(more, baseline.targets)
        variables = {"params": lora_jax.merge(frozen, random(delta))}
        ids = np.concatenate([texts(model, baseline), IDS[:, :2]], axis=1)
        apply = jax.jit(extended.apply, compiler_options=QUICKLY)
        logits = apply(variables, ids)
        cache = extended.init_cache(batch=2, slots=ids.shape[1])
        first, cache = apply(variables, ids[:, :-1], cache=cache)
        last, cache = apply(variables, ids[:, -1:], cache=cache)
        np.testing.assert_allclose(first[:, -1], logits[:, -2], atol=1e-5, rtol=0)
        np.testing.assert_allclose(last[:, 0], logits[:, -1], atol=1e-5, rtol=0)
        labels = np.concatenate([np.full((2, ids.shape[1] - 2), -100), IDS[:, :2]], axis=1)
        expected = optax.softmax_cross_entropy_with_integer_labels(logits[:, -2:], IDS[:, :2])
        np.testing.assert_allclose(apply(variables, ids, labels=labels)[:, -2:], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prefix", PREFIXES, ids=lambda each: type(each).__name__)
def test_lora_beside_a_prefix(prefix):
    model = MODELS["gpt2"]
    extended, params = attach(model, start(model), prefix)
    targets = {**prefix.targets, "attn/c_attn/kernel": LoRA(rank=2, alpha=2)}
    frozen, delta = lora_jax.lorafy(params, targets)
    delta = random(delta)
    ids = texts(model, prefix)
    found = jax.jit(lora_jax.adapt(extended.apply), compiler_options=QUICKLY)(
        {"params": lora_jax.combine(frozen, delta)}, ids
    )
    merged = {"params": lora_jax.merge(frozen, delta)}
    np.testing.assert_allclose(found, extended.apply(merged, ids), atol=2e-5, rtol=0)


def test_two_baselines_on_one_model():
    model = MODELS["gpt2"]
    params = start(model)
    houlsby, prefix = Houlsby(3, up_std=0.1), PrefixEmbedding(2)
    found = []
    for first, second in ((houlsby, prefix), (prefix, houlsby)):
        extended, more = attach(*attach(model, params, first), second)
        apply = jax.jit(extended.apply, compiler_options=QUICKLY)
        found.append(apply({"params": more}, texts(model, prefix)))
    np.testing.assert_allclose(*found, atol=1e-6, rtol=0)


def test_what_trains_is_saved_and_loaded_as_any_tree():
    model = MODELS["gpt2"]
    baseline = Lin(3)
    _, params = attach(model, start(model), baseline)
    delta = lora_jax.lorafy(params, baseline.targets).delta
    trained = random(delta)
    loaded = flax.serialization.from_bytes(delta, flax.serialization.to_bytes(trained))
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, trained))


def test_the_start_depends_on_the_key_and_the_path_alone():
    model = MODELS["gpt2"]
    params = start(model)
    one, two, other = (
        attach(model, params, Houlsby(3, dropped=dropped), key=jax.random.key(seed)).params["h"]["1"]["mlp"]
        for dropped, seed in ((0, 0), (1, 0), (0, 1))
    )
    kernels = [each["adapter"]["down"]["kernel"] for each in (one, two, other)]
    np.testing.assert_array_equal(*kernels[:2])
    assert np.all(kernels[0] != kernels[2]) and np.abs(kernels[0]).max() <= 0.02


def test_top_layers_train_whole():
    model = MODELS["gpt2"]
    delta = lora_jax.lorafy(start(model), top_layers(model, 1)).delta
    assert {path.split("'")[3] for path, _ in named(delta)} == {"1"}
    encoder = MODELS["bert"]
    assert top_layers(encoder, 1) == {"encoder/layer/(1)/.*": Full()}


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda model, params: Houlsby(0), ValueError, "`bottleneck` is 0"),
        (lambda model, params: Lin(2, activation="gelo"), ValueError, "`activation` is 'gelo'"),
        (lambda model, params: Pfeiffer(2, dropped=-1), ValueError, "`dropped` is -1"),
        (lambda model, params: Pfeiffer(2, std=-1.0), ValueError, "`std` is -1.0"),
        (lambda model, params: PrefixLayer(0), ValueError, "`prefix` is 0 and `infix` is 0"),
        (lambda model, params: attach(model, params, Pfeiffer(2, dropped=2)), ValueError, "at most 1"),
        (
            lambda model, params: attach(model.clone(scan=True), params, Pfeiffer(2, dropped=1)),
            ValueError,
            r"`dropped` is 1, and the model's layers are stacked .*unstack_layers\(params\)",
        ),
        (
            lambda model, params: attach(*attach(model, params, Lin(2)), Lin(2)),
            ValueError,
            "`params` already has 'h/0/adapter/down/bias'",
        ),
        (
            lambda model, params: attach(model.clone(scan=True), params, Houlsby(2)),
            ValueError,
            "`params` has no 'attn' of 'h/attn/adapter/down/bias'.*stack_layers",
        ),
        (lambda model, params: attach(model, params, LoRA()), TypeError, "`baseline` is LoRA"),
        (lambda model, params: attach(model, [1], Lin(2)), TypeError, "`params` is a list"),
        (lambda model, params: attach(print, params, Lin(2)), TypeError, "`model` is a builtin"),
        (
            lambda model, params: attach(model, params, PrefixEmbedding(2, words=(500,))),
            ValueError,
            r"`words` are \(500,\)",
        ),
        (lambda model, params: top_layers(model, 3), ValueError, "`count` is 3; .*between 1 and 2"),
        (lambda model, params: top_layers(model.clone(scan=True)), ValueError, "stacked layers"),
    ],
)
def test_refused(call, error, message):
    model = MODELS["gpt2"]
    params = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
    with pytest.raises(error, match=message):
        call(model, params)
