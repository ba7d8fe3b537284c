"""Methods beside LoRA in a training run: their rules, a quantised base, a budget."""

import dataclasses

import jax
import numpy as np
import pytest
from training import config, LORA, optax_promotes as optax_promotes, row, ROWS, steps

import lora_jax
from experiments.config import Budget


def test_the_budget_is_spent():
    """Of rank 2 in three matrices three ranks are left at the end, and the penalty reaches the gradient."""
    settings = row("AdaLoRA", steps=5)
    state = steps(settings, 5).state
    assert sum(int(np.sum(left)) for left in lora_jax.optim.ranks(state.delta).values()) == 3
    free = dataclasses.replace(
        settings,
        optimizer=dataclasses.replace(
            settings.optimizer, adalora=Budget(target_rank=1, final_steps=1, orthogonality=0.0)
        ),
    )
    ours, theirs = (jax.tree.leaves(steps(one, 2).state.delta) for one in (settings, free))
    assert any(not np.allclose(one, two) for one, two in zip(ours, theirs, strict=True))


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
        (
            {"name": "Dora"},
            {},
            "`method.name` must be one of AdaLoRA, DeltaLoRA, .*got 'Dora'; did you mean `DoRA`",
        ),
    ],
)
def test_rules_belong_to_methods(method, rules, message):
    with pytest.raises(ValueError, match=message):
        config(method, rules=rules)
