"""The authors' AdamW: against its definition in float64, and against PyTorch taking the same steps on the
same loss.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import optax_promotes as optax_promotes

from experiments import loss as losses, optimizer
from experiments.config import Optimizer, Train


STEPS = 20
TRAIN = Train(steps=STEPS, batch=1, lr=1e-2, warmup=5, label_smoothing=0.1)
SECTION = Optimizer("adamw_authors", b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.1)


def rate(step):
    """The authors' schedule, written once more: `LambdaLR` asks it for step 0 before the first update."""
    return TRAIN.lr * (step / 5 if step < 5 else max(0, STEPS - step) / (STEPS - 5))


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
            return losses.mean(*losses.masked_sum(logits, labels, mask, TRAIN.label_smoothing))

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
