"""LoRA+, LoRA-FA's corrected gradient and AdaLoRA's budget, against PEFT taking the same steps on the same
loss in float64.

Adam needs JAX's default promotion, because Optax raises floats to integer powers of its counters.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from update_trees import adalora_of, leaves, SCHEDULE

import lora_jax
from lora_jax import AdaLoRA, DoRA, Full, LoRA, LoRAFA, VeRA
from lora_jax._paths import named_leaves
from lora_jax.optim import lorafa, loraplus, ranks


SIZES = {"up": (6, 5), "mid": (5, 5), "head": (5, 4)}
STEPS = 10
NAMES = {
    "lora_A": "a",
    "lora_B": "b",
    "lora_E": "e",
    "lora_magnitude_vector": "m",
    "vera_lambda_b": "b",
    "vera_lambda_d": "d",
}


@pytest.fixture(scope="module")
def peft(torch):
    pytest.importorskip("peft.optimizers", reason="PEFT is not installed: pip install 'lora_jax[torch]'")
    return pytest.importorskip("peft")


def network(params, x):
    for name in SIZES:
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    return x


def batches(count):
    rng = np.random.default_rng(3)
    return [(rng.normal(size=(8, 6)), rng.normal(size=(8, 4))) for _ in range(count)]


def theirs_of(torch, peft, config):
    """The same network under PEFT in float64, with random numbers in all that trains. Its loss is in what
    it returns.
    """

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, sizes in SIZES.items():
                setattr(self, name, torch.nn.Linear(*sizes))

        def forward(self, x, y):
            x, y = torch.tensor(x), torch.tensor(y)
            for name in SIZES:
                x = torch.tanh(getattr(self, name)(x))
            return types.SimpleNamespace(loss=((x - y) ** 2).mean())

    generator = torch.Generator().manual_seed(0)
    model = peft.get_peft_model(Network(), config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
        for name, parameter in model.named_parameters():
            if "ranknum" in name:
                parameter.fill_(config.init_r)
    return model


def numbers_of(model):
    """The parameters of PEFT's model, under our paths."""
    found = {}
    for name, parameter in model.named_parameters():
        parts, value = name.split("."), parameter.detach().numpy().copy()
        module, kind = (
            next(part for part in parts if part in SIZES),
            next((NAMES[part] for part in parts if part in NAMES), None),
        )
        if kind is not None:
            found[f"{module}/kernel/{kind}"] = value.reshape(-1) if kind == "e" else value.T
        elif not {"ranknum", "original_module"} & set(parts):
            found[f"{module}/kernel" if parts[-1] == "weight" else f"{module}/bias"] = value.T
    return found


def ours_of(model, method, targets, head=()):
    """`(frozen, delta)` with PEFT's numbers."""
    numbers = numbers_of(model)
    params = {
        name: {"kernel": jnp.asarray(numbers[f"{name}/kernel"]), "bias": jnp.asarray(numbers[f"{name}/bias"])}
        for name in SIZES
    }
    trees = lora_jax.lorafy(params, {f"({targets})/kernel": method} | {f"{name}/.*": Full() for name in head})
    replaced = ([jnp.asarray(numbers.get(path, leaf)) for path, leaf in named_leaves(tree)] for tree in trees)
    return tuple(map(jax.tree.unflatten, map(jax.tree.structure, trees), replaced))


def loss(delta, frozen, x, y, orthogonality=0.0):
    total = jnp.mean((lora_jax.adapt(network)(lora_jax.combine(frozen, delta), x) - y) ** 2)
    return total + orthogonality * lora_jax.methods.orthogonality(delta) if orthogonality else total


def stepper(tx, frozen, **options):
    @jax.jit
    def step(delta, state, x, y):
        value, gradient = jax.value_and_grad(loss)(delta, frozen, x, y, **options)
        updates, state = tx.update(gradient, state, delta)
        return optax.apply_updates(delta, updates), state, value

    return step


def same(delta, model, rtol=1e-12):
    numbers = numbers_of(model)
    for path, leaf in leaves(delta).items():
        np.testing.assert_allclose(leaf, numbers[path], rtol=rtol, atol=rtol, err_msg=path)


def followed(model, optimizer, tx, frozen, delta):
    """Ten steps of both, compared after each."""
    step, state, start = stepper(tx, frozen), tx.init(delta), delta
    for x, y in batches(STEPS):
        optimizer.zero_grad()
        value = model(x, y).loss
        value.backward()
        optimizer.step()
        delta, state, ours = step(delta, state, x, y)
        np.testing.assert_allclose(ours, value.item(), rtol=1e-12)
        same(delta, model)
    assert all(
        np.abs(a - b).max() > 0.01
        for a, b in zip(jax.tree.leaves(delta), jax.tree.leaves(start), strict=True)
    ), "all of it moved"


def test_loraplus_is_pefts(torch, peft, x64, relaxed_promotion):
    """Ten steps of AdamW with DoRA and a head, to 1e-12: A and B, the lengths, a matrix and a bias, of
    which only the last never decays.
    """
    model = theirs_of(
        torch,
        peft,
        peft.LoraConfig(
            r=2, lora_alpha=4, target_modules=["up", "mid"], use_dora=True, modules_to_save=["head"]
        ),
    )
    optimizer = peft.optimizers.create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=5e-3,
        loraplus_lr_ratio=8,
        loraplus_weight_decay=0.3,
        betas=(0.9, 0.99),
        eps=1e-8,
    )
    frozen, delta = ours_of(model, DoRA(rank=2, alpha=4), "up|mid", head=["head"])
    decays = {**jax.tree.map(lambda _: True, delta), "head": {"kernel": True, "bias": False}}
    tx = loraplus(optax.adamw(5e-3, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.3, mask=decays), 8)
    followed(model, optimizer, tx, frozen, delta)


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "VeRA", "AdaLoRA"])
def test_loraplus_has_pefts_groups(torch, peft, method):
    own = dict(target_modules=["up", "mid"], modules_to_save=["head"])
    config, ours = {
        "LoRA": lambda: (peft.LoraConfig(r=2, **own), LoRA(rank=2)),
        "DoRA": lambda: (peft.LoraConfig(r=2, use_dora=True, **own), DoRA(rank=2)),
        "VeRA": lambda: (peft.VeraConfig(r=2, **own), VeRA(rank=2)),
        "AdaLoRA": lambda: (peft.AdaLoraConfig(init_r=2, target_r=1, total_step=9, **own), AdaLoRA(rank=2)),
    }[method]()
    model = theirs_of(torch, peft, config)
    optimizer = peft.optimizers.create_loraplus_optimizer(model, torch.optim.SGD, lr=1.0, loraplus_lr_ratio=8)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    before = numbers_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= rates.get(id(parameter), 0.0)
    expected = {path: before[path] - value for path, value in numbers_of(model).items()}
    _, delta = ours_of(model, ours, "up|mid", head=["head"])
    tx = loraplus(optax.sgd(1.0), 8)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, delta), tx.init(delta), delta)
    for path, update in leaves(updates).items():
        np.testing.assert_allclose(-update, expected[path], rtol=1e-5, err_msg=path)


def test_lorafa_is_pefts(torch, peft, x64, relaxed_promotion, monkeypatch):
    """Ten steps, to 1e-12. PEFT is kept from its bfloat16, and its Adam from its own place for epsilon,
    which is not the rule's affair.
    """
    monkeypatch.setattr(peft.optimizers.lorafa, "is_bf16_available", lambda: False)
    model = theirs_of(
        torch,
        peft,
        peft.LoraConfig(r=2, lora_alpha=6, target_modules=["up", "mid"], modules_to_save=["head"]),
    )
    optimizer = peft.optimizers.create_lorafa_optimizer(model, r=2, lora_alpha=6, lr=5e-3, weight_decay=0.3)
    optimizer.param_groups[0]["eps"] = 0.0
    frozen, delta = ours_of(model, LoRAFA(rank=2, alpha=6), "up|mid", head=["head"])
    decay = optax.stateless(
        lambda updates, delta: jax.tree.map(lambda u, p: u - 5e-3 * 0.3 * (p + u), updates, delta)
    )
    followed(
        model, optimizer, optax.chain(lorafa(frozen, delta), optax.adam(5e-3, eps=0.0), decay), frozen, delta
    )


def test_adalora_is_pefts(torch, peft, x64, relaxed_promotion):
    """Twenty-two steps of AdamW through every phase: loss with its regulariser, averages, budget, mask
    and numbers, to 1e-12.
    """
    settings = dict(
        init_r=4, target_r=2, tinit=3, tfinal=4, total_step=20, deltaT=3, orth_reg_weight=0.5, lora_alpha=6
    )
    model = theirs_of(torch, peft, peft.AdaLoraConfig(target_modules=list(SIZES), **settings))
    allocator, config = model.base_model.rankallocator, model.peft_config["default"]
    optimizer = torch.optim.AdamW(
        [parameter for name, parameter in model.named_parameters() if "lora_" in name],
        lr=0.02,
        weight_decay=0.1,
    )
    frozen, delta = ours_of(model, AdaLoRA(rank=4, alpha=6), "|".join(SIZES))
    tx = adalora_of(optax.adamw(0.02, weight_decay=0.1), **SCHEDULE)
    step, state, given_up = stepper(tx, frozen, orthogonality=0.5), tx.init(delta), []
    for number, (x, y) in enumerate(batches(22), 1):
        optimizer.zero_grad()
        value = model.base_model(x, y).loss  # not `model(x, y)`, which leaves out the regulariser
        value.backward()
        optimizer.step()
        model.base_model.update_and_allocate(number)
        delta, state, ours = step(delta, state, x, y)
        np.testing.assert_allclose(ours, value.item(), rtol=1e-12)
        same(delta, model)
        budget, due = allocator.budget_schedule(number)
        left = ranks(delta)
        if due or number >= 16:
            assert sum(left.values()) == budget
            pattern = {name.split(".")[0]: mask for name, mask in config.rank_pattern.items()}
            assert {name: (delta[name]["kernel"].arrays["e"] != 0).tolist() for name in SIZES} == pattern
        given_up.append(12 - sum(left.values()))
        for found, averages in (
            (state.sensitivity, allocator.exp_avg_ipt),
            (state.uncertainty, allocator.exp_avg_unc),
        ):
            for name, theirs in averages.items():
                module, kind, _ = name.split(".")
                kind = NAMES[kind]
                theirs = theirs.numpy().reshape(-1) if kind == "e" else theirs.numpy().T
                np.testing.assert_allclose(
                    found[module]["kernel"].arrays[kind], theirs, rtol=1e-9, atol=1e-14
                )
    assert given_up[:6] == [0, 0, 0, 0, 0, 4] and given_up[-7:] == [6] * 7
