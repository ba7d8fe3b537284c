"""Every method in a use of its own kind, with dropout, and with what does not belong to it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from method_columns import close, weight_of
from method_rows import APART, by_matrix, BY_NAME, moved, quickly

import lora_jax
from lora_jax import AdaLoRA, DeltaLoRA, DoRA, DyLoRA, LoRA, LoRAFA, PiSSA, VeRA
from lora_jax._tree.nodes import Fixed


def _conv(w, x):
    return jnp.tanh(
        lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    )


def _indexed(w, x):
    """Layers picked from a stack: by number, by a traced number, and two at once."""
    x = jnp.tanh(x @ w[2]) @ w[jnp.asarray(x[0, 0] > 1e9, int)]
    return jnp.einsum("td,ldk->ltk", x, w[jnp.array([1, 0])])


def _tied(w, x):
    """An embedding that is the head as well."""
    return jnp.tanh(w[jnp.array([[3, 1], [0, 7]])] * x) @ w.T


UNUSUAL = {
    "conv": ((3, 3, 2, 4), "in in in out", (1, 5, 4, 2), _conv),
    "indexed": ((3, 5, 5), "layer in out", (2, 5), _indexed),
    "tied": ((8, 5), "in out", (2, 2, 5), _tied),
}


def single(name, shape, axes, **options):
    """One weight in float64 with the method of this row, moved: its two trees, and W' by the equation."""
    row = BY_NAME[name]
    own = row.qkv if row.qkv and axes == "in out" and shape[1] % 3 == 0 else row
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=shape))}
    frozen, start = lora_jax.lorafy(params, "w", method=dataclasses.replace(own.method, **options), axes=axes)
    frozen = row.begin(frozen, start)

    def equation(delta):
        fixed = frozen["w"].arrays if isinstance(frozen["w"], Fixed) else {}
        return {"w": by_matrix(own, params["w"], tuple(axes.split()), delta["w"].arrays | fixed)}

    return params, frozen, start, equation


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize("use", UNUSUAL)
def test_unusual_uses(name, use, x64):
    """Value and gradient, with respect to the input too, are those of the equation, and no weight is
    formed.
    """
    shape, axes, x_shape, function = UNUSUAL[use]
    params, frozen, start, equation = single(name, shape, axes)
    x = jnp.asarray(np.random.default_rng(1).normal(size=x_shape))
    forward = lora_jax.adapt(lambda params, x: function(params["w"], x))

    def differentiated(outputs):
        value = lambda delta, x: (jnp.sum(outputs(delta, x) ** 2), outputs(delta, x))
        return jax.grad(value, (0, 1), has_aux=True)

    of_adapted = differentiated(lambda delta, x: forward(lora_jax.combine(frozen, delta), x))
    of_equation = differentiated(lambda delta, x: function(equation(delta)["w"], x))
    delta = moved(start)
    close(*quickly(lambda delta, x: (of_adapted(delta, x), of_equation(delta, x)))(delta, x), 1e-11)
    assert not lora_jax.explain(
        lambda params, x: function(params["w"], x), lora_jax.combine(frozen, delta), x
    ).formed


def test_a_tied_embedding_has_to_have_its_axes_named():
    """Methods for which in and out are not alike do not guess which of its two uses counts."""
    shapes, x = {"w": jax.ShapeDtypeStruct((8, 5), "float32")}, jax.ShapeDtypeStruct((2, 2, 5), "float32")
    read = lambda method: lora_jax.lorafy(
        shapes, "w", method=method, fn=lambda params, x: _tied(params["w"], x), args=(x,)
    )
    for method in (LoRA(rank=2), AdaLoRA(rank=2), PiSSA(rank=2), DeltaLoRA(rank=2), DyLoRA(rank=2)):
        assert read(method).delta["w"].spec.axes == ("in", "out")
    for method in (DoRA(rank=2), VeRA(rank=2), LoRAFA(rank=2)):
        with pytest.raises(
            ValueError, match=r"uses 'w', of shape \(8, 5\), in contradictory ways.*Pass `axes="
        ):
            read(method)


def test_a_gradient_inside_that_keeps_a_view_of_each_layer_is_refused():
    """The derivative of a scan hands the transposed layers on from the forward to the backward loop, as
    an output.
    """
    frozen, delta = lora_jax.lorafy({"w": jnp.ones((3, 4, 4))}, "w", method=LoRA(rank=2), axes="layer out in")
    looped = lambda params, x: lax.scan(lambda x, w: (jnp.tanh(x @ w.T), None), x, params["w"])[0]
    inside = lora_jax.adapt(jax.grad(lambda x, params: jnp.sum(looped(params, x))))
    with pytest.raises(lora_jax.MaterializeError, match="`scan`.*'w'"):
        inside(jnp.ones((2, 4)), lora_jax.combine(frozen, delta))
    jax.grad(lambda x: jnp.sum(lora_jax.adapt(looped)(lora_jax.combine(frozen, delta), x)))(
        jnp.ones((2, 4))
    )  # around: fine


DROPPED = [
    name for name in APART if "dropout" in {field.name for field in dataclasses.fields(BY_NAME[name].method)}
]


@pytest.mark.parametrize("name", DROPPED)
def test_dropout(name):
    """Without a key none; with keys, the mean is the output without; at the start there is nothing to
    drop; lookups are not dropped.
    """
    rate, keys = {"dropout": 0.5}, jax.random.split(jax.random.key(0), 4000)
    frozen, start, equation = single(name, (6, 6), "in out", **rate)[1:]
    delta = moved(start, 0.5)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 6)), "float32")
    forward = lora_jax.adapt(lambda params, x: (x @ params["w"], params["w"][jnp.array([4, 0])]))

    @quickly
    def outputs(delta, frozen, x):  # all are arguments, so that XLA folds none of them
        dropped = jax.vmap(lambda key: forward(lora_jax.combine(frozen, delta, key=key), x))(keys)
        return dropped, forward(lora_jax.combine(frozen, delta), x), x @ weight_of(frozen["w"])

    (dropped, rows), (plain, row), _ = outputs(delta, frozen, x)
    weight = equation(delta)["w"]
    close((plain, row), (x @ weight, weight[jnp.array([4, 0])]), 1e-5)
    if name == "DyLoRA":  # the keys draw the rank too
        a, b = delta["w"].arrays["a"], delta["w"].arrays["b"]
        plain = jnp.mean(
            jnp.stack([x @ (frozen["w"] + 3 / rank * a[:, :rank] @ b[:rank]) for rank in (1, 2)]), 0
        )
    else:
        np.testing.assert_array_equal(rows, jnp.broadcast_to(row, rows.shape))
    error = np.std(dropped, 0) / np.sqrt(len(keys))
    assert np.any(error > 1e-3) and np.all(np.abs(np.mean(dropped, 0) - plain) < 5 * error + 1e-6)
    (dropped, _), (plain, _), base = outputs(start, frozen, x)
    np.testing.assert_array_equal(plain, base)
    np.testing.assert_array_equal(dropped, jnp.broadcast_to(base, dropped.shape))


@pytest.mark.parametrize(
    "method",
    [DoRA(rank=2), VeRA(rank=4), LoRAFA(rank=2), PiSSA(rank=2), DeltaLoRA(rank=2)],
    ids=lambda method: type(method).__name__,
)
def test_what_does_not_belong_together_is_refused(method):
    """The parameters in place of `frozen`, a habit from LoRA, and the `frozen` of another method."""
    params = {"w": jnp.ones((8, 8))}
    frozen, delta = lora_jax.lorafy(params, "w", method=method)
    for call in (lora_jax.merge, lora_jax.combine, lora_jax.merge_report, lora_jax.arithmetic.as_lora):
        with pytest.raises(
            ValueError,
            match=f"do not belong together: the {type(method).__name__} adapter of 'w' needs .* in `frozen`",
        ):
            call(params, delta)
    other = lora_jax.lorafy(
        params, "w", method=PiSSA(rank=2) if isinstance(method, DeltaLoRA) else DeltaLoRA(rank=2)
    ).frozen
    with pytest.raises(ValueError, match="do not belong together"):
        lora_jax.merge(other, delta)
    if isinstance(method, VeRA):
        with pytest.raises(ValueError, match="do not belong together.*seed=1"):
            lora_jax.merge(lora_jax.lorafy(params, "w", method=VeRA(rank=4, seed=1)).frozen, delta)


@pytest.mark.parametrize("method", [DoRA(rank=2), VeRA(rank=4)], ids=lambda method: type(method).__name__)
def test_a_part_of_a_weight_is_refused(method):
    """Its norm, or its part of the projections, is not that of the whole."""
    frozen, delta = lora_jax.lorafy({"w": jnp.ones((8, 8))}, "w", method=method)
    part = jax.tree.map(lambda leaf: leaf[:4] if leaf.shape == (8, 8) else leaf, frozen)
    with pytest.raises(
        ValueError,
        match=r"needs the whole weight, of shape \(8, 8\), and has a part of it, \(4, 8\): a `shard_map`",
    ):
        lora_jax.adapt(lambda params, x: x @ params["w"])(lora_jax.combine(part, delta), jnp.ones((1, 4)))


def test_a_scale_is_not_rounded_to_few_bits():
    """In bfloat16, 1.01 would be 1.0078: the scale multiplies in float32, with the one rounding of the
    result.
    """
    params, x = {"w": jnp.zeros((64, 64), "bfloat16")}, np.random.default_rng(1).normal(size=(256, 64))
    outputs = []
    for alpha in (2, 2.02):
        frozen, delta = lora_jax.lorafy(params, "w", method=LoRA(rank=2, alpha=alpha))
        forward = quickly(lora_jax.adapt(lambda params, x: x @ params["w"]))
        y = forward(lora_jax.combine(frozen, moved(delta)), jnp.asarray(x, "bfloat16"))
        outputs.append(np.asarray(y, np.float64))
    base, found = outputs
    np.testing.assert_allclose(np.sum(found * base) / np.sum(base * base), 1.01, atol=5e-4)


FIXED = [name for name in APART if BY_NAME[name].fixed]


@pytest.mark.parametrize("name", FIXED)
def test_what_is_fixed_is_constant(name):
    """No array beside W in `frozen` has a derivative, whoever differentiates with respect to `frozen`; and
    W has that of the equation, which holds DoRA's norm constant for W too.
    """
    params, frozen, start, _ = single(name, (6, 4), "in out")
    forward = lora_jax.adapt(lambda params, x: jnp.tanh(x @ params["w"]))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 6)), "float32")

    def value(frozen, delta):
        return jnp.sum(jnp.square(forward(lora_jax.combine(frozen, delta), x)))

    delta = moved(start)
    arrays = delta["w"].arrays | frozen["w"].arrays
    literally = lambda w: jnp.sum(
        jnp.square(jnp.tanh(x @ by_matrix(BY_NAME[name], w, ("in", "out"), arrays)))
    )
    gradient = quickly(jax.grad(value))(frozen, delta)["w"]
    assert set(gradient.arrays) == set(BY_NAME[name].fixed)
    assert not any(map(np.any, gradient.arrays.values())), gradient.arrays
    close(gradient.weight, quickly(jax.grad(literally))(params["w"]), 1e-5)


def test_summary_of_what_is_at_hand(capsys):
    """Of `frozen` too, where the parameters are gone."""
    params = {"w": jnp.ones((64, 64)), "b": jnp.ones(64)}
    frozen, delta = lora_jax.lorafy(params, "w", method=DoRA(rank=2))
    for tree in (params, frozen, lora_jax.quantize(frozen, "nf4")):
        print(lora_jax.summary(tree, delta))
    first, second, third = capsys.readouterr().out.split("leaf ")[1:]
    assert first == second == third and "of 4,160 parameters" in first
