"""The dtype in which gradients are added, over the parts of a batch, in products and between devices.

What is asked of XLA is read from the traced step, since a compiled program for the CPU may round less. What
devices send each other is read from the program as it was right after it was divided among them.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh as DeviceMesh, NamedSharding, PartitionSpec as P
from jaxprs import equations
from narrow import ALL, arguments, config, dtypes, LORA, NARROW, started, traced, WIDE
from training import optax_promotes as optax_promotes

import lora_jax
from experiments.config import Mesh
from experiments.plan import flops
from experiments.training import loss as losses
from experiments.training.step import step_of


@pytest.mark.parametrize("reduce", ["bfloat16", "float32"])
def test_the_sum_over_parts_and_the_loss(reduce):
    """In the loop over parts every gradient is carried in `reduce`. The loss of a token is taken in float32:
    whatever has the vocabulary's size and is an exponential.
    """
    found, _, state = traced(config(dataclasses.replace(ALL, reduce=reduce), accumulate=4))
    loops = [eqn for eqn in found if eqn.primitive.name in ("while", "scan") and len(eqn.outvars) > 4]
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(state.delta))
    (loop,) = [
        eqn for eqn in loops if all(shape in [out.aval.shape for out in eqn.outvars] for shape in shapes)
    ]
    assert {out.aval.dtype for out in loop.outvars if out.aval.shape in shapes} == {jnp.dtype(reduce)}
    exponentials = {
        eqn.outvars[0].aval.dtype
        for eqn in found
        if eqn.primitive.name == "exp" and eqn.outvars[0].aval.shape[-1:] == (32,)
    }
    assert exponentials == {jnp.dtype("float32")}


def test_many_parts_are_added_without_loss():
    """1,024 parts in bfloat16: their float32 sum is that of all, a bfloat16 sum of ones stays at 256."""
    parts = 1024
    random = np.random.default_rng(0)
    values = jnp.asarray(random.uniform(0.5, 1.5, (parts, 16)), NARROW)

    def loss(delta, frozen, piece, key):
        return jnp.sum((delta["w"].astype(NARROW) * piece["x"]).astype(jnp.float32)), jnp.float32(1)

    def gradient(reduce):
        step = step_of(loss, optax.sgd(1.0), parts, None, reduce)
        delta = {"w": jnp.zeros(16)}
        return -np.asarray(
            jax.jit(step)(delta, optax.sgd(1.0).init(delta), None, {"x": values}, jax.random.key(0))[0]["w"],
            np.float64,
        )

    exact = np.asarray(values, np.float64).mean(0)
    error = lambda found: np.abs(found - exact).max() / np.abs(exact).max()
    assert error(gradient("float32")) < 1e-5
    assert error(gradient("bfloat16")) > 0.5


def test_a_number_of_tokens_is_never_rounded():
    mask = jnp.ones((1, 257), bool)
    total, count = losses.masked_sum(jnp.zeros((1, 257)), mask, NARROW)
    assert (total.dtype, count.dtype, float(count)) == (NARROW, WIDE, 257.0)


@pytest.fixture
def compiled_anew():
    """A program that JAX finds on disk is not compiled, and leaves no text."""
    was = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks once whether there is a cache
    yield
    jax.config.update("jax_enable_compilation_cache", was)
    compilation_cache.reset_cache()


def sent(settings, tmp_path):
    """(dtype, shape) of what devices add up of each other, in the step right after it was divided among
    them.
    """
    trainer, state = started(settings)
    lowered = trainer.compiled_step(state).lower(*arguments(trainer, state))
    lowered.compile(
        compiler_options={
            "xla_dump_to": str(tmp_path),
            "xla_dump_hlo_pass_re": "spmd.*",
            "xla_backend_optimization_level": 0,
        }
    )
    (text,) = (path.read_text() for path in tmp_path.glob("*after_spmd-partitioning*"))
    sums = re.findall(r"= (\w+)\[([\d,]*)\]\S* (?:all-reduce|reduce-scatter)\(", text)
    return [
        (dtype, shape)
        for dtype, text in sums
        if len(shape := tuple(map(int, filter(None, text.split(","))))) > 1
    ]


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_devices_add_gradients_in_reduce(shape, tmp_path, compiled_anew):
    """Those of A and B; in bfloat16 where the policy says so, which is also what JAX does by itself."""
    method = {**LORA, "blocks": None}
    for reduce, expected in (("float32", "f32"), ("bfloat16", "bf16")):
        directory = tmp_path / reduce
        found = sent(config(dataclasses.replace(ALL, reduce=reduce), method, mesh=Mesh(*shape)), directory)
        # A is (8, 2) and B (2, 24); a product that is itself a sum over devices has the batch among its axes.
        gradients = [dtype for dtype, size in found if 2 in size and len(size) == 2]
        assert len(gradients) >= 2 and set(gradients) == {expected}, found


def linear(reduce):
    """The loss of a layer in bfloat16, and what goes into it: whole numbers, so small that no product of
    them is rounded, only their sums are.
    """
    random = np.random.default_rng(0)
    draw = lambda most, *shape: jnp.asarray(random.integers(-most, most + 1, shape), jnp.float32)
    frozen, delta = lora_jax.lorafy(
        {"w": draw(1, 16, 8).astype(NARROW)}, "w", method=lora_jax.LoRA(rank=4, alpha=4)
    )
    delta = jax.tree.map(lambda leaf: draw(1, *leaf.shape), delta)
    forward = lora_jax.adapt(lambda params, x: x @ params["w"], reduce=reduce)

    def loss(delta, x, cotangent):
        with jax.numpy_dtype_promotion("strict"):
            return jnp.sum(
                forward(lora_jax.combine(frozen, delta), x).astype(jnp.float32)
                * cotangent.astype(jnp.float32)
            )

    return loss, delta, draw(3, 4096, 16).astype(NARROW), draw(3, 4096, 8).astype(NARROW)


def errors(found, delta, x, cotangent):
    """The largest difference to the gradients of A and B in float64."""
    a, b, x, cotangent = (
        np.asarray(array, np.float64)
        for array in (delta["w"].arrays["a"], delta["w"].arrays["b"], x, cotangent)
    )
    wanted = {"a": x.T @ (cotangent @ b.T), "b": (x @ a).T @ cotangent}
    return [np.abs(np.asarray(found["w"].arrays[name], np.float64) - wanted[name]).max() for name in "ab"]


def test_a_gradient_is_as_exact_as_its_operands():
    """Made by a product of two narrow operands with a wide result. XLA for the CPU may round less than it
    is asked to; so both are looked at.
    """
    for reduce, expected in ((jnp.float32, WIDE), (None, NARROW)):
        loss, *operands = linear(reduce)
        products = [
            eqn
            for eqn in equations(jax.make_jaxpr(jax.grad(loss))(*operands))
            if eqn.primitive.name == "dot_general"
        ]
        made = [eqn for eqn in products if sorted(eqn.outvars[0].aval.shape) in ([4, 16], [4, 8])]
        assert [eqn.outvars[0].aval.dtype for eqn in made] == [expected, expected]
        assert {atom.aval.dtype for eqn in made for atom in eqn.invars} == {NARROW}
    assert errors(jax.jit(jax.grad(linear(jnp.float32)[0]))(*operands), *operands) == [0, 0]


def _checkpointed(loss):
    return jax.checkpoint(loss)


def _vmapped(loss):
    return lambda delta, x, cotangent: jnp.sum(
        jax.vmap(loss, (None, 0, 0))(delta, x.reshape(8, -1, 16), cotangent.reshape(8, -1, 8))
    )


def _scanned(loss):
    def scanned(delta, x, cotangent):
        body = lambda total, rows: (total + loss(delta, *rows), None)
        return jax.lax.scan(body, jnp.float32(0), (x.reshape(8, -1, 16), cotangent.reshape(8, -1, 8)))[0]

    return scanned


def _on_devices(explicit):
    def wrap(loss):
        kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
        rows = NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(kind,)), P("data"))
        return lambda delta, x, cotangent: loss(
            delta, jax.device_put(x, rows), jax.device_put(cotangent, rows)
        )

    return wrap


def _in_shard_map(loss):
    mesh = DeviceMesh(np.array(jax.devices()), ("data",))
    own = lambda *operands: jax.lax.psum(loss(*operands), "data")
    return jax.shard_map(own, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P())


WRAPPERS = {
    "checkpoint": _checkpointed,
    "vmap": _vmapped,
    "scan": _scanned,
    "auto mesh": _on_devices(False),
    "explicit mesh": _on_devices(True),
    "shard_map": _in_shard_map,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_reduce_goes_through_transformations(name):
    loss, *operands = linear(jnp.float32)
    found = jax.jit(jax.grad(WRAPPERS[name](loss)))(*operands)
    assert dtypes(found) == {WIDE} and errors(jax.device_get(found), *operands) == [0, 0]


def test_reduce_costs_nothing():
    """The same FLOPs, whatever is differentiated, the same forward pass to the bit, and no more temporary
    bytes.
    """
    costs = []
    for reduce in (None, jnp.float32):
        loss, *operands = linear(reduce)
        compiled = jax.jit(jax.grad(loss)).lower(*operands).compile()
        work = [flops.of(jax.grad(loss, which), *operands) for which in (0, 1, (0, 1))]
        costs.append((work, float(jax.jit(loss)(*operands)), compiled.memory_analysis().temp_size_in_bytes))
    (plain, value, temporaries), (work, other, more) = costs
    assert (plain, value) == (work, other) and more <= temporaries


def test_lookups_have_the_gradient_they_had():
    """`reduce` only rounds less."""
    grads = []
    for reduce in ("bfloat16", "float32"):
        trainer, state = started(
            config(
                dataclasses.replace(ALL, reduce=reduce),
                {**LORA, "blocks": None},
                ("wte/embedding", "attn/c_attn/kernel"),
            )
        )
        delta = jax.tree.map(lambda leaf: leaf + 0.1, state.delta)
        batch = jax.tree.map(lambda array: array[0], arguments(trainer, state)[3])
        grads.append(
            jax.jit(
                jax.grad(lambda delta: trainer.loss(delta, trainer.frozen, batch)[0].astype(jnp.float32))
            )(delta)
        )
    norm = lambda tree: float(optax.tree.norm(tree))
    assert 0 < norm(jax.tree.map(jnp.subtract, *grads)) < 0.03 * norm(grads[1])


def test_reduce_is_checked_and_forward_mode_is_named():
    with pytest.raises(
        ValueError,
        match="`reduce` is 'int32'; gradients are summed in a floating-point dtype: pass `jnp.float32`",
    ):
        lora_jax.adapt(lambda params: params, reduce=jnp.int32)
    for reduce in (None, jnp.float32):
        loss, delta, x, cotangent = linear(reduce)
        forwards = lambda: jax.jvp(lambda delta: loss(delta, x, cotangent), (delta,), (delta,))
        if reduce is None:
            forwards()
        else:
            with pytest.raises(TypeError, match="forward-mode"):
                forwards()
