"""GPT-2 against itself: its cache, layouts, precision and dropout; and what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpt2_models import apply, random_params, SMALL_VOCABULARY, some_ids
from jaxprs import equations

from lora_jax.models import GPT2, GPT2Config, stack_layers, unstack_layers


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("scan", [False, True])
def test_decoding_with_a_cache_is_the_full_forward_pass(scan, side):
    model, params = random_params(SMALL_VOCABULARY)
    model, params = model.clone(scan=scan), stack_layers(params) if scan else params
    ids = some_ids((2, 10))
    mask = np.ones((2, 10), np.int32)
    mask[0, slice(0, 3) if side == "left" else slice(2, 5)] = 0  # of a prompt of five tokens
    expected = apply(model, params, ids, mask, np.maximum(mask.cumsum(-1) - 1, 0))

    step = jax.jit(functools.partial(model.apply, {"params": params}))
    logits, cache = step(ids[:, :5], mask[:, :5], cache=model.init_cache(2, 10))
    parts = [logits]
    for t in range(5, 10):
        logits, cache = step(ids[:, t : t + 1], cache=cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, 1)[mask == 1], expected[mask == 1], atol=1e-5, rtol=0)
    assert step._cache_size() == 2  # the prompt and the step, each compiled once
    assert cache.length == 10

    logits, _ = step(ids[:, :1], cache=cache)
    assert jnp.isnan(logits).all()  # no slot is left, which `jit` cannot raise


@pytest.mark.parametrize("scan", [False, True])
def test_alternatives_share_the_slots_of_a_row(scan):
    """Three beams of two prompts, two tokens each, the second token's parents out of order: every one is
    a sequence of its own.
    """
    model, params = random_params(SMALL_VOCABULARY)
    model, params = model.clone(scan=scan), stack_layers(params) if scan else params
    ids, mask = some_ids((2, 5)), np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    first, second, parents = some_ids((2, 3)), some_ids((2, 3))[:, ::-1], np.array([[2, 0, 2], [1, 1, 0]])
    _, cache = apply(model, params, ids, mask, cache=model.init_cache(2, 5))
    cache = cache.extended(6)
    np.testing.assert_array_equal(cache.mask, np.pad(mask, [(0, 0), (0, 6)]) == 1)
    visible, own = np.zeros((2, 3, 11), bool), np.eye(3, dtype=bool)[None]
    visible[..., :5] = True  # the padding among them, which the cache's own mask hides
    visible[..., 5:8] = own
    positions = np.broadcast_to(mask.sum(-1, keepdims=True), (2, 3))
    _, cache = apply(model, params, first, position_ids=positions, cache=cache, visible=visible)
    visible = np.take_along_axis(visible, parents[..., None], axis=1)
    visible[..., 8:] = own
    logits, cache = apply(model, params, second, position_ids=positions + 1, cache=cache, visible=visible)
    assert cache.length == 11
    whole, lengths = np.zeros((6, 7), np.int32), []
    for number, (row, beam) in enumerate(np.ndindex(2, 3)):
        sequence = [*ids[row, mask[row] == 1], first[row, parents[row, beam]], second[row, beam]]
        whole[number, : len(sequence)] = sequence
        lengths.append(len(sequence))
    expected = apply(model, params, whole)[np.arange(6), np.array(lengths) - 1]
    np.testing.assert_allclose(logits.reshape(6, -1), expected, atol=1e-5, rtol=0)


def test_last_only_is_the_last_column():
    model, params = random_params(SMALL_VOCABULARY)
    ids = some_ids((2, 5))
    whole = apply(model, params, ids)
    np.testing.assert_allclose(apply(model, params, ids, last_only=True), whole[:, -1:], atol=1e-6, rtol=0)


COLUMNS = np.array([[3, 0, 3], [-1, 1, -5]], np.int32)  # in any order, twice, from the end


@pytest.mark.parametrize("scan", [False, True])
def test_logits_of_some_columns_are_those_of_all(scan):
    """Forwards and backwards, where the head's gradient has a column of zeros for each that was not asked
    for.
    """
    model, params = random_params(SMALL_VOCABULARY)
    model, params = model.clone(scan=scan), stack_layers(params) if scan else params
    ids, mask = some_ids((2, 5)), np.array([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    weights = np.random.default_rng(5).normal(size=(2, 3, 101)).astype(np.float32)

    def loss(params, cut):
        if cut:
            logits = model.apply({"params": params}, ids, mask, logits_at=COLUMNS)
        else:
            logits = model.apply({"params": params}, ids, mask)[np.arange(2)[:, None], COLUMNS]
        return jnp.sum(weights * jnp.sin(logits)), logits

    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    (found, logits), (expected, whole) = gradient(params, True), gradient(params, False)
    assert logits.shape == (2, 3, 101)
    np.testing.assert_allclose(logits, whole, atol=1e-6, rtol=0)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, atol=2e-5, rtol=1e-5), found, expected)


def test_logits_of_some_columns_with_a_cache():
    """Of the columns of this call: of prompts padded on the right, those of the last token of each."""
    model, params = random_params(SMALL_VOCABULARY)
    ids, mask = some_ids((2, 5)), np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    whole, expected = apply(model, params, ids, mask, cache=model.init_cache(2, 6))
    last = mask.sum(-1, keepdims=True) - 1
    logits, cache = apply(model, params, ids, mask, cache=model.init_cache(2, 6), logits_at=last)
    np.testing.assert_allclose(logits[:, 0], whole[np.arange(2), last[:, 0]], atol=1e-6, rtol=0)
    jax.tree.map(np.testing.assert_array_equal, cache, expected)


def test_a_column_that_does_not_exist_gives_nan():
    model, params = random_params(SMALL_VOCABULARY)
    logits = apply(model, params, some_ids((2, 5)), logits_at=np.array([[4, 5], [-6, -5]]))
    np.testing.assert_array_equal(np.isnan(logits).all(-1), [[False, True], [True, False]])
    assert np.isnan(logits).any(-1).sum() == 2


def test_some_columns_cost_what_they_are():
    """No array of the size of all logits, forwards or backwards."""
    model, params = random_params(SMALL_VOCABULARY)
    ids, at = some_ids((2, 30)), np.zeros((2, 3), int)

    def loss(params, **options):
        return jnp.sum(jnp.sin(model.apply({"params": params}, ids, **options)))

    def widest(**options):
        found = equations(jax.make_jaxpr(jax.grad(functools.partial(loss, **options)))(params).jaxpr)
        return max(v.aval.size for e in found for v in e.outvars if v.aval.shape[-1:] == (101,))

    assert widest() == 2 * 30 * 101
    assert widest(logits_at=at) == 2 * 3 * 101


@pytest.mark.parametrize(
    "name, expected, scan",
    [
        ("gpt2", 124_439_808, False),  # each layer is traced
        ("gpt2", 124_439_808, True),
        ("gpt2-medium", 354_823_168, True),
        ("gpt2-large", 774_030_080, True),
        ("gpt2-xl", 1_557_611_200, True),
    ],
)
def test_published_sizes(name, expected, scan):
    model = GPT2(GPT2Config.named(name), scan=scan)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected


def traced(model, ids=None):
    ids = some_ids((2, 5)) if ids is None else ids
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)
    return list(equations(jax.make_jaxpr(model.apply)(shapes, ids).jaxpr))


def test_scan_traces_one_layer_whatever_the_depth():
    counts = {
        scan: [len(traced(GPT2(dataclasses.replace(SMALL_VOCABULARY, n_layer=n), scan=scan))) for n in (2, 6)]
        for scan in (False, True)
    }
    assert counts[True][0] == counts[True][1]
    assert counts[False][0] < counts[False][1]


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_checkpoint_wraps_each_layer(scan, checkpoint):
    """Parts of a layer are computed again in any case; a layer that is wrapped holds them."""
    is_wrapped = lambda equation: str(equation.primitive) in ("checkpoint", "remat", "remat2")
    found = filter(is_wrapped, traced(GPT2(SMALL_VOCABULARY, scan=scan, checkpoint=checkpoint)))
    wrapped = [e for e in found if any(map(is_wrapped, equations(e.params["jaxpr"])))]
    assert len(wrapped) == ((1 if scan else SMALL_VOCABULARY.n_layer) if checkpoint else 0)
    # Under `scan` the loop keeps the recomputation apart, and elsewhere this does.
    assert all(equation.params["prevent_cse"] == (not scan) for equation in wrapped)


@pytest.mark.parametrize("policy", ["parameters", "computation"])
def test_bfloat16_accumulates_in_float32(policy):
    model, params = random_params(SMALL_VOCABULARY)
    ids = some_ids((2, 9))
    expected = apply(model, params, ids)
    model = model.clone(dtype=jnp.bfloat16 if policy == "computation" else None)
    if policy == "parameters":
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    logits = apply(model, params, ids)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=0.1, rtol=0)
    assert not np.allclose(logits, expected, atol=1e-4)  # it did run in bfloat16
    found = list(equations(jax.make_jaxpr(model.apply)({"params": params}, ids).jaxpr))
    for name in ("exp", "rsqrt"):  # of the softmax, of the layer norm
        dtypes = {e.outvars[0].aval.dtype for e in found if str(e.primitive) == name}
        assert dtypes == {jnp.dtype("float32")}, name
    products = [e.invars[0].aval.dtype for e in found if str(e.primitive) == "dot_general"]
    assert set(products) == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("scan", [False, True])
def test_dropout_is_drawn_from_its_key_and_off_by_default(scan):
    model, params = random_params(SMALL_VOCABULARY)
    model, params = model.clone(scan=scan), stack_layers(params) if scan else params
    ids = some_ids((2, 9))

    def runs(**rates):
        config = dataclasses.replace(
            SMALL_VOCABULARY, **{"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, **rates}
        )
        train = jax.jit(functools.partial(model.clone(config=config).apply, deterministic=False))
        return [train({"params": params}, ids, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 0, 1)]

    plain = apply(model, params, ids)
    np.testing.assert_allclose(runs()[0], plain, atol=1e-5, rtol=0)
    for rate in ["attn_pdrop"] if scan else ["embd_pdrop", "attn_pdrop", "resid_pdrop"]:
        first, again, other = runs(**{rate: 0.3})
        np.testing.assert_array_equal(first, again)
        assert abs(first - plain).max() > 1e-3 and abs(first - other).max() > 1e-3, rate
    with pytest.raises(Exception, match="dropout"):
        apply(model, params, ids, deterministic=False)


def test_attention_written_out_for_dropout_is_the_fused_one():
    model, params = random_params(SMALL_VOCABULARY)
    ids, mask = some_ids((2, 9)), np.array([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    # So small a rate drops nothing, but it is not zero, and so takes the other path.
    config = dataclasses.replace(SMALL_VOCABULARY, embd_pdrop=0.0, attn_pdrop=1e-9, resid_pdrop=0.0)
    rngs = {"dropout": jax.random.key(0)}
    logits = apply(model.clone(config=config), params, ids, mask, deterministic=False, rngs=rngs)
    np.testing.assert_allclose(logits, apply(model, params, ids, mask), atol=1e-5, rtol=0)


def test_layouts_are_each_others_inverse():
    config = dataclasses.replace(SMALL_VOCABULARY, n_layer=12)  # twelve, because "10" sorts before "2"
    model, params = random_params(config)
    stacked = stack_layers(params)
    expected = jax.eval_shape(model.clone(scan=True).init, jax.random.key(0), some_ids((1, 1)))["params"]
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, expected)
    np.testing.assert_array_equal(
        stacked["h"]["mlp"]["c_fc"]["kernel"][10], params["h"]["10"]["mlp"]["c_fc"]["kernel"]
    )
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacked), params)

    with pytest.raises(ValueError, match="stacked already"):
        stack_layers(stacked)
    with pytest.raises(ValueError, match="unstacked already"):
        unstack_layers(params)
    with pytest.raises(ValueError, match="no 'encoder'.*'h'"):
        stack_layers(params, at="encoder/layer")
    assert isinstance(stack_layers(jax.tree.map(np.asarray, params))["h"]["ln_1"]["scale"], np.ndarray)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        (dict(add_cross_attention=True), ValueError, "`add_cross_attention` is True"),
        (dict(is_encoder_decoder=True), ValueError, "`is_encoder_decoder` is True"),
        (dict(quantization_config={"bits": 4}), ValueError, "`quantization_config`"),
        (dict(rotary=True), ValueError, "`rotary` is True"),
        (dict(activation_function="mish"), ValueError, "`activation_function` is 'mish'.*'gelu_new'"),
        (dict(n_layer="12"), TypeError, "`n_layer` is '12'; it must be int"),
        (dict(n_layer=True), TypeError, "`n_layer` is True; it must be int"),
        (dict(n_embd=None), TypeError, "`n_embd` is None; it must be int"),
        (dict(scale_attn_weights=1), TypeError, "`scale_attn_weights` is 1; it must be bool"),
        (dict(n_head=0), ValueError, "`n_head` is 0; it must be positive"),
        (dict(n_head=5), ValueError, "`n_embd` is 768; it must be a multiple of `n_head`=5"),
        (dict(attn_pdrop=1.5), ValueError, "`attn_pdrop` is 1.5"),
    ],
    ids=str,
)
def test_configs_that_cannot_be_are_refused_by_name(settings, error, message):
    with pytest.raises(error, match=message):
        GPT2Config.from_hf(settings)


def test_configs_take_what_directories_hold():
    idle = dict(
        n_ctx=1024, task_specific_params={"text-generation": {}}, _name_or_path="x", add_cross_attention=False
    )
    assert GPT2Config.from_hf(
        {**idle, "n_layer": 24, "eos_token_id": [1, 2], "resid_pdrop": 0}
    ) == GPT2Config(n_layer=24, eos_token_id=(1, 2), resid_pdrop=0)
    config = GPT2Config.named("gpt2-xl", n_inner=17, eos_token_id=(3,))
    assert GPT2Config.from_hf(config.to_hf()) == config
    with pytest.raises(ValueError, match="'gpt3'.*'gpt2-xl'"):
        GPT2Config.named("gpt3")


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(input_ids=np.zeros((2, 33), int)), ValueError, "33 tokens.*`n_positions`=32"),
        (dict(input_ids=np.zeros(5, int)), TypeError, r"`input_ids`.*\(5,\)"),
        (dict(input_ids=np.zeros((2, 5), np.float32)), TypeError, "`input_ids`.*float32"),
        (dict(attention_mask=np.ones((2, 4), int)), ValueError, r"`attention_mask`.*\(2, 5\).*\(2, 4\)"),
        (dict(attention_mask=np.zeros((2, 5), np.float32)), TypeError, "not a bias"),
        (dict(position_ids=np.zeros((5,), int)), ValueError, r"`position_ids`.*\(5,\)"),
        (dict(cache=3), ValueError, "`cache` is for 3 rows and `input_ids` has 2"),
        (dict(logits_at=np.zeros((3, 2), int)), ValueError, r"`logits_at`.*batch of 2.*got \(3, 2\)"),
        (dict(logits_at=np.zeros(2, int)), ValueError, r"`logits_at`.*\(batch, columns\).*got \(2,\)"),
        (
            dict(logits_at=np.ones((2, 5), bool)),
            TypeError,
            "`logits_at` must be integers.*got bool: of a mask",
        ),
        (
            dict(logits_at=np.zeros((2, 1), int), last_only=True),
            ValueError,
            "`logits_at` and `last_only` both",
        ),
    ],
    ids=str,
)
def test_wrong_calls_say_what_was_passed(arguments, error, message):
    model, params = random_params(SMALL_VOCABULARY)
    arguments = {"input_ids": np.zeros((2, 5), np.int32), **arguments}
    if "cache" in arguments:
        arguments["cache"] = model.init_cache(arguments["cache"], 8)
    with pytest.raises(error, match=message):
        apply(model, params, **arguments)


def test_visible_goes_with_a_cache_and_positions():
    model, params = random_params(SMALL_VOCABULARY)
    ids, positions, visible = some_ids((2, 1)), np.zeros((2, 1), int), np.ones((2, 1, 8), bool)
    for arguments in ({"position_ids": positions}, {"cache": model.init_cache(2, 8)}):
        with pytest.raises(ValueError, match="`visible` goes with `cache` and `position_ids`"):
            apply(model, params, ids, visible=visible, **arguments)
    for wrong in (visible[..., :7], visible.astype(int)):
        with pytest.raises(ValueError, match=r"`visible` must be booleans of shape \(2, 1, 8\), got"):
            apply(model, params, ids, position_ids=positions, cache=model.init_cache(2, 8), visible=wrong)


def test_wrong_caches_are_refused():
    model, params = random_params(SMALL_VOCABULARY)
    with pytest.raises(ValueError, match="`slots` is 33.*`n_positions`=32"):
        model.init_cache(2, 33)
    with pytest.raises(TypeError, match="bfloat16.*float32.*dtype=jnp.float32"):
        apply(model, params, some_ids((2, 5)), cache=model.init_cache(2, 8, dtype=jnp.bfloat16))
    assert model.clone(dtype=jnp.bfloat16).init_cache(2, 8).layers[0][0].dtype == jnp.bfloat16
