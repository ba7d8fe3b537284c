"""LoRA-FA keeps nothing of the input for the backward pass."""

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from lora_jax import LoRA, LoRAFA


@pytest.mark.parametrize(
    "method, keeps_input", [(LoRAFA(rank=2), False), (LoRA(rank=2), True)], ids=["LoRA-FA", "LoRA"]
)
def test_lora_fa_keeps_nothing_of_the_input(method, keeps_input):
    """What waits for the backward pass: x·A, of width rank, and for LoRA x as well."""
    frozen, delta = lora_jax.lorafy({"w": jnp.ones((24, 10))}, "w", method=method)
    forward = lora_jax.adapt(lambda params, x: x @ params["w"])
    _, backward = jax.vjp(
        lambda delta, x: forward(lora_jax.combine(frozen, delta), x), delta, jnp.ones((7, 24))
    )
    kept = [leaf.shape for leaf in jax.tree.leaves(backward)]
    assert (7, 2) in kept and ((7, 24) in kept) == keeps_input
    assert not [shape for shape in kept if shape[:1] == (7,) and shape[1] > (24 if keeps_input else 2)]
