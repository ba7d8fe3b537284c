"""`lorafy`: along which axes the factors lie, given or read off the function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shapes import adapters, QV, RANK_2, shape

import lora_jax
from lora_jax import Full, LoRA


# --- axes ---------------------------------------------------------------------------------------------------

X = shape(2, 6)


def heads(params, x):
    return jnp.einsum("hkd,bhk->bd", params["o"], jnp.einsum("bd,dhk->bhk", x, params["q"]))


HEADS = {"q": shape(6, 2, 4), "o": shape(2, 4, 6)}


def scanned(params, x):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]


def convolved(params, x):
    return jax.lax.conv_general_dilated(
        x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def tied(params, x):
    return params["w"][x] @ params["w"].T


@pytest.mark.parametrize(
    "params, fn, args, expected",
    [
        ({"w": shape(6, 4)}, lambda params, x: x @ params["w"], (X,), {"w": "in out"}),
        ({"w": shape(4, 6)}, lambda params, x: x @ params["w"].T, (X,), {"w": "out in"}),
        ({"w": shape(4, 6)}, lambda params, x: params["w"] @ x, (shape(6),), {"w": "out in"}),
        (HEADS, heads, (X,), {"q": "in out out", "o": "in in out"}),
        ({"w": shape(3, 6, 6)}, scanned, (X,), {"w": "layer in out"}),
        ({"w": shape(3, 3, 2, 4)}, convolved, (shape(1, 5, 5, 2),), {"w": "in in in out"}),
        (
            {"w": shape(8, 6)},
            lambda params, ids: params["w"][ids],
            (shape(3, dtype="int32"),),
            {"w": "in out"},
        ),
        (
            {"w": shape(8, 6)},
            tied,
            (shape(3, dtype="int32"),),
            {"w": "in out"},
        ),  # contradictory, but LoRA has no sides
        ({"w": shape(6, 4)}, lambda params, x, scale: x @ params["w"] * scale, (X, 2.0), {"w": "in out"}),
        (
            {"w": shape(6, 4, dtype="bfloat16")},
            lambda params, x: x @ params["w"].astype("float32"),
            (X,),
            {"w": "in out"},
        ),
    ],
)
def test_axes_read_off_the_function(params, fn, args, expected):
    delta = lora_jax.lorafy(params, ".*", method=RANK_2, fn=fn, args=args).delta
    assert {path: " ".join(adapter.spec.axes) for path, adapter in adapters(delta).items()} == expected


@pytest.mark.parametrize(
    "axes, expected",
    [
        ("in out out", {"q": "in out out", "o": "in out out"}),  # what the user says is taken at its word
        ({"q": "in out out", "o": "in in out"}, {"q": "in out out", "o": "in in out"}),
        (
            {"q": "in out out", ".*": "in in out"},
            {"q": "in out out", "o": "in in out"},
        ),  # the first match wins
    ],
)
def test_axes_given(axes, expected):
    delta = lora_jax.lorafy(HEADS, ".*", method=RANK_2, axes=axes).delta
    assert {path: " ".join(adapter.spec.axes) for path, adapter in adapters(delta).items()} == expected


def test_given_axes_win_over_those_read():
    delta = lora_jax.lorafy(
        {"w": shape(6, 4)}, "w", method=RANK_2, axes="out in", fn=lambda params, x: x @ params["w"], args=(X,)
    ).delta
    assert delta["w"].spec.axes == ("out", "in")


def test_axes_string_does_not_touch_leaves_that_train_themselves():
    delta = lora_jax.lorafy(
        {"w": shape(3, 6, 6), "b": shape(6)}, {"w": RANK_2, "b": Full()}, axes="layer in out"
    ).delta
    assert delta["w"].spec.axes == ("layer", "in", "out") and delta["b"].shape == (6,)


def looped(params, x):  # stacked in one use, one matrix of two in axes in the other
    return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0] + jnp.einsum(
        "bli,lij->bj", jnp.ones((2, 3, 6)), params["w"]
    )


@pytest.mark.parametrize(
    "params, options, message",
    [
        (
            HEADS,
            {},
            r"axes of 'o', of shape \(2, 4, 6\), are unknown.*Pass `axes=\{'o': '...'\}`.*each of its 3 "
            r"axes, or `fn=`",
        ),
        (
            HEADS,
            {"axes": "in out"},
            r"`axes` for 'o' is 'in out', 2 words, but the leaf has shape \(2, 4, 6\)",
        ),
        (HEADS, {"axes": "in out heads"}, r"'heads' is not one of 'in', 'out', 'layer'"),
        (HEADS, {"axes": "layer out out"}, r"at least one 'in' and one 'out'"),
        (HEADS, {"axes": {"k": "in out out"}}, r"`axes` pattern 'k' matches no leaf. The nearest paths are"),
        (
            {"w": shape(6)},
            {},
            r"'w', of shape \(6,\): fewer than two axes have no low-rank form.*`targets=\{'w': Full\(\)",
        ),
        (
            {"w": shape(6, 6)},
            {"fn": lambda params, x: x + params["w"][:1], "args": (X,)},
            r"axes of 'w'.*cannot be read off `fn`, which does not contract with it as",
        ),
        (
            {"w": shape(6, 6)},
            {"fn": lambda params, x: x, "args": (X,)},
            r"'w', of shape \(6, 6\), but `fn` never contracts with it: `fn` does not use it.*`Full\(\)`",
        ),
        (
            {"w": shape(6, 6)},
            {"fn": lambda params, x: x @ (params["w"] * jnp.tri(6)), "args": (X,)},
            r"'w', of shape \(6, 6\), but `fn` never contracts with it: it goes into `mul` at "
            r".*test_lorafy_axes.py.*what is contracted later is another array",
        ),
        (
            {"w": shape(2, 6)},
            {"fn": lambda params, x: x + params["w"], "args": (X,)},
            r"'w', of shape \(2, 6\), but `fn` never contracts",
        ),
        (
            {"w": shape(2, 6)},
            {"fn": lambda params, x: x + params["w"], "args": (X,), "axes": "in out"},
            r"`fn` never contracts",
        ),
        (
            {"w": shape(3, 6, 6)},
            {"fn": looped, "args": (X,)},
            r"`fn` uses 'w', of shape \(3, 6, 6\), in contradictory ways",
        ),
        (
            {"w": shape(8, 6)},
            {"fn": tied, "args": (shape(3, dtype="int32"),), "method": LoRA(rank=2, blocks=(True, False))},
            r"`fn` uses 'w'.*in contradictory ways",
        ),
        (
            {"w": shape(6, 4)},
            {"method": LoRA(rank=5)},
            r"`rank` is 5, above min\(in, out\) = 4 of 'w', of shape \(6, 4\) with axes 'in out'",
        ),
        ({"w": shape(9, 6, 4)}, {"method": LoRA(rank=5), "axes": "layer in out"}, r"min\(in, out\) = 4"),
        ({"w": shape(6, 2, 4)}, {"method": LoRA(rank=7), "axes": "in out out"}, r"min\(in, out\) = 6"),
        ({"w": shape(6, 12)}, {"method": LoRA(rank=5, blocks=QV)}, r"min\(in, out\) = 4"),
        (
            {"w": shape(6, 10)},
            {"method": LoRA(rank=2, blocks=QV)},
            r"3 entries, which do not divide the out axis of 'w', of size 10",
        ),
        (
            {"w": shape(6, 3, 4)},
            {"method": LoRA(rank=2, blocks=QV), "axes": "in out out"},
            r"exactly one out axis, and 'w' has the axes 'in out out'",
        ),
    ],
)
def test_axes_errors(params, options, message):
    options = {"method": RANK_2, **options}
    with pytest.raises(ValueError, match=message):
        lora_jax.lorafy(params, ".*", **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "`rank` is 0"),
        ({"rank": 2.0}, "`rank` is 2.0"),
        ({"rank": True}, "`rank` is True"),
        ({"dropout": 1.0}, "`dropout` is 1.0"),
        ({"dropout": -0.1}, "`dropout` is -0.1"),
        ({"dropout": "0.1"}, "`dropout` is '0.1'; it must be a number"),
        ({"alpha": float("nan")}, "`alpha` is nan"),
        ({"alpha": "16"}, "`alpha` is '16'; it must be a number"),
        ({"init": "normal"}, "`init` is 'normal'"),
        ({"dtype": "int32"}, "`dtype` is 'int32'"),
        ({"blocks": (False, False)}, "it adapts nothing"),
        ({"blocks": 3}, "`blocks` is 3"),
    ],
)
def test_wrong_methods(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        LoRA(**options)


# --- all-linear ---------------------------------------------------------------------------------------------


def model(params, ids, x):
    h = params["table"][ids] + params["positions"] + x * params["scale"][None]
    h = jnp.tanh(h @ params["kernel"] + params["bias"][None])
    h = heads(params["attn"], h)
    return h @ params["tied"].T + params["tied"][ids].sum()


LINEAR = {
    "table": shape(8, 6),
    "positions": shape(3, 6),  # as large as a matrix, only added
    "scale": shape(6),
    "kernel": shape(6, 6),
    "bias": shape(6),
    "attn": HEADS,
    "tied": shape(8, 6),
    "counter": shape(4, 4, dtype="int32"),
}
LINEAR_ARGS = (shape(3, dtype="int32"), shape(3, 6))


@pytest.mark.parametrize(
    "targets, expected",
    [
        ("all-linear", ["attn/o", "attn/q", "kernel"]),
        (
            ["all-linear", "tied"],
            ["attn/o", "attn/q", "kernel", "tied"],
        ),  # tied to a lookup: only where it is named
        ({"all-linear": RANK_2, "table": LoRA(rank=3)}, ["attn/o", "attn/q", "kernel", "table"]),
    ],
)
def test_all_linear(targets, expected):
    delta = lora_jax.lorafy(LINEAR, targets, method=RANK_2, fn=model, args=LINEAR_ARGS).delta
    assert sorted(adapters(delta)) == expected


def test_all_linear_beside_full():
    delta = lora_jax.lorafy(
        LINEAR, {"all-linear": RANK_2, "bias|scale": Full()}, fn=model, args=LINEAR_ARGS
    ).delta
    assert delta["bias"] == LINEAR["bias"] and delta["scale"] == LINEAR["scale"] and delta["table"] is None


def test_all_linear_of_nothing():
    with pytest.raises(ValueError, match="'all-linear', but `fn` contracts with no floating-point leaf"):
        lora_jax.lorafy(LINEAR, "all-linear", fn=lambda params, x: x, args=(X,))


# --- members and heads --------------------------------------------------------------------------------------

MEMBERS = {
    "vmap of the weight": lambda params, x: jax.vmap(lambda w: x @ w)(params["w"]),
    "vmap of both": lambda params, x: jax.vmap(lambda w, x: x @ w)(params["w"], jnp.stack([x, x, x])),
    "experts": lambda params, x: jnp.einsum("bi,eio->beo", x, params["w"]),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_members_of_an_ensemble_have_an_adapter_each(name):
    """A step on the loss of one member must not move another. Where the function cannot tell members from
    heads, the error names both.
    """
    fn, params, x = MEMBERS[name], {"w": jnp.ones((3, 6, 4))}, jnp.ones((2, 6))
    axes = None
    if name != "vmap of both":  # which contracts member by member
        with pytest.raises(ValueError, match=r"axes.*'w'.*\[0\].*'layer in out'.*heads.*'out in out'"):
            lora_jax.lorafy(params, "all-linear", method=LoRA(rank=2), fn=fn, args=(x,))
        axes = "layer in out"
    frozen, delta = lora_jax.lorafy(params, "all-linear", method=LoRA(rank=2), axes=axes, fn=fn, args=(x,))
    assert delta["w"].arrays["a"].shape == (3, 6, 2)
    delta["w"].arrays["b"] = jnp.ones((3, 2, 4))
    forward, of_member = lora_jax.adapt(fn), (slice(None), 1) if name == "experts" else 1

    def loss(delta):
        return jnp.sum(forward(lora_jax.combine(frozen, delta), x)[of_member] ** 2)

    for gradient in jax.grad(loss)(delta)["w"].arrays.values():
        assert np.any(gradient[1]) and not np.any(gradient[0]) and not np.any(gradient[2])


def test_heads_before_the_in_axis_are_one_matrix_if_the_user_says_so():
    fn = lambda params, x: jnp.einsum("bi,hid->bhd", x, params["w"])
    params, x = {"w": jnp.ones((3, 6, 4))}, jnp.ones((2, 6))
    delta = lora_jax.lorafy(params, "w", method=LoRA(rank=2), axes="out in out", fn=fn, args=(x,)).delta
    assert delta["w"].arrays["a"].shape == (6, 2)


LOOKUPS = {
    "one row": (lambda params, i: params["w"][i], jnp.array(3)),
    "rows": (lambda params, i: params["w"][i], jnp.arange(3)),
    "vmap of one row": (lambda params, i: jax.vmap(lambda i: params["w"][i])(i), jnp.arange(3)),
    "take": (lambda params, i: jnp.take(params["w"], i, axis=0), jnp.arange(3)),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_a_table_is_read_off_its_lookups(name):
    """As Equinox and Flax look rows up: one at a time, under `vmap`, or many."""
    (fn, ids), params = LOOKUPS[name], {"w": jnp.eye(16, 8)}
    frozen, delta = lora_jax.lorafy(params, "w", method=LoRA(rank=2), fn=fn, args=(ids,))
    assert " ".join(delta["w"].spec.axes) == "in out"
    delta = jax.tree.map(lambda array: array + 0.1, delta)
    found = lora_jax.adapt(fn)(lora_jax.combine(frozen, delta), ids)
    np.testing.assert_allclose(found, fn(lora_jax.merge(frozen, delta), ids), rtol=1e-5)
