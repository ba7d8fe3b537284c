"""VeRA: one pair of projections for all leaves of a rank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_columns import close
from method_rows import AXES, case, WIDTH

import lora_jax
from lora_jax import VeRA
from lora_jax._tree.nodes import Fixed, is_node, resolved, Shared


def test_vera_shares_one_pair_of_projections():
    here = case("VeRA")
    nodes = {
        node.spec.path: node
        for node in jax.tree.leaves(here.frozen, is_leaf=is_node)
        if isinstance(node, Fixed)
    }
    owners = [path for path, node in nodes.items() if not isinstance(node.arrays["shared_a"], Shared)]
    assert owners == ["heads"]
    owner = nodes["heads"].arrays
    # As large as the largest leaf needs, and counted once.
    assert (owner["shared_a"].shape, owner["shared_b"].shape) == ((20, 5), (5, 24))
    held = sum(leaf.size for leaf in jax.tree.leaves(here.frozen)) - sum(
        leaf.size for leaf in jax.tree.leaves(here.params)
    )
    assert held == 20 * 5 + 5 * 24
    for node in resolved(jax.tree.leaves(here.frozen, is_leaf=is_node)):
        if isinstance(node, Fixed):
            assert all(node.arrays[name] is owner[name] for name in owner)
    # Of the seed alone: neither the key nor the weights.
    params = jax.tree.map(lambda array: 3 * array, here.params)
    of_seed = lambda seed: (
        lora_jax.lorafy(
            params, "|".join(AXES), method=VeRA(rank=5, seed=seed), axes=AXES, key=jax.random.key(9)
        ).frozen
    )
    again, other = (of_seed(seed)["heads"].arrays for seed in (0, 1))
    for name in owner:
        np.testing.assert_array_equal(again[name], owner[name])
        assert not np.any(other[name] == owner[name])
    # Two pools for two methods; one path is enough for a pool of its own.
    mixed = lora_jax.lorafy(
        params, {"heads": VeRA(rank=5, seed=1), "qkv|table": VeRA(rank=5)}, axes=AXES
    ).frozen
    assert [type(mixed[path].arrays["shared_a"]) is Shared for path in ("heads", "qkv", "table")] == [
        False,
        False,
        True,
    ]
    assert (mixed["heads"].arrays["shared_a"].shape, mixed["qkv"].arrays["shared_a"].shape) == (
        (8, 5),
        (18, 5),
    )


def test_vera_without_the_leaf_that_has_the_projections():
    """A borrower alone cannot be merged nor run, and says whom it borrows from."""
    here = case("VeRA")
    frozen, delta = ({"qkv": tree["qkv"]} for tree in (here.frozen, here.delta))
    message = (
        "the adapter of 'qkv' shares shared_a with that of 'heads', which is missing: pass the whole tree"
    )
    with pytest.raises(ValueError, match=message):
        lora_jax.merge(frozen, delta)
    forward = lora_jax.adapt(lambda params, x: x @ params["qkv"])
    with pytest.raises(ValueError, match=message):
        forward(lora_jax.combine(frozen, delta), jnp.ones((2, WIDTH)))
    # With its owner, and nothing else, it can.
    frozen, delta = ({"qkv": tree["qkv"], "heads": tree["heads"]} for tree in (here.frozen, here.delta))
    merged = lora_jax.merge(frozen, delta)
    np.testing.assert_array_equal(merged["qkv"], lora_jax.merge(here.frozen, here.delta)["qkv"])
    close(
        forward(lora_jax.combine(frozen, delta), jnp.ones((2, WIDTH))),
        jnp.ones((2, WIDTH)) @ merged["qkv"],
        1e-6,
    )
