"""Every way in which a weight reaches its use, against the formed weight in float64, and what is refused.

The rows are views; the columns are kinds of weights: plain, stacked, with several out axes, stored
transposed, with adapted blocks. Each row is one compiled program for all of its columns.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against_merged import (
    adapted,
    assert_equal_to_merged,
    contracted,
    cosines,
    traced_index,
    two_devices,
    value_and_gradient,
)
from formation import formed
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P

import lora_jax
from lora_jax import LoRA
from lora_jax._tree.nodes import Adapter


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
    return lambda w, letters: (w * cosines(*size_of(w, letters)), letters)


def _vector(letter):
    return lambda w, letters: [
        size if other == letter else 1 for size, other in zip(w.shape, letters, strict=True)
    ]


def _constrained(w, letters):
    entries = [("model" if letter == "i" else None) for letter in letters]
    return lax.with_sharding_constraint(w, NamedSharding(two_devices(), P(*entries))), letters


def _barrier(w, letters):
    return lax.optimization_barrier((jnp.ones(3), w))[1], letters


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
    "dynamic_slice in": _along("i", lambda w, axis: lax.dynamic_slice_in_dim(w, traced_index(2), 3, axis)),
    "dynamic_slice out": _along("o", lambda w, axis: lax.dynamic_slice_in_dim(w, traced_index(1), 2, axis)),
    "split": _along("o", lambda w, axis: jnp.split(w, 2, axis)[1]),
    "indexed stack": _indexed_stack,
    "take in": _along("i", lambda w, axis: jnp.take(w, jnp.array([3, 0, 5]), axis)),
    "take out": _along("o", lambda w, axis: jnp.take(w, jnp.array([3, -1, 3]), axis)),
    "rev in": _along("i", lambda w, axis: jnp.flip(w, axis)),
    "rev out": _along("o", lambda w, axis: jnp.flip(w, axis)),
    "neg": lambda w, letters: (-w, letters),
    "mul": _times(lambda w, letters: ()),
    "div": lambda w, letters: (w / cosines(2)[1], letters),
    "mul by vector in": _times(_vector("i")),
    "mul by vector out": _times(_vector("o")),
    "copy": lambda w, letters: (jnp.array(w, copy=True), letters),
    "stop_gradient": lambda w, letters: (lax.stop_gradient(w), letters),
    "sharding_constraint": _constrained,
    "optimization_barrier": _barrier,
    "concatenate in": _along("i", lambda w, axis: jnp.concatenate([w, cosines(*w.shape), 2.0 * w], axis)),
    "concatenate out": _along("o", lambda w, axis: jnp.concatenate([w, cosines(*w.shape), 2.0 * w], axis)),
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
        params = {"w": cosines(*shape) * 1.5}
        options = {
            "method": LoRA(rank=2, alpha=3, blocks=blocks),
            "axes": " ".join(WORDS[letter] for letter in letters),
        }

        def fn(params, letters=letters):
            return contracted(*VIEWS[name](params["w"], letters))

        frozen, delta = adapted(params, "w", **options)
        cases.append((fn, frozen, delta))
        explanation = lora_jax.explain(fn, lora_jax.combine(frozen, delta))
        assert len(explanation.uses) == 1 and not explanation.formed and not explanation.unused, (
            f"{kind}: {explanation}"
        )
        if name not in COMPUTED:
            gradient = lambda frozen, delta, fn=fn: value_and_gradient(
                lora_jax.adapt(fn), frozen, delta, lora_jax.combine
            )
            assert not formed(jax.make_jaxpr(gradient)(frozen, delta), [0], params["w"].size), kind
    assert_equal_to_merged(cases, rtol=1e-5 if name == "convert_element_type" else 1e-9)


def test_weights_of_several_leaves_join(x64):
    """Query, key and value fused at run time, layers stacked to be scanned: different ranks, a plain part
    between.
    """
    params = {name: cosines(5, size) * (1 + size) for name, size in (("q", 4), ("k", 5), ("v", 3))} | {
        "layers": [
            {"kernel": cosines(5, 5), "bias": cosines(5)},
            {"kernel": 2 * cosines(5, 5), "bias": cosines(5)},
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
            cosines(2, 5),
            stacked,
        )[0]
        return jnp.split(x @ jnp.concatenate([params["q"], params["k"], params["v"]], axis=1), [4, 9], axis=1)

    frozen, delta = adapted(params, methods)
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
    assert_equal_to_merged([(fn, frozen, delta)])


REFUSED = {
    "mul": lambda w: w * jnp.tri(6),
    "select_n": lambda w: jnp.where(jnp.tri(6) > 0, w, 0.0),
    "add": lambda w: w + 1.0,
    "integer_pow": lambda w: w**2,
    "convert_element_type": lambda w: w.astype(jnp.int8).astype(jnp.float32),
    "concatenate": lambda w: jnp.concatenate([w, w.T]),
    "cond": lambda w: lax.cond(w.ndim > traced_index(1), lambda w: w, lambda w: 2 * w, w),
    "reshape": lambda w: w.reshape(4, 9),
}


@pytest.mark.parametrize("operation", REFUSED)
def test_refused(operation):
    """The operation, the parameter's path, the line, and what to do about it."""
    frozen, delta = adapted(
        {"layer": {"w": cosines(6, 6).astype(jnp.float32)}}, "layer/w", method=LoRA(rank=2)
    )
    combined = lora_jax.combine(frozen, delta)

    def fn(params):
        return cosines(2, 6).astype(jnp.float32) @ REFUSED[operation](params["layer"]["w"]).reshape(6, -1)

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
    frozen, delta = adapted({"w": cosines(6, 6).astype(jnp.float32)}, "w", method=LoRA(rank=2))
    fn = lambda params: params["w"] ** 2
    allowed = lora_jax.adapt(fn, materialize="allow")(lora_jax.combine(frozen, delta))
    np.testing.assert_allclose(allowed, fn(lora_jax.merge(frozen, delta)), rtol=1e-6)
