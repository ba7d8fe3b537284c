"""Methods beside LoRA in a training run: their rules, a quantised base, a budget."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import close, config, LORA, optax_promotes as optax_promotes, row, ROWS, started, steps

import lora_jax
from experiments.config import Budget, Mesh
from lora_jax._paths import named_leaves


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "Full"])
def test_a_quantised_base_trains(name):
    settings = (
        row(name, quantize="nf4") if name != "Full" else config({"name": "Full"}, ("bias",), quantize="nf4")
    )
    trainer, _ = started(settings)
    packed = [leaf for leaf in jax.tree.leaves(trainer.frozen) if leaf.dtype == jnp.uint8]
    assert len(packed) >= 4, "the matrices of the layer"
    losses, state, _ = steps(settings, 4)
    assert np.all(np.isfinite(losses))
    spread, other, _ = steps(dataclasses.replace(settings, mesh=Mesh(2, 2, 2)), 4)
    close(losses, spread)
    # But for the bias of the keys, whose gradient is nothing but rounding, which Adam makes large.
    compared = lambda delta: {
        path: np.delete(leaf, np.s_[8:16]) if path.endswith("c_attn/bias") else leaf
        for path, leaf in named_leaves(jax.device_get(delta))
    }
    close(compared(state.delta), compared(other.delta))


def test_the_budget_is_spent():
    """Of rank 2 in three matrices three ranks are left at the end, and the penalty reaches the gradient."""
    settings = row("AdaLoRA", steps=5)
    _, state, _ = steps(settings, 5)
    assert sum(int(np.sum(left)) for left in lora_jax.optim.ranks(state.delta).values()) == 3
    free = dataclasses.replace(
        settings,
        optimizer=dataclasses.replace(
            settings.optimizer, adalora=Budget(target_rank=1, final_steps=1, orthogonality=0.0)
        ),
    )
    _, other, _ = steps(free, 2)
    _, state, _ = steps(settings, 2)
    assert any(
        not np.allclose(one, two)
        for one, two in zip(jax.tree.leaves(state.delta), jax.tree.leaves(other.delta), strict=True)
    )


@pytest.mark.parametrize(
    "method, rules, message",
    [
        (
            LORA,
            {"adalora": Budget(1)},
            "`optimizer.adalora` is for the method AdaLoRA, and `method.name` is LoRA",
        ),
        (LORA, {"lorafa": True}, "`optimizer.lorafa` is for the method LoRAFA, and `method.name` is LoRA"),
        (ROWS["AdaLoRA"], {}, "`method.name` is AdaLoRA, which needs a budget: set `optimizer.adalora`"),
        ({"name": "DeltaLoRA", "delayed": True}, {}, "`method.delayed` waits for `start_delta`"),
        ({"name": "Dora"}, {}, "`method.name` must be one of LoRA, DoRA, .*got 'Dora'; did you mean `DoRA`"),
    ],
)
def test_rules_belong_to_methods(method, rules, message):
    with pytest.raises(ValueError, match=message):
        config(method, rules=rules)
