"""The commonest mistakes of a first hour: each error says what happened, and the line to write."""

import copy
import pickle

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from lora_jax import AdaLoRA, Full, LoRA


X = jnp.ones((2, 8))
PARAMS = {"layer": {"w": jnp.ones((8, 8))}, "head": jnp.ones((8, 5))}


def model(params, x):
    return x @ params["layer"]["w"] @ params["head"]


FROZEN, DELTA = lora_jax.lorafy(PARAMS, "w", method=LoRA(rank=2))
TREE = lora_jax.combine(FROZEN, DELTA)
WEIGHT = TREE["layer"]["w"]


@pytest.mark.parametrize(
    "use",
    [
        lambda: model(TREE, X),
        lambda: jax.jit(model)(TREE, X),
        lambda: jnp.dot(X, WEIGHT),
        lambda: jnp.einsum("bi,io->bo", X, WEIGHT),
        lambda: WEIGHT @ X.T,
        lambda: WEIGHT[0],
        lambda: 2 * WEIGHT,
        lambda: WEIGHT + 1,
        lambda: WEIGHT.T,
        lambda: WEIGHT.astype("bfloat16"),
    ],
)
def test_plain_code_that_meets_an_adapted_weight(use):
    with pytest.raises(
        (TypeError, AttributeError), match=r"'layer/w' is an adapted weight.*lora_jax.adapt\(fn\)"
    ):
        use()


def test_an_adapted_weight_is_copied_and_pickled_and_has_no_other_attributes():
    for other in (copy.deepcopy(TREE), pickle.loads(pickle.dumps(TREE))):
        assert jnp.all(lora_jax.adapt(model)(other, X) == lora_jax.adapt(model)(TREE, X))
    with pytest.raises(AttributeError, match="has no attribute 'widht'"):
        WEIGHT.widht  # noqa: B018


def test_a_delta_alone():
    with pytest.raises(TypeError, match=r"a `delta` alone.*'layer/w'.*Pass `combine\(frozen, delta\)`"):
        lora_jax.adapt(model)(DELTA, X)


@pytest.mark.parametrize(
    "tree, message",
    [(TREE, r"a combined tree.*`merge\(\*partition\(tree\)\)`"), (FROZEN, r"`merge\(frozen, delta\)`")],
)
def test_merging_one_tree(tree, message):
    with pytest.raises(TypeError, match=rf"`delta` is missing.*{message}"):
        lora_jax.merge(tree)


def test_a_function_without_its_arguments():
    with pytest.raises(TypeError, match=r"`fn` is given without `args`.*argument: 'x'.*`args=\(x,\)`"):
        lora_jax.lorafy(PARAMS, "all-linear", fn=model)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: LoRA(r=8), r"`r` is PEFT's word for `rank`: write `LoRA\(rank=...\)`"),
        (
            lambda: AdaLoRA(lora_alpha=8),
            r"`lora_alpha` is PEFT's word for `alpha`: write `AdaLoRA\(alpha=...\)`",
        ),
        (lambda: LoRA(target_modules=["q"]), r"`target_modules` is PEFT's.*targets=.pattern: LoRA"),
        (lambda: lora_jax.get_peft_model, r"`get_peft_model` is PEFT's.*lorafy\(params, targets=...\)"),
        (lambda: lora_jax.LoraConfig, r"`LoraConfig` is PEFT's.*`LoRA\(rank=..., alpha=...\)`"),
    ],
)
def test_words_of_peft(call, message):
    with pytest.raises((TypeError, AttributeError), match=message):
        call()


def test_a_head_too_narrow_for_the_rank():
    """The error of "all-linear" offers the mapping, and the mapping works."""
    with pytest.raises(ValueError, match=r"min\(in, out\) = 5 of 'head'.*`targets={'head': Full\(\), ...}`"):
        lora_jax.lorafy(PARAMS, "all-linear", method=LoRA(rank=8), fn=model, args=(X,))
    targets = {"head": Full(), "all-linear": LoRA(rank=8)}
    delta = lora_jax.lorafy(PARAMS, targets, fn=model, args=(X,)).delta
    assert isinstance(delta["layer"]["w"], lora_jax.Adapter) and delta["head"].shape == (8, 5)


def test_gradients_beside_float16_are_summed_in_float32():
    """Inputs of 300 and a scale of 64 sum to millions, and float16 ends at 65,504. PEFT computes in
    float32.
    """
    params, x = {"w": jnp.zeros((64, 32), "float16")}, jnp.full((128, 64), 300.0, "float16")
    frozen, delta = lora_jax.lorafy(params, "w", method=LoRA(rank=4, alpha=256))
    forward = lora_jax.adapt(lambda params, x: x @ params["w"])

    def loss(delta):
        return jnp.sum(forward(lora_jax.combine(frozen, delta), x).astype("float32"))

    found = jax.grad(loss)(delta)["w"].arrays["b"]
    expected = 64 * jnp.sum(x.astype("float32") @ delta["w"].arrays["a"], axis=0)
    assert jnp.max(jnp.abs(expected)) > 65_504
    assert jnp.allclose(found, expected[:, None], rtol=2e-3)
