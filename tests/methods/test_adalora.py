"""AdaLoRA's orthogonality."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from method_rows import case

import lora_jax
from lora_jax import AdaLoRA
from lora_jax._tree.nodes import Adapter, is_node
from lora_jax.methods import orthogonality
from lora_jax.sharding import delta_specs, shardings


def test_orthogonality():
    """The mean of Frobenius norms over A and B of every layer of every leaf; zero for orthonormal ones,
    and it has a gradient.
    """
    here = case("AdaLoRA")
    norms = []
    for node in jax.tree.leaves(here.delta, is_leaf=is_node):
        if isinstance(node, Adapter):
            layers = node.spec.axes.count("layer")
            a, b = (np.asarray(node.arrays[name], np.float64) for name in "ab")
            a = a.reshape(*(a.shape[:1] if layers else (1,)), -1, 2)
            b = b.reshape(len(a), 2, -1)
            norms += [
                np.linalg.norm(gram - np.eye(2))
                for one, two in zip(a, b, strict=True)
                for gram in (one.T @ one, two @ two.T)
            ]
    assert len(norms) == 2 * (3 + 3 + 4)
    value_and_gradient = jax.jit(jax.value_and_grad(orthogonality))
    value, gradient = value_and_gradient(here.delta)
    np.testing.assert_allclose(value, np.mean(norms), rtol=1e-5)
    shapes = {"w": jax.ShapeDtypeStruct((3, 8, 6), "float32")}
    delta = lora_jax.lorafy(shapes, "w", method=AdaLoRA(rank=2), axes="layer in out").delta
    delta["w"].arrays.update(
        a=np.tile(np.eye(8, 2, dtype="float32"), (3, 1, 1)),
        b=np.tile(np.eye(2, 6, dtype="float32"), (3, 1, 1)),
        e=np.ones((3, 2), "float32"),
    )
    value, slope = value_and_gradient(delta)
    assert value == 0
    assert not any(map(np.any, jax.tree.leaves(slope))), (
        "at an orthonormal A and B the root has no derivative"
    )
    assert all(
        np.any(node.arrays[name] != 0)
        for node in jax.tree.leaves(gradient, is_leaf=is_node)
        if isinstance(node, Adapter)
        for name in "ab"
    )
    with pytest.raises(ValueError, match="holds no AdaLoRA adapter"):
        orthogonality(case("LoRA").delta)


@pytest.mark.parametrize(
    "word, spec", [("in out", P("fsdp", "tensor")), ("layer in out", P(None, "fsdp", "tensor"))]
)
def test_orthogonality_on_explicit_axes(word, spec):
    """As `jax.make_mesh` makes them, where a sum over split axes has to be told how its result lies."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    shape = jax.ShapeDtypeStruct((3, 8, 6)[3 - len(spec) :], "float32")
    delta = lora_jax.lorafy({"w": shape}, "w", method=AdaLoRA(rank=2), axes=word).delta
    rng = np.random.default_rng(0)
    delta = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), delta)
    placed = jax.device_put(delta, shardings(mesh, delta_specs(delta, {"w": spec}), delta))
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6),
        *(jax.jit(jax.value_and_grad(orthogonality))(tree) for tree in (placed, delta)),
    )
