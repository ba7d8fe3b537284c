"""Every use of a weight, also of one with a magnitude, against the formed weight in float64."""

import dataclasses
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from against_merged import adapted, assert_equal_to_merged, contracted, cosines, traced_index
from jax import lax
from jaxprs import equations

import lora_jax
from lora_jax import LoRA
from lora_jax._lowrank.factored import Canonical, Term
from lora_jax._tree.method import Method
from lora_jax._tree.nodes import Adapter


# --- uses ---------------------------------------------------------------------------------------------------

_I = np.array
LOOKUPS = {
    "scalar": lambda w: w[traced_index(3)],
    "negative scalar": lambda w: w[traced_index(-2)],
    "1-D": lambda w: w[_I([3, 0, 3])],
    "2-D": lambda w: w[_I([[3, -1], [0, 10]])],
    "fill": lambda w: jnp.nan_to_num(w.at[_I([3, 20, -20])].get(mode="fill"), nan=2.0),
    "fill value": lambda w: w.at[_I([3, 20])].get(mode="fill", fill_value=7.0),
    "clip": lambda w: w.at[_I([3, 20])].get(mode="clip"),
    "drop": lambda w: jnp.nan_to_num(w.at[_I([3, 20])].get(mode="drop"), nan=3.0),
    "promised": lambda w: w.at[_I([3, 4])].get(
        mode="promise_in_bounds", indices_are_sorted=True, unique_indices=True
    ),
    "columns": lambda w: jnp.take(w, _I([3, 0, 3]), axis=1)[2],
    "elements": lambda w: w[_I([3, 0]), _I([1, 4])],
    "mapped indices": lambda w: jax.vmap(lambda index: w[index])(_I([3, 0])),
    "one row of each column": lambda w: jnp.take_along_axis(w, _I([[3, 0, 2, 9, 10]]), axis=0),
}
PICKS = {  # of a stack of matrices, which stay matrices
    "scalar": lambda w: contracted(w[traced_index(2)], "io"),
    "negative": lambda w: contracted(w[traced_index(-1)], "io"),
    "1-D": lambda w: contracted(w[_I([2, 0])], "lio"),
    "2-D": lambda w: jnp.einsum("abi,abio->abo", cosines(2, 2, 6), w[_I([[2, 0], [1, 1]])]),
    "clip": lambda w: contracted(w.at[_I([5, 0])].get(mode="clip"), "lio"),
    "fill": lambda w: contracted(w.at[_I([5, 0])].get(mode="fill", fill_value=3.0), "lio"),
    "mapped": lambda w: jax.vmap(lambda index, x: x @ w[index])(_I([2, 0]), cosines(2, 6)),
    "mapped operand": lambda w: jax.vmap(lambda layer, index: layer[index])(w, _I([2, 0, 4])),
    "tree": lambda w: contracted(jax.tree.map(lambda leaf: leaf[1], {"w": w})["w"], "io"),
}


def test_lookups(x64):
    frozen, delta = adapted({"w": cosines(11, 5)}, "w", method=LoRA(rank=2), axes="in out")
    cases = [(lambda params, use=use: use(params["w"]), frozen, delta) for use in LOOKUPS.values()]
    for (name, _), case in zip(LOOKUPS.items(), cases, strict=True):
        assert [use.how for use in lora_jax.explain(case[0], lora_jax.combine(frozen, delta)).uses] == [
            "lookup"
        ], name
    assert_equal_to_merged(cases)


def test_picks_from_a_stack(x64):
    frozen, delta = adapted({"w": cosines(3, 6, 4)}, "w", method=LoRA(rank=2), axes="layer in out")
    cases = [(lambda params, use=use: use(params["w"]), frozen, delta) for use in PICKS.values()]
    for (name, _), case in zip(PICKS.items(), cases, strict=True):
        assert not lora_jax.explain(case[0], lora_jax.combine(frozen, delta)).formed, name
    assert_equal_to_merged(cases)


@st.composite
def _products(draw):
    """A weight with axes in any order, and which of them a `dot_general` sums, keeps and pairs, on either
    side.
    """
    words = draw(
        st.permutations(["in", "out", *draw(st.lists(st.sampled_from(["in", "out", "layer"]), max_size=2))])
    )
    shape = draw(st.permutations([2, 3, 4, 5]))[: len(words)]
    # A layer axis is a batch axis or is kept; it can be summed too, which is what `sum_l x_l W_l` is.
    fates = [
        draw(st.sampled_from(["sum", "keep", "batch"] if word == "layer" else ["sum", "keep"]))
        for word in words
    ]
    order = draw(st.permutations([index for index, fate in enumerate(fates) if fate != "keep"]))
    return tuple(words), tuple(shape), tuple(fates), tuple(order), draw(st.booleans())


@hypothesis.given(_products())
@hypothesis.settings(max_examples=12)
def test_dot_general(product):
    words, shape, fates, order, weight_on_left = product
    with jax.enable_x64(True):
        frozen, delta = adapted({"w": cosines(*shape)}, "w", method=LoRA(rank=1), axes=" ".join(words))
        x = cosines(*(shape[index] for index in order), 2)
        groups = [[index for index in order if fates[index] == fate] for fate in ("sum", "batch")]
        own = tuple(tuple(group) for group in groups)
        other = tuple(tuple(order.index(index) for index in group) for group in groups)
        numbers = (
            tuple(zip(own, other, strict=True)) if weight_on_left else tuple(zip(other, own, strict=True))
        )

        def fn(params):
            return lax.dot_general(*((params["w"], x) if weight_on_left else (x, params["w"])), numbers)

        assert_equal_to_merged([(fn, frozen, delta)])


CONVOLUTIONS = {  # shape of the input, shape and axes of the kernel, function
    "NHWC": (
        (1, 5, 4, 4),
        (3, 3, 4, 6),
        "in in in out",
        {"window_strides": (2, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")},
    ),
    "NCHW": ((1, 4, 5, 4), (6, 4, 3, 3), "out in in in", {"window_strides": (1, 1), "padding": "VALID"}),
    "1-D dilated": (
        (2, 9, 4),
        (3, 4, 6),
        "in in out",
        {
            "window_strides": (1,),
            "padding": "SAME",
            "rhs_dilation": (2,),
            "dimension_numbers": ("NHC", "HIO", "NHC"),
        },
    ),
    "transposed": (
        (2, 4, 4),
        (3, 4, 6),
        "in in out",
        {
            "window_strides": (1,),
            "padding": [(1, 2)],
            "lhs_dilation": (2,),
            "dimension_numbers": ("NHC", "HIO", "NHC"),
        },
    ),
    "grouped": (
        (2, 5, 4),
        (3, 2, 6),
        "in in out",
        {
            "window_strides": (1,),
            "padding": "SAME",
            "feature_group_count": 2,
            "dimension_numbers": ("NHC", "HIO", "NHC"),
        },
    ),
    "depthwise": (
        (2, 5, 4),
        (3, 1, 8),
        "in in out",
        {
            "window_strides": (1,),
            "padding": "SAME",
            "feature_group_count": 4,
            "dimension_numbers": ("NHC", "HIO", "NHC"),
        },
    ),
    "odd layout": (
        (5, 4, 2),
        (6, 3, 4),
        "out in in",
        {"window_strides": (1,), "padding": "SAME", "dimension_numbers": ("HCN", "OHI", "CHN")},
    ),
}


def test_convolutions(x64):
    cases = []
    for shape, kernel, axes, options in CONVOLUTIONS.values():
        frozen, delta = adapted({"w": cosines(*kernel)}, "w", method=LoRA(rank=1), axes=axes)
        fn = lambda params, shape=shape, options=options: lax.conv_general_dilated(
            cosines(*shape), params["w"], **options
        )
        _, read = lora_jax.lorafy({"w": cosines(*kernel)}, "w", method=LoRA(rank=1), fn=fn)
        assert " ".join(read["w"].spec.axes) == axes
        cases.append((fn, frozen, delta))
    transposed = lambda params: lax.conv_transpose(
        cosines(2, 4, 4), params["w"], (2,), "SAME", transpose_kernel=True
    )
    cases.append((transposed, *adapted({"w": cosines(3, 6, 4)}, "w", method=LoRA(rank=2), axes="in out in")))
    assert_equal_to_merged(cases)


def test_ragged_dot(x64):
    frozen, delta = adapted({"w": cosines(3, 6, 4)}, "w", method=LoRA(rank=2), axes="layer in out")
    assert_equal_to_merged(
        [(lambda params: lax.ragged_dot(cosines(8, 6), params["w"], jnp.array([2, 0, 5])), frozen, delta)]
    )


def test_the_low_rank_products_have_the_precision_of_the_plain_one():
    """It changes nothing on a CPU: read off the program."""
    highest = lax.Precision.HIGHEST
    uses = {
        "w": lambda w: jnp.matmul(cosines(2, 6), w, precision=highest),
        "kernel": lambda w: lax.conv_general_dilated(
            *(cosines(2, 5, 4), w, (1,), "SAME"),
            dimension_numbers=("NHC", "HIO", "NHC"),
            precision=highest,
        ),
        "stack": lambda w: lax.ragged_dot(cosines(8, 6), w, jnp.array([2, 0, 6]), precision=highest),
    }
    shapes = {"w": (6, 4), "kernel": (3, 4, 6), "stack": (3, 6, 4)}
    axes = {"w": "in out", "kernel": "in in out", "stack": "layer in out"}
    params = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    tree = lora_jax.combine(*lora_jax.lorafy(params, ".*", method=LoRA(rank=2), axes=axes))
    fn = lambda params: [use(params[name]) for name, use in uses.items()]
    found = [
        eqn.params["precision"]
        for eqn in equations(jax.make_jaxpr(lora_jax.adapt(fn))(tree).jaxpr)
        if eqn.primitive.name in ("dot_general", "conv_general_dilated", "ragged_dot_general")
    ]
    assert len(found) == 9 and all(precision in (highest, (highest, highest)) for precision in found), found


# --- a magnitude --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scaled(Method):
    """`W' = (W + A·B) ⊙ m`, and all of it trains."""

    needs_axes = True
    sided = False  # so that uses along its out axes are allowed
    random = False

    def check(self, spec):
        pass

    def split(self, weight, spec, key):
        layers, ins, outs = (spec.sizes(word) for word in ("layer", "in", "out"))
        shapes = {"a": (*layers, *ins, 2), "b": (*layers, 2, *outs), "m": (*layers, *outs)}
        return weight, Adapter({name: jnp.zeros(shape, weight.dtype) for name, shape in shapes.items()}, spec)

    def array_axes(self, spec):
        layers, ins, outs = (spec.axis_indices(word) for word in ("layer", "in", "out"))
        return {"a": (*layers, *ins, None), "b": (*layers, None, *outs), "m": (*layers, *outs)}

    def canonical(self, weight: Any, fixed: Any, trained: Any, spec: Any, key: Any) -> Canonical:
        return Canonical((Term(trained["a"], trained["b"]),), magnitude=trained["m"])

    def at_rank(self, trained, spec, rank):
        raise NotImplementedError


MAGNITUDES = {
    "dot": ((6, 4), "in out", lambda w: contracted(w, "io")),
    "transposed": ((6, 4), "in out", lambda w: cosines(2, 4) @ w.T),
    "out first": ((4, 6), "out in", lambda w: contracted(w, "oi")),
    "heads": ((6, 2, 4), "in out out", lambda w: contracted(w, "ipo")),
    "heads, one head": ((6, 2, 4), "in out out", lambda w: contracted(w[:, 1], "io")),
    "stack": ((3, 6, 4), "layer in out", lambda w: lax.scan(lambda x, w: (x, x @ w), cosines(2, 6), w)[1]),
    "lookup": ((6, 4), "in out", lambda w: w[_I([[3, 1], [0, 5]])]),
    "convolution": (
        (3, 4, 6),
        "in in out",
        lambda w: lax.conv_general_dilated(
            cosines(2, 5, 4), w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        ),
    ),
    "split": ((6, 4), "in out", lambda w: contracted(jnp.split(w, 2, axis=1)[1], "io")),
    "scaled": ((6, 4), "in out", lambda w: contracted(w * cosines(4)[None], "io")),
    "joined": (
        (6, 4),
        "in out",
        lambda w: contracted(jnp.concatenate([w, cosines(6, 3), w], axis=1), "io"),
    ),
    "padded": ((6, 4), "in out", lambda w: contracted(jnp.pad(w, ((1, 0), (0, 2))), "io")),
    # Of what is added along the out axis, m must be 1: a zero would hide any other.
    "padded with 2": (
        (6, 4),
        "in out",
        lambda w: contracted(jnp.pad(w, ((0, 0), (1, 2)), constant_values=2.0), "io"),
    ),
}


def test_magnitude_in_every_use(x64):
    cases = []
    for name, (shape, axes, use) in MAGNITUDES.items():
        frozen, delta = adapted({"w": cosines(*shape)}, "w", method=Scaled(), axes=axes)
        fn = lambda params, use=use: use(params["w"])
        assert not lora_jax.explain(fn, lora_jax.combine(frozen, delta)).formed, name
        cases.append((fn, frozen, delta))
    assert_equal_to_merged(cases)

    # The sum over some of the out axes is weighted differently for each of the others: no factors.
    summed = lambda params: jnp.einsum("bp,ipo->bio", cosines(3, 2), params["w"])
    frozen, delta = adapted({"w": cosines(6, 2, 4)}, "w", method=Scaled(), axes="in out out")
    assert len(lora_jax.explain(summed, lora_jax.combine(frozen, delta)).formed) == 1

    (_, frozen, delta), arrays = cases[0], cases[0][2]["w"].arrays
    by_hand = (frozen["w"] + arrays["a"] @ arrays["b"]) * arrays["m"][None]
    np.testing.assert_allclose(lora_jax.merge(frozen, delta)["w"], by_hand, rtol=1e-12)


def test_joined_magnitudes_may_have_several_dtypes():
    params = {name: jax.ShapeDtypeStruct((6, 4), "float32") for name in "qv"}
    frozen, delta = lora_jax.lorafy(params, ".*", method=Scaled(), axes="in out")
    delta["v"].arrays["m"] = jax.ShapeDtypeStruct((4,), "bfloat16")
    joined = lambda params: contracted(jnp.concatenate([params["q"], params["v"]], 1), "io")
    tree = lora_jax.combine(frozen, delta)
    assert not lora_jax.explain(joined, tree).formed
    assert jax.eval_shape(lora_jax.adapt(joined), tree).shape == (2, 8)


def test_a_product_without_a_bias_is_one_array():
    """For the backward pass: not x W and (x A) B each, which XLA would add again there."""
    layers, width, inner, x = 4, 32, 96, jax.ShapeDtypeStruct((8, 64, 32), "float32")
    sizes = {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}
    block = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in sizes.items()}
    biases = {
        f"{name}_bias": jax.ShapeDtypeStruct((1, 1, outs), "float32") for name, (_, outs) in sizes.items()
    }

    def model(params, x):
        def dense(x, name, layer):
            y = x @ layer[name]
            return y + layer[f"{name}_bias"] if f"{name}_bias" in layer else y

        for layer in params:
            hidden = jax.nn.silu(dense(x, "gate", layer)) * dense(x, "up", layer)
            x = jnp.sin(x + dense(hidden, "down", layer))
        return jnp.sum(x)

    def temporary(params):
        frozen, delta = lora_jax.lorafy(params, "gate|up|down", method=LoRA(rank=2), axes="in out")
        loss = lambda delta, frozen, x: lora_jax.adapt(model)(lora_jax.combine(frozen, delta), x)
        compiled = jax.jit(jax.grad(loss)).lower(delta, frozen, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary([block] * layers) <= 1.02 * temporary([{**block, **biases}] * layers)
