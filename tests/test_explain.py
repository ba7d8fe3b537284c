"""What `explain` says of a function, against what XLA compiles and what the function does."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import lora_jax
from lora_jax import DoRA, LoRA, LoRAFA, VeRA


SHAPE = jax.ShapeDtypeStruct


def _combined(shapes, targets, rank=2, **options):
    frozen, delta = lora_jax.lorafy(
        {name: SHAPE(shape, jnp.float32) for name, shape in shapes.items()},
        targets,
        method=LoRA(rank=rank),
        **options,
    )
    return lora_jax.combine(frozen, delta)


def test_table():
    """From shapes alone."""
    params = _combined(
        {"kernel": (3, 4), "table": (5, 3), "bias": (4,), "spare": (3, 4)}, ["kernel", "table", "spare"]
    )

    def model(params, indices):
        return params["table"][indices] @ params["kernel"] + params["bias"][None]

    header, line, *rows = str(lora_jax.explain(model, params, SHAPE((2,), jnp.int32))).splitlines()
    assert header.split("  ")[0] == "leaf" and set(line) == {"-"} and len(line) == len(header)
    # The product is 2·2·3·4 FLOPs, its low-rank terms 2·2·3·2 + 2·2·2·4; forming W is 2·2·12 + 12.
    assert [row.split()[:6] for row in rows] == [
        ["table", "gather", "lookup", "0", "30", "75"],
        ["kernel", "dot_general", "low-rank", "48", "104", "108"],
        ["spare", "-", "not", "used", "0", "0"],
    ]
    assert all("test_explain.py:" in row and "model)" in row for row in rows[:2])


def test_flops_are_the_compilers():
    shapes = {"kernel": (32, 48)}
    params, x = _combined(shapes, "kernel", rank=4), SHAPE((16, 32), jnp.float32)
    fn = lambda params, x: x @ params["kernel"]
    (use,) = lora_jax.explain(fn, params, x).uses

    def compiled(fn, *args):
        return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]

    assert use.flops[0] == compiled(fn, {"kernel": SHAPE((32, 48), jnp.float32)}, x)
    # Beside the products there are the sum of the two paths and the scale on B, and where no bias follows the
    # row of zeros that keeps the sum one array: 48 times zero, added to 16 rows of 48.
    zeros = 48 + 16 * 48
    assert use.flops[1] + zeros == pytest.approx(compiled(lora_jax.adapt(fn), params, x), rel=0.02)


def test_scan_counts_every_step():
    params = _combined(
        {"stack": (3, 4, 4), "shared": (4, 4)}, ["stack", "shared"], axes={"stack": "layer in out"}
    )

    def model(params, x):
        def step(x, layer):
            return lax.scan(lambda x, _: (x @ params["shared"] @ layer, None), x, None, length=2)[0], None

        return lax.scan(step, x, params["stack"])[0]

    explanation = lora_jax.explain(model, params, SHAPE((2, 4), jnp.float32))
    assert {use.path: use.flops[0] for use in explanation.uses} == dict.fromkeys(
        ("stack", "shared"), 6 * 2 * 2 * 4 * 4
    )


def test_repeated_call_counts_every_call():
    block = jax.jit(lambda w, x: x @ w)
    params = _combined({"w": (4, 4)}, "w")
    explanation = lora_jax.explain(
        lambda params, x: block(params["w"], block(params["w"], x)), params, SHAPE((2, 4), jnp.float32)
    )
    assert [use.flops[0] for use in explanation.uses] == [2 * 2 * 4 * 4] * 2


def test_branches_are_told_apart():
    """Each branch is one jaxpr, and their equations have the same numbers: of two uses, the second must not
    replace the first.
    """
    params = _combined({"w": (4, 4)}, "w", axes="in out")
    explanation = lora_jax.explain(
        lambda params, x: lax.cond(x[0, 0] > 0, lambda w: x @ w, lambda w: x @ w.T, params["w"]),
        params,
        SHAPE((2, 4), jnp.float32),
    )
    assert sorted((use.summed, use.free) for use in explanation.uses) == [((0,), (1,)), ((1,), (0,))]
    three = lambda params, x: lax.switch(jnp.int32(x[0, 0]), [lambda w: x @ w] * 3, params["w"])
    assert len(lora_jax.explain(three, params, SHAPE((2, 4), jnp.float32)).uses) == 3


def test_tied_embedding_is_contradictory():
    """The rows that an embedding looks up are its in axis; as the head it sums over the other one."""
    params = _combined({"table": (7, 4), "kernel": (4, 4)}, ["table", "kernel"])

    def tied(params, indices):
        return params["table"][indices] @ params["kernel"] @ params["table"].T

    explanation = lora_jax.explain(tied, params, SHAPE((2,), jnp.int32))
    assert explanation.contradictory == ["table"]
    assert str(explanation).endswith("table: in and out axes differ between its uses")
    assert not explanation.formed and not explanation.unused


def test_joined_weights_are_one_use_each():
    params = _combined({"q": (4, 4), "k": (4, 4)}, ["q", "k"])
    joined = lambda params, x: x @ jnp.concatenate([params["q"], params["k"]], axis=1)
    uses = lora_jax.explain(joined, params, SHAPE((2, 4), jnp.float32)).uses
    assert [(use.path, use.how, use.flops[0]) for use in uses] == [
        ("q", "low-rank", 2 * 2 * 4 * 8),
        ("k", "low-rank", 0),
    ]


def test_a_returned_weight_is_formed():
    explanation = lora_jax.explain(lambda params: params["w"].T, _combined({"w": (3, 4)}, "w"))
    assert [(use.operation, use.how, use.source) for use in explanation.formed] == [
        ("return", "formed", "the result of `fn`")
    ]
    assert not explanation.unused


def test_scalar_arguments_stay_static():
    params = _combined({"w": (4, 4)}, "w")
    explanation = lora_jax.explain(
        lambda params, x, power: (x @ params["w"]) ** (power if power > 1 else 1),
        params,
        SHAPE((2, 4), jnp.float32),
        2,
    )
    assert len(explanation.uses) == 1 and not explanation.unused


# --- weights stored the other way ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", [LoRA(rank=2), DoRA(rank=2), VeRA(rank=2), LoRAFA(rank=2)], ids=repr)
def test_a_weight_that_is_stored_the_other_way(method):
    """`x @ w.T` of a weight adapted as `in out`. LoRA is then the same set of functions, and explain says so.
    Where the sides matter, nothing is computed.
    """
    params, x = {"w": jnp.ones((8, 16))}, jnp.ones((3, 16))
    fn = lambda params, x: x @ params["w"].T
    tree = lora_jax.combine(*lora_jax.lorafy(params, "w", method=method))
    found = lora_jax.explain(fn, tree, x)
    assert found.exchanged == ["w"] and "w: contracted along its out axes" in str(found)
    if method.sided:
        with pytest.raises(ValueError, match=r"`axes` of 'w' are 'in out'.*pass `axes={'w': 'out in'}`"):
            lora_jax.adapt(fn)(tree, x)
    else:
        assert lora_jax.adapt(fn)(tree, x).shape == (3, 8)
    right = lora_jax.combine(*lora_jax.lorafy(params, "w", method=method, axes="out in"))
    assert lora_jax.explain(fn, right, x).exchanged == [] and lora_jax.adapt(fn)(right, x).shape == (3, 8)


def test_a_table_that_is_also_the_head_is_not_stored_the_other_way():
    params, ids = {"w": jnp.ones((16, 8))}, jnp.arange(3)
    fn = lambda params, ids: params["w"][ids] @ params["w"].T
    tree = lora_jax.combine(*lora_jax.lorafy(params, "w", method=DoRA(rank=2)))
    assert lora_jax.explain(fn, tree, ids).exchanged == []
    assert lora_jax.adapt(fn)(tree, ids).shape == (3, 16)
