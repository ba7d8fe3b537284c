"""DyLoRA draws one rank for a step and trains what the paper says of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from method_columns import adapted, close
from method_rows import case, moved, quickly

import lora_jax
from lora_jax import DyLoRA, LoRA
from lora_jax._tree.nodes import is_node
from lora_jax.methods import truncate


RANK = 4


def dylora(train="last"):
    params = {"p": jnp.zeros((RANK, RANK)), "q": jnp.zeros((RANK, RANK)), "stack": jnp.zeros((3, RANK, RANK))}
    axes = {"stack": "layer in out"}
    frozen, delta = lora_jax.lorafy(
        params, ".*", method=DyLoRA(rank=RANK, alpha=12, train=train), axes={**axes, "p|q": "in out"}
    )
    identity = jax.tree.map(
        lambda array: jnp.broadcast_to(jnp.eye(RANK, dtype=array.dtype), array.shape), delta
    )

    def outputs(params, x):
        layers = lax.scan(lambda total, w: (total, x @ w), 0, params["stack"])[1]
        return jnp.stack([x @ params["p"], x @ params["q"], *layers])

    return frozen, identity, lora_jax.adapt(outputs)


def test_dylora_draws_a_rank_for_the_whole_model():
    """Uniform on 1 … r; one for all leaves and layers of a step; with alpha / b."""
    frozen, identity, forward = dylora()
    keys = jax.random.split(jax.random.key(0), 4000)
    outputs = np.asarray(
        quickly(jax.vmap(lambda key: forward(lora_jax.combine(frozen, identity, key=key), jnp.ones(RANK))))(
            keys
        )
    )
    ranks = (outputs[:, 0] > 0).sum(1)
    expected = np.where(np.arange(RANK)[None] < ranks[:, None], 12 / ranks[:, None], 0.0)
    np.testing.assert_allclose(outputs, np.broadcast_to(expected[:, None], outputs.shape), rtol=1e-6)
    counts = np.bincount(ranks, minlength=RANK + 1)
    assert counts[0] == 0 and np.all(np.abs(counts[1:] - 1000) < 5 * np.sqrt(4000 * 0.25 * 0.75))


@pytest.mark.parametrize("train", ["last", "all"])
def test_dylora_gradients(train):
    """Those of the equation at the drawn rank, in its last column of A and row of B, or in its first ones."""
    frozen, identity, forward = dylora(train)
    delta = moved(identity)
    a, b = (np.asarray(delta["p"].arrays[name]) for name in "ab")
    x = np.random.default_rng(1).normal(size=(2, RANK)).astype("float32")
    gradient = quickly(
        jax.grad(lambda delta, key: jnp.sum(forward(lora_jax.combine(frozen, delta, key=key), x)[0] ** 2))
    )
    seen = set()
    for seed in range(12):
        found = gradient(delta, jax.random.key(seed))["p"].arrays
        rank = int(np.flatnonzero(np.any(found["b"] != 0, axis=1))[-1]) + 1
        h, scale = x @ a[:, :rank], 12 / rank
        slope = 2 * scale**2 * h @ b[:rank]
        whole = np.zeros_like(a), np.zeros_like(b)
        whole[0][:, :rank], whole[1][:rank] = x.T @ slope @ b[:rank].T, h.T @ slope
        trains = np.arange(RANK) == rank - 1 if train == "last" else np.arange(RANK) < rank
        np.testing.assert_allclose(found["a"], whole[0] * trains[None], rtol=2e-5, atol=1e-5)
        np.testing.assert_allclose(found["b"], whole[1] * trains[:, None], rtol=2e-5, atol=1e-5)
        seen.add(rank)
    assert seen == {1, 2, 3, 4}


def test_truncate():
    """At every rank: what the equation says, and what a step that drew it computed."""
    here = case("DyLoRA")
    forward = quickly(lambda delta, key: adapted(here.frozen, delta, key=key))
    drawn = {}
    for seed in range(8):
        key = jax.random.key(seed)
        drawn.setdefault(int(jax.random.randint(key, (), 0, 2)) + 1, forward(here.delta, key))
    for rank in (1, 2):
        cut = truncate(here.delta, rank)
        assert {
            type(node.spec.method) for node in jax.tree.leaves(cut, is_leaf=is_node) if node is not None
        } == {LoRA}
        merged, output = quickly(lambda cut: (lora_jax.merge(here.frozen, cut), adapted(here.frozen, cut)))(
            cut
        )
        a, b = (np.asarray(here.delta["heads"].arrays[name]) for name in "ab")
        update = 3 / rank * np.einsum("ir,rhk->ihk", a[:, :rank], b[:rank])
        close(merged["heads"], np.asarray(here.params["heads"]) + update, 1e-6)
        a, b = (np.asarray(here.delta["layers"]["up"].arrays[name]) for name in "ab")
        update = 3 / rank * np.einsum("lir,lro->lio", a[..., :rank], b[:, :rank])
        close(merged["layers"]["up"], np.asarray(here.params["layers"]["up"]) + update, 1e-6)
        close(output, drawn[rank], 1e-5)
    for rank in (0, 3, 1.0, True):
        with pytest.raises(ValueError, match=rf"`rank` is {rank}; 'heads' can be truncated to 1 … 2"):
            truncate(here.delta, rank)
    with pytest.raises(ValueError, match="holds no DyLoRA adapter"):
        truncate(case("LoRA").delta, 1)
