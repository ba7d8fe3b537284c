"""The authors' AdamW: against its definition in float64, and against PyTorch taking the same steps on the
same loss.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import optax_promotes as optax_promotes

import lora_jax
from experiments.config import Budget, Optimizer, Train
from experiments.training import loss as losses, optimizer
from lora_jax import optim
from lora_jax.models import cross_entropy


STEPS = 20
TRAIN = Train(steps=STEPS, batch=1, lr=1e-2, warmup=5, label_smoothing=0.1)
SECTION = Optimizer("adamw_authors", b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.1)


def rate(step):
    """The authors' schedule, written once more: `LambdaLR` asks it for step 0 before the first update."""
    return TRAIN.lr * (step / 5 if step < 5 else max(0, STEPS - step) / (STEPS - 5))


def test_schedule_starts_at_zero_and_ends_at_zero():
    rate = optimizer.warmup_linear(Train(steps=26290, batch=8, lr=2e-4, warmup=500))
    expected = {0: 0.0, 250: 1e-4, 499: 0.998 * 2e-4, 500: 2e-4, 13395: 1e-4, 26290: 0.0, 26300: 0.0}
    for step, wanted in expected.items():
        np.testing.assert_allclose(rate(step), wanted, rtol=1e-6)
    flat = optimizer.warmup_linear(Train(steps=4, batch=1, lr=1.0))
    np.testing.assert_allclose([flat(step) for step in range(5)], [1, 0.75, 0.5, 0.25, 0])


def followed(section, weights, gradients, train=TRAIN):
    """The weights after one update a gradient."""
    tx = optimizer.create(section, train)
    update = jax.jit(tx.update)
    state, found = tx.init(weights), []
    for gradient in gradients:
        updates, state = update(gradient, state, weights)
        weights = optax.apply_updates(weights, updates)
        found.append(weights)
    return found


def test_adamw_is_its_definition():
    """Twenty updates by random gradients, beside the same in float64 numpy: what decays is the weight before
    its update, and epsilon stands beside the corrected root.
    """
    random = np.random.default_rng(0)
    start = random.normal(size=(3, 4)).astype(np.float32)
    gradients = [(1e-3 * random.normal(size=(3, 4))).astype(np.float32) for _ in range(STEPS)]
    p, m, v = start.astype(np.float64), 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        g = g.astype(np.float64)
        m, v = 0.8 * m + 0.2 * g, 0.99 * v + 0.01 * g**2
        root = np.sqrt(v / (1 - 0.99**t)) + 1e-3
        p = p - rate(t - 1) * (m / (1 - 0.8**t) / root + 0.1 * p)
    found = followed(Optimizer("adamw", 0.8, 0.99, 1e-3, 0.1), jnp.asarray(start), gradients)
    np.testing.assert_allclose(found[-1], p, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "adamw_authors"])
def test_clipping_is_by_the_norm_of_all(name):
    """A gradient above the limit is scaled down, one below is left alone. Adam's first step alone would say
    nothing: it is the same for every size of the gradient.
    """
    weights = {"a": jnp.ones(2), "b": jnp.ones(1)}
    large, small = ({"a": size * jnp.array([3.0, 4.0]), "b": size * jnp.array([12.0])} for size in (1, 0.01))
    scaled = jax.tree.map(lambda leaf: leaf * (0.5 / 13), large)
    found = followed(Optimizer(name, clip=0.5), weights, [large, small, small])[-1]
    expected = followed(Optimizer(name), weights, [scaled, small, small])[-1]
    unclipped = followed(Optimizer(name), weights, [large, small, small])[-1]
    for key in weights:
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-6)
        assert np.abs(found[key] - unclipped[key]).min() > 1e-4


# 1e-6 is epsilon's own size, where its place decides the step; at 1 it is lost beside the gradient.
@pytest.mark.parametrize("size", [1e-6, 1.0])
def test_authors_adamw_is_its_definition(size):
    """Twenty updates by random gradients, beside the same in float64 numpy."""
    random = np.random.default_rng(0)
    start = random.normal(size=(3, 4)).astype(np.float32)
    gradients = [(size * random.normal(size=(3, 4))).astype(np.float32) for _ in range(STEPS)]
    p, m, v = start.astype(np.float64), 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        g = g.astype(np.float64)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        p = p - rate(t - 1) * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-6)
        p = p - rate(t - 1) * 0.1 * p
    found = followed(SECTION, jnp.asarray(start), gradients)
    np.testing.assert_array_equal(found[0], start, "the first update has rate 0")
    np.testing.assert_allclose(found[-1], p, rtol=1e-6, atol=1e-7)
    if size == 1e-6:
        optax_adamw = followed(Optimizer("adamw", 0.9, 0.999, 1e-6, 0.1), jnp.asarray(start), gradients)
        assert np.abs(optax_adamw[-1] - p).max() > 1e-3, "epsilon stands elsewhere in optax.adamw"


def after(tx, delta, count=6):
    """`delta` after each update by the same random gradients."""
    random, state, update, found = np.random.default_rng(0), tx.init(delta), jax.jit(tx.update), []
    for _ in range(count):
        gradient = jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype), delta)
        updates, state = update(gradient, state, delta)
        delta = optax.apply_updates(delta, updates)
        found.append(delta)
    return found


RULES = {
    "LoRA": ({"loraplus": 4.0}, lambda tx, frozen, delta: optim.loraplus(tx, 4.0)),
    "LoRAFA": ({"lorafa": True}, lambda tx, frozen, delta: optax.chain(optim.lorafa(frozen, delta), tx)),
    "AdaLoRA": (
        {"adalora": Budget(target_rank=1, initial_steps=1, final_steps=2, every=2)},
        lambda tx, frozen, delta: optim.adalora(
            tx, total_steps=6, target_rank=1, initial_steps=1, final_steps=2, every=2
        ),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_the_rules_of_a_method_are_as_the_config_has_them(name):
    """And make a difference."""
    section, rule = RULES[name]
    train = Train(steps=6, batch=1, lr=0.1)
    params = {"v": jnp.ones((6, 4)), "w": 2 * jnp.ones((6, 4))}
    frozen, delta = lora_jax.lorafy(params, ".*", method=getattr(lora_jax, name)(rank=4))
    delta = jax.tree.map(lambda leaf: leaf + 0.1, delta)
    plain = optimizer.create(Optimizer(), train)
    found = after(optimizer.for_adapters(Optimizer(**section), train, frozen, delta), delta)
    jax.tree.map(np.testing.assert_array_equal, found, after(rule(plain, frozen, delta), delta))
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(after(plain, delta)), strict=True)
    assert not all(np.allclose(one, two) for one, two in pairs)


def test_what_decays_is_the_updated_weight():
    """One update u of a weight p by hand: (p + u)(1 - lr wd), not p + u - lr wd p."""
    train = Train(steps=2, batch=1, lr=0.5)
    (found,) = followed(
        Optimizer("adamw_authors", eps=0.0, weight_decay=0.2), jnp.array([3.0]), [jnp.array([7.0])], train
    )
    np.testing.assert_allclose(found, (3 - 0.5) * (1 - 0.5 * 0.2), rtol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999, 0.9999999])
def test_the_moments_are_corrected_to_float32_accuracy(decay):
    """With epsilon 0 and equal gradients every step is the sign of the gradient, however slowly the
    moments fill.
    """
    train = Train(steps=10**6, batch=1, lr=1.0)
    gradient = jnp.array([2.0, -3.0])
    found = followed(
        Optimizer("adamw_authors", b1=decay, b2=decay, eps=0.0), jnp.zeros(2), [gradient] * 3, train
    )
    np.testing.assert_allclose(found[-1], -3 * np.sign(gradient), rtol=1e-5)


def test_twenty_steps_are_pytorchs(torch):
    """Loss, gradient, schedule and update of a two-layer network of tokens, as the authors' PyTorch code
    defines them.
    """
    random = np.random.default_rng(1)
    draw = lambda *shape: random.normal(size=shape).astype(np.float32)
    start = {"a": draw(7, 5), "b": draw(5, 11)}
    xs, labels = draw(STEPS, 2, 6, 7), random.integers(11, size=(STEPS, 2, 6))
    masks = (random.random((STEPS, 2, 6)) < 0.6).astype(np.float32)

    weights = {name: torch.tensor(value, requires_grad=True) for name, value in start.items()}
    moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in weights.items()}
    expected = []
    for t in range(1, STEPS + 1):
        logits = torch.tanh(torch.tensor(xs[t - 1]) @ weights["a"]) @ weights["b"]
        log_p = torch.log_softmax(logits, -1)
        nll = -log_p.gather(-1, torch.tensor(labels[t - 1])[..., None])[..., 0]
        mask = torch.tensor(masks[t - 1])
        loss = ((0.9 * nll + 0.1 * -log_p.mean(-1)) * mask).sum() / (mask.sum() + 1e-4)
        expected.append(loss.item())
        gradients = torch.autograd.grad(loss, list(weights.values()))
        with torch.no_grad():
            for (w, (m, v)), g in zip(((weights[n], moments[n]) for n in weights), gradients, strict=True):
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.999).addcmul_(g, g, value=0.001)
                w.addcdiv_(m, v.sqrt().add_(1e-6), value=-rate(t - 1) * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t))
                w.add_(w, alpha=-rate(t - 1) * 0.1)

    tx = optimizer.create(SECTION, TRAIN)

    @jax.jit
    def step(weights, state, x, labels, mask):
        def loss(weights):
            logits = jnp.tanh(x @ weights["a"]) @ weights["b"]
            return losses.mean(*losses.masked_sum(cross_entropy(logits, labels, TRAIN.label_smoothing), mask))

        value, gradient = jax.value_and_grad(loss)(weights)
        updates, state = tx.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state, value

    ours, state, found = start, tx.init(start), []
    for t in range(STEPS):
        ours, state, value = step(ours, state, xs[t], labels[t].astype(np.int32), masks[t])
        found.append(float(value))
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    for name in start:
        np.testing.assert_allclose(ours[name], weights[name].detach().numpy(), rtol=2e-6, atol=2e-6)
        assert np.abs(ours[name] - start[name]).max() > 0.05, "the weights did move"
