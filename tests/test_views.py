"""Every way in which a weight reaches its use, and every use, against the formed weight in float64.

The rows are views; the columns are kinds of weights: plain, stacked, with several out axes, stored
transposed, with adapted blocks. Each row is one compiled program for all of its columns.
"""

import dataclasses
import math
import re
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formation import formed
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lora_jax
from lora_jax import LoRA
from lora_jax._lowrank.factored import Canonical, Term
from lora_jax._tree.method import Method
from lora_jax._tree.nodes import Adapter
from lora_jax.sharding import delta_specs, frozen_specs, shardings


def _numbers(*shape):
    """Fixed numbers without a random key: the same in both versions of a function."""
    return jnp.cos(jnp.arange(math.prod(shape), dtype=float).reshape(shape) * 0.7 + 0.3)


def _adapted(params, targets, **options):
    """A frozen tree and a delta in which nothing is zero."""
    frozen, delta = lora_jax.lorafy(params, targets, **options)
    rng = np.random.default_rng(1)
    return frozen, jax.tree.map(lambda array: jnp.asarray(rng.normal(size=array.shape), array.dtype), delta)


def _value_and_gradient(fn, frozen, delta, join):
    return jax.value_and_grad(
        lambda delta: sum(jnp.sum(jnp.sin(out)) for out in jax.tree.leaves(fn(join(frozen, delta))))
    )(delta)


def _assert_equal_to_merged(cases, rtol=1e-9):
    """`cases`: (fn of parameters, frozen, delta). One program for all, because compiling is what takes
    the time.
    """

    @jax.jit
    def both(trees):
        adapted = [
            _value_and_gradient(lora_jax.adapt(fn), *pair, lora_jax.combine)
            for (fn, _, _), pair in zip(cases, trees, strict=True)
        ]
        merged = [
            _value_and_gradient(fn, *pair, lora_jax.merge)
            for (fn, _, _), pair in zip(cases, trees, strict=True)
        ]
        return adapted, merged

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol),
        *both([case[1:] for case in cases]),
    )


# --- views --------------------------------------------------------------------------------------------------

# One letter an axis: l stacked, i and j in, o and p out, n made by the view. A view maps a weight and its
# letters to those of what is contracted.
KINDS = {
    "plain": ((6, 4), "io", None),
    "stacked": ((3, 6, 4), "lio", None),
    "heads": ((6, 2, 4), "ipo", None),
    "transposed": ((4, 6), "oi", None),
    "blocks": ((6, 12), "io", (True, False, True)),
}
WORDS = {"l": "layer", "i": "in", "o": "out", "p": "out"}


def _contracted(w, letters):
    """An activation times the weight, over its in axes; stacked and new axes are shared."""
    shared = "".join(letter for letter in letters if letter in "ln")
    summed = "".join(letter for letter in letters if letter in "ij")
    free = "".join(letter for letter in letters if letter in "opq")
    sizes = dict(zip(letters, w.shape, strict=True))
    x = _numbers(2, *(sizes[letter] for letter in shared + summed)).astype(w.dtype)
    return jnp.einsum(f"b{shared}{summed},{letters}->b{shared}{free}", x, w)


def _along(letter, operation):
    """The view that `operation(w, axis)` is, along the axis with this letter."""
    return lambda w, letters: (operation(w, letters.index(letter)), letters)


def _split_axis(letter, pair, outer):
    def view(w, letters):
        axis = letters.index(letter)
        return w.reshape(*w.shape[:axis], outer, -1, *w.shape[axis + 1 :]), letters.replace(letter, pair)

    return view


def _split_and_merged(w, letters):
    split, longer = _split_axis("i", "ij", 3)(w, letters)
    return jnp.swapaxes(split, *(longer.index(letter) for letter in "ij")).reshape(w.shape), letters


def _indexed_stack(w, letters):
    return (w[jnp.asarray(letters.count("l"))], letters[1:]) if letters[0] == "l" else (w, letters)


def _times(size_of):
    """A product with a vector along one axis, or with a number."""
    return lambda w, letters: (w * _numbers(*size_of(w, letters)), letters)


def _vector(letter):
    return lambda w, letters: [
        size if other == letter else 1 for size, other in zip(w.shape, letters, strict=True)
    ]


def _mesh(kind=AxisType.Auto):
    return jax.make_mesh((2,), ("model",), axis_types=(kind,))


def _constrained(w, letters):
    entries = [("model" if letter == "i" else None) for letter in letters]
    return lax.with_sharding_constraint(w, NamedSharding(_mesh(), P(*entries))), letters


def _barrier(w, letters):
    return lax.optimization_barrier((jnp.ones(3), w))[1], letters


def _traced(number):
    """An index that is not known when it is traced."""
    return lax.optimization_barrier(jnp.asarray(number))


VIEWS = {
    "convert_element_type": lambda w, letters: (w.astype(jnp.float32), letters),
    "transpose": lambda w, letters: (w.T, letters[::-1]),
    "reshape in": _split_axis("i", "ij", 3),
    "reshape out": _split_axis("o", "oq", 2),
    "reshape back": _split_and_merged,
    "squeeze": lambda w, letters: (lax.squeeze(jnp.expand_dims(w, (0, 2)), (0, 2)), letters),
    "broadcast_in_dim": lambda w, letters: (jnp.broadcast_to(w, (5, *w.shape)), "n" + letters),
    "broadcast and sum": lambda w, letters: (jnp.broadcast_to(w, (5, *w.shape)), "j" + letters),
    "slice in": _along("i", lambda w, axis: lax.slice_in_dim(w, 1, 5, axis=axis)),
    "slice out": _along("o", lambda w, axis: lax.slice_in_dim(w, 1, 3, axis=axis)),
    "slice with stride": _along("o", lambda w, axis: lax.slice_in_dim(w, 1, 4, 2, axis=axis)),
    "every second": _along("o", lambda w, axis: lax.slice_in_dim(w, 0, w.shape[axis], 2, axis=axis)),
    "dynamic_slice in": _along("i", lambda w, axis: lax.dynamic_slice_in_dim(w, _traced(2), 3, axis)),
    "dynamic_slice out": _along("o", lambda w, axis: lax.dynamic_slice_in_dim(w, _traced(1), 2, axis)),
    "split": _along("o", lambda w, axis: jnp.split(w, 2, axis)[1]),
    "indexed stack": _indexed_stack,
    "take in": _along("i", lambda w, axis: jnp.take(w, jnp.array([3, 0, 5]), axis)),
    "take out": _along("o", lambda w, axis: jnp.take(w, jnp.array([3, -1, 3]), axis)),
    "rev in": _along("i", lambda w, axis: jnp.flip(w, axis)),
    "rev out": _along("o", lambda w, axis: jnp.flip(w, axis)),
    "neg": lambda w, letters: (-w, letters),
    "mul": _times(lambda w, letters: ()),
    "div": lambda w, letters: (w / _numbers(2)[1], letters),
    "mul by vector in": _times(_vector("i")),
    "mul by vector out": _times(_vector("o")),
    "copy": lambda w, letters: (jnp.array(w, copy=True), letters),
    "stop_gradient": lambda w, letters: (lax.stop_gradient(w), letters),
    "sharding_constraint": _constrained,
    "optimization_barrier": _barrier,
    "concatenate in": _along("i", lambda w, axis: jnp.concatenate([w, _numbers(*w.shape), 2.0 * w], axis)),
    "concatenate out": _along("o", lambda w, axis: jnp.concatenate([w, _numbers(*w.shape), 2.0 * w], axis)),
    "stack": lambda w, letters: (jnp.stack([w, 2.0 * w], 1), letters[0] + "n" + letters[1:]),
    "roll": _along("o", lambda w, axis: jnp.roll(w, 1, axis)),
    "pad in": _along(
        "i",
        lambda w, axis: lax.pad(
            w, 0.5, [(2 * (index == axis), -(index == axis), 0) for index in range(w.ndim)]
        ),
    ),
    "pad out": _along(
        "o",
        lambda w, axis: lax.pad(
            w, 0.5, [(1 * (index == axis), 0, 1 * (index == axis)) for index in range(w.ndim)]
        ),
    ),
}
# Views that the plain model computes anew, which the walk cannot tell from a formed weight; `explain` can.
COMPUTED = (
    "mul",
    "div",
    "mul by vector in",
    "mul by vector out",
    "concatenate in",
    "concatenate out",
    "stack",
    "pad in",
    "pad out",
)


@pytest.mark.parametrize("name", VIEWS)
def test_view(name, x64):
    cases = []
    for kind, (shape, letters, blocks) in KINDS.items():
        params = {"w": _numbers(*shape) * 1.5}
        options = {
            "method": LoRA(rank=2, alpha=3, blocks=blocks),
            "axes": " ".join(WORDS[letter] for letter in letters),
        }

        def fn(params, letters=letters):
            return _contracted(*VIEWS[name](params["w"], letters))

        frozen, delta = _adapted(params, "w", **options)
        cases.append((fn, frozen, delta))
        explanation = lora_jax.explain(fn, lora_jax.combine(frozen, delta))
        assert len(explanation.uses) == 1 and not explanation.formed and not explanation.unused, (
            f"{kind}: {explanation}"
        )
        if name not in COMPUTED:
            gradient = lambda frozen, delta, fn=fn: _value_and_gradient(
                lora_jax.adapt(fn), frozen, delta, lora_jax.combine
            )
            assert not formed(jax.make_jaxpr(gradient)(frozen, delta), [0], params["w"].size), kind
    _assert_equal_to_merged(cases, rtol=1e-5 if name == "convert_element_type" else 1e-9)


def test_weights_of_several_leaves_join(x64):
    """Query, key and value fused at run time, layers stacked to be scanned: different ranks, a plain part
    between.
    """
    params = {name: _numbers(5, size) * (1 + size) for name, size in (("q", 4), ("k", 5), ("v", 3))} | {
        "layers": [
            {"kernel": _numbers(5, 5), "bias": _numbers(5)},
            {"kernel": 2 * _numbers(5, 5), "bias": _numbers(5)},
        ]
    }
    methods = {
        "q": LoRA(rank=2),
        "v": LoRA(rank=1),
        "layers/0/kernel": LoRA(rank=3),
        "layers/1/kernel": LoRA(rank=1),
    }

    def fn(params):
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["layers"])
        x = lax.scan(
            lambda x, layer: (jnp.tanh(x @ layer["kernel"] + layer["bias"][None]), None),
            _numbers(2, 5),
            stacked,
        )[0]
        return jnp.split(x @ jnp.concatenate([params["q"], params["k"], params["v"]], axis=1), [4, 9], axis=1)

    frozen, delta = _adapted(params, methods)
    explanation = lora_jax.explain(fn, lora_jax.combine(frozen, delta))
    assert not explanation.formed and not explanation.unused, explanation
    _, found = lora_jax.lorafy(params, "all-linear", method=LoRA(rank=1), fn=fn)
    assert [
        leaf.spec.path for leaf in jax.tree.leaves(found, is_leaf=lambda leaf: isinstance(leaf, Adapter))
    ] == [
        "k",
        "layers/0/kernel",
        "layers/1/kernel",
        "q",
        "v",
    ]
    _assert_equal_to_merged([(fn, frozen, delta)])


# --- uses ---------------------------------------------------------------------------------------------------

_I = np.array
LOOKUPS = {
    "scalar": lambda w: w[_traced(3)],
    "negative scalar": lambda w: w[_traced(-2)],
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
    "scalar": lambda w: _contracted(w[_traced(2)], "io"),
    "negative": lambda w: _contracted(w[_traced(-1)], "io"),
    "1-D": lambda w: _contracted(w[_I([2, 0])], "lio"),
    "2-D": lambda w: jnp.einsum("abi,abio->abo", _numbers(2, 2, 6), w[_I([[2, 0], [1, 1]])]),
    "clip": lambda w: _contracted(w.at[_I([5, 0])].get(mode="clip"), "lio"),
    "fill": lambda w: _contracted(w.at[_I([5, 0])].get(mode="fill", fill_value=3.0), "lio"),
    "mapped": lambda w: jax.vmap(lambda index, x: x @ w[index])(_I([2, 0]), _numbers(2, 6)),
    "mapped operand": lambda w: jax.vmap(lambda layer, index: layer[index])(w, _I([2, 0, 4])),
    "tree": lambda w: _contracted(jax.tree.map(lambda leaf: leaf[1], {"w": w})["w"], "io"),
}


def test_lookups(x64):
    frozen, delta = _adapted({"w": _numbers(11, 5)}, "w", method=LoRA(rank=2), axes="in out")
    cases = [(lambda params, use=use: use(params["w"]), frozen, delta) for use in LOOKUPS.values()]
    for (name, _), case in zip(LOOKUPS.items(), cases, strict=True):
        assert [use.how for use in lora_jax.explain(case[0], lora_jax.combine(frozen, delta)).uses] == [
            "lookup"
        ], name
    _assert_equal_to_merged(cases)


def test_picks_from_a_stack(x64):
    frozen, delta = _adapted({"w": _numbers(3, 6, 4)}, "w", method=LoRA(rank=2), axes="layer in out")
    cases = [(lambda params, use=use: use(params["w"]), frozen, delta) for use in PICKS.values()]
    for (name, _), case in zip(PICKS.items(), cases, strict=True):
        assert not lora_jax.explain(case[0], lora_jax.combine(frozen, delta)).formed, name
    _assert_equal_to_merged(cases)


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
        frozen, delta = _adapted({"w": _numbers(*shape)}, "w", method=LoRA(rank=1), axes=" ".join(words))
        x = _numbers(*(shape[index] for index in order), 2)
        groups = [[index for index in order if fates[index] == fate] for fate in ("sum", "batch")]
        own = tuple(tuple(group) for group in groups)
        other = tuple(tuple(order.index(index) for index in group) for group in groups)
        numbers = (
            tuple(zip(own, other, strict=True)) if weight_on_left else tuple(zip(other, own, strict=True))
        )

        def fn(params):
            return lax.dot_general(*((params["w"], x) if weight_on_left else (x, params["w"])), numbers)

        _assert_equal_to_merged([(fn, frozen, delta)])


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
        frozen, delta = _adapted({"w": _numbers(*kernel)}, "w", method=LoRA(rank=1), axes=axes)
        fn = lambda params, shape=shape, options=options: lax.conv_general_dilated(
            _numbers(*shape), params["w"], **options
        )
        _, read = lora_jax.lorafy({"w": _numbers(*kernel)}, "w", method=LoRA(rank=1), fn=fn)
        assert " ".join(read["w"].spec.axes) == axes
        cases.append((fn, frozen, delta))
    transposed = lambda params: lax.conv_transpose(
        _numbers(2, 4, 4), params["w"], (2,), "SAME", transpose_kernel=True
    )
    cases.append(
        (transposed, *_adapted({"w": _numbers(3, 6, 4)}, "w", method=LoRA(rank=2), axes="in out in"))
    )
    _assert_equal_to_merged(cases)


def test_ragged_dot(x64):
    frozen, delta = _adapted({"w": _numbers(3, 6, 4)}, "w", method=LoRA(rank=2), axes="layer in out")
    _assert_equal_to_merged(
        [(lambda params: lax.ragged_dot(_numbers(8, 6), params["w"], jnp.array([2, 0, 5])), frozen, delta)]
    )


# --- a magnitude --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scaled(Method):
    """`W' = (W + A·B) ⊙ m`, and all of it trains."""

    needs_axes = True
    sided = True
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
    "dot": ((6, 4), "in out", lambda w: _contracted(w, "io")),
    "transposed": ((6, 4), "in out", lambda w: _numbers(2, 4) @ w.T),
    "out first": ((4, 6), "out in", lambda w: _contracted(w, "oi")),
    "heads": ((6, 2, 4), "in out out", lambda w: _contracted(w, "ipo")),
    "heads, one head": ((6, 2, 4), "in out out", lambda w: _contracted(w[:, 1], "io")),
    "stack": ((3, 6, 4), "layer in out", lambda w: lax.scan(lambda x, w: (x, x @ w), _numbers(2, 6), w)[1]),
    "lookup": ((6, 4), "in out", lambda w: w[_I([[3, 1], [0, 5]])]),
    "convolution": (
        (3, 4, 6),
        "in in out",
        lambda w: lax.conv_general_dilated(
            _numbers(2, 5, 4), w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        ),
    ),
    "split": ((6, 4), "in out", lambda w: _contracted(jnp.split(w, 2, axis=1)[1], "io")),
    "scaled": ((6, 4), "in out", lambda w: _contracted(w * _numbers(4)[None], "io")),
    "joined": (
        (6, 4),
        "in out",
        lambda w: _contracted(jnp.concatenate([w, _numbers(6, 3), w], axis=1), "io"),
    ),
    "padded": ((6, 4), "in out", lambda w: _contracted(jnp.pad(w, ((1, 0), (0, 2))), "io")),
}


def test_magnitude_in_every_use(x64):
    cases = []
    for name, (shape, axes, use) in MAGNITUDES.items():
        frozen, delta = _adapted({"w": _numbers(*shape)}, "w", method=Scaled(), axes=axes)
        fn = lambda params, use=use: use(params["w"])
        assert not lora_jax.explain(fn, lora_jax.combine(frozen, delta)).formed, name
        cases.append((fn, frozen, delta))
    _assert_equal_to_merged(cases)

    # The sum over some of the out axes is weighted differently for each of the others: no factors.
    summed = lambda params: jnp.einsum("bp,ipo->bio", _numbers(3, 2), params["w"])
    frozen, delta = _adapted({"w": _numbers(6, 2, 4)}, "w", method=Scaled(), axes="in out out")
    assert len(lora_jax.explain(summed, lora_jax.combine(frozen, delta)).formed) == 1

    (_, frozen, delta), arrays = cases[0], cases[0][2]["w"].arrays
    by_hand = (frozen["w"] + arrays["a"] @ arrays["b"]) * arrays["m"][None]
    np.testing.assert_allclose(lora_jax.merge(frozen, delta)["w"], by_hand, rtol=1e-12)


# --- explicit shardings, and what is refused ----------------------------------------------------------------


@pytest.mark.parametrize("spec", [P(None, "model"), P("model", None)], ids=["out", "in"])
def test_explicit_mesh(spec):
    """On a mesh of explicit axes, which `jax.make_mesh` makes by default, shardings are part of every
    type.
    """
    with jax.set_mesh(_mesh(AxisType.Explicit)):
        params = {"w": jax.device_put(_numbers(6, 8).astype(jnp.float32), spec)}
        x = jax.device_put(_numbers(4, 6).astype(jnp.float32), P(None, None))

        def fn(params):
            gathered = jax.sharding.reshard(params["w"], P(None, None))
            return x @ gathered, jnp.matmul(x, params["w"], out_sharding=P(None, None))

        frozen, delta = _adapted(params, "w", method=LoRA(rank=2), fn=fn)
        _assert_equal_to_merged([(fn, frozen, delta)], rtol=1e-4)


METHODS = [
    LoRA(rank=2),
    lora_jax.DoRA(rank=2),
    lora_jax.VeRA(rank=4),
    lora_jax.LoRAFA(rank=2),
    lora_jax.DyLoRA(rank=2),
    lora_jax.AdaLoRA(rank=2),
    lora_jax.PiSSA(rank=2),
]
EXPLICIT = {  # how x, W and the result lie
    "rows of W": (P("data", "model"), P("model", None), P("data", None)),
    "columns of W": (P("data", None), P(None, "model"), P("data", "model")),
    "both": (P("data", None), P("data", "model"), P("data", "model")),
    "nothing of the result": (P(None, "model"), P("model", "data"), P(None, None)),
}


def _products(jaxpr):
    """The types of all products in it, with those of the functions that it calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval
        for inner in equation.params.values():
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _products(inner)


@pytest.mark.parametrize("lies", EXPLICIT)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_products_on_explicit_axes(method, lies):
    """Of a weight split over devices, by a function that says how the product lies: so does that with the
    adapter, whose value and gradients are those of one device.
    """
    x_spec, w_spec, spec = EXPLICIT[lies]
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    params, x = {"w": _numbers(8, 12).astype(jnp.float32)}, _numbers(16, 8).astype(jnp.float32)
    frozen, delta = _adapted(params, "w", method=method, axes="in out", key=jax.random.key(0))

    def loss(delta, frozen, x, where=NamedSharding(mesh, spec)):
        y = lora_jax.adapt(lambda params: jnp.matmul(x, params["w"], out_sharding=where))(
            lora_jax.combine(frozen, delta)
        )
        return jnp.sum(jnp.sin(y)), y

    expected = jax.jit(jax.grad(lambda *arguments: loss(*arguments, None), has_aux=True))(delta, frozen, x)
    put = lambda tree, specs: jax.device_put(tree, shardings(mesh, specs, tree))
    placed = put(delta, delta_specs(delta, {"w": w_spec})), put(frozen, frozen_specs(frozen, {"w": w_spec}))
    arguments = (*placed, jax.device_put(x, NamedSharding(mesh, x_spec)))
    found = jax.jit(jax.grad(loss, has_aux=True))(*arguments)
    assert found[1].sharding.spec == spec
    # What lies between has the rows of x, and is whole along the rank; what is added lies as the result does.
    lying = {
        (product.shape[1] == 12, product.sharding.spec)
        for product in _products(jax.make_jaxpr(loss)(*arguments).jaxpr)
        if product.shape[0] == 16
    }
    assert lying == {(True, spec), (False, P(x_spec[0], None))}
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4), found, expected)


def test_sharded_by_hand(x64):
    """Tensor parallelism in `shard_map`: W cut along its in or out axis, or gathered from its shards
    where it is used.
    """

    def fn(params):
        x, w, mesh = _numbers(4, 6), params["w"], _mesh()
        column = jax.shard_map(
            jnp.matmul, mesh=mesh, in_specs=(P(), P(None, "model")), out_specs=P(None, "model")
        )
        row = jax.shard_map(
            lambda x, w: lax.psum(x @ w, "model"),
            mesh=mesh,
            in_specs=(P(None, "model"), P("model")),
            out_specs=P(),
        )
        gathered = jax.shard_map(
            lambda x, w: x @ lax.all_gather(w, "model", axis=0, tiled=True),
            mesh=mesh,
            in_specs=(P("model"), P("model")),
            out_specs=P("model"),
        )
        return column(x, w), row(x, w), gathered(x, w)

    _assert_equal_to_merged([(fn, *_adapted({"w": _numbers(6, 8)}, "w", method=LoRA(rank=2), fn=fn))])


REFUSED = {
    "mul": lambda w: w * jnp.tri(6),
    "select_n": lambda w: jnp.where(jnp.tri(6) > 0, w, 0.0),
    "add": lambda w: w + 1.0,
    "integer_pow": lambda w: w**2,
    "convert_element_type": lambda w: w.astype(jnp.int8).astype(jnp.float32),
    "concatenate": lambda w: jnp.concatenate([w, w.T]),
    "cond": lambda w: lax.cond(w.ndim > _traced(1), lambda w: w, lambda w: 2 * w, w),
    "reshape": lambda w: w.reshape(4, 9),
}


def test_inner_jits_keep_their_own_shardings():
    """Two jits of one function share its jaxpr and nothing else."""
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2])
    there = [jax.sharding.NamedSharding(mesh, spec) for spec in (P("d", None), P(None, "d"))]

    def product(x, w):
        return x @ w

    calls = [jax.jit(product, out_shardings=sharding) for sharding in there]
    frozen, delta = lora_jax.lorafy({"w": _numbers(6, 4)}, "w", method=LoRA(rank=1))
    fn = lambda params, x: [call(x, params["w"]) for call in calls]
    found = jax.jit(lora_jax.adapt(fn))(lora_jax.combine(frozen, delta), _numbers(2, 6))
    assert [out.sharding.spec for out in found] == [
        out.sharding.spec for out in jax.jit(fn)(frozen, _numbers(2, 6))
    ]
    assert found[0].sharding.spec != found[1].sharding.spec


@pytest.mark.parametrize("operation", REFUSED)
def test_refused(operation):
    """The operation, the parameter's path, the line, and what to do about it."""
    frozen, delta = _adapted(
        {"layer": {"w": _numbers(6, 6).astype(jnp.float32)}}, "layer/w", method=LoRA(rank=2)
    )
    combined = lora_jax.combine(frozen, delta)

    def fn(params):
        return _numbers(2, 6).astype(jnp.float32) @ REFUSED[operation](params["layer"]["w"]).reshape(6, -1)

    where = (
        rf"`{operation}`[^.]*'layer/w' \(as float32\[6, 6\]\) at .*test_views.py:\d+ "
        r".*materialize='allow'.*'layer/w' out of `targets`"
    )
    with pytest.raises(ValueError, match=where):
        jax.eval_shape(lora_jax.adapt(fn), combined)
    with pytest.warns(UserWarning, match=where):
        jax.eval_shape(lora_jax.adapt(fn, materialize="warn"), combined)
    assert operation in [use.operation for use in lora_jax.explain(fn, combined).formed]
    assert re.search(rf"layer/w +{operation} +formed", str(lora_jax.explain(fn, combined)))


def test_allowed_is_merged():
    frozen, delta = _adapted({"w": _numbers(6, 6).astype(jnp.float32)}, "w", method=LoRA(rank=2))
    fn = lambda params: params["w"] ** 2
    allowed = lora_jax.adapt(fn, materialize="allow")(lora_jax.combine(frozen, delta))
    np.testing.assert_allclose(allowed, fn(lora_jax.merge(frozen, delta)), rtol=1e-6)
