"""Weights on a mesh whose axes are explicit or manual, and inner jits with shardings of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against_merged import adapted, assert_equal_to_merged, cosines, two_devices
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lora_jax
from lora_jax import LoRA
from lora_jax.sharding import delta_specs, frozen_specs, shardings


@pytest.mark.parametrize("spec", [P(None, "model"), P("model", None)], ids=["out", "in"])
def test_explicit_mesh(spec):
    """On a mesh of explicit axes, which `jax.make_mesh` makes by default, shardings are part of every
    type.
    """
    with jax.set_mesh(two_devices(AxisType.Explicit)):
        params = {"w": jax.device_put(cosines(6, 8).astype(jnp.float32), spec)}
        x = jax.device_put(cosines(4, 6).astype(jnp.float32), P(None, None))

        def fn(params):
            gathered = jax.sharding.reshard(params["w"], P(None, None))
            return x @ gathered, jnp.matmul(x, params["w"], out_sharding=P(None, None))

        frozen, delta = adapted(params, "w", method=LoRA(rank=2), fn=fn)
        assert_equal_to_merged([(fn, frozen, delta)], rtol=1e-4)


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
    params, x = {"w": cosines(8, 12).astype(jnp.float32)}, cosines(16, 8).astype(jnp.float32)
    frozen, delta = adapted(params, "w", method=method, axes="in out", key=jax.random.key(0))

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
        x, w, mesh = cosines(4, 6), params["w"], two_devices()
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

    assert_equal_to_merged([(fn, *adapted({"w": cosines(6, 8)}, "w", method=LoRA(rank=2), fn=fn))])


def test_inner_jits_keep_their_own_shardings():
    """Two jits of one function share its jaxpr and nothing else."""
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2])
    there = [jax.sharding.NamedSharding(mesh, spec) for spec in (P("d", None), P(None, "d"))]

    def product(x, w):
        return x @ w

    calls = [jax.jit(product, out_shardings=sharding) for sharding in there]
    frozen, delta = lora_jax.lorafy({"w": cosines(6, 4)}, "w", method=LoRA(rank=1))
    fn = lambda params, x: [call(x, params["w"]) for call in calls]
    found = jax.jit(lora_jax.adapt(fn))(lora_jax.combine(frozen, delta), cosines(2, 6))
    assert [out.sharding.spec for out in found] == [
        out.sharding.spec for out in jax.jit(fn)(frozen, cosines(2, 6))
    ]
    assert found[0].sharding.spec != found[1].sharding.spec
