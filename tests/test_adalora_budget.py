"""AdaLoRA's budget, against the paper's algorithm in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from update_trees import adalora_of, adapted, jitted, leaves, numbers, SCHEDULE

import lora_jax
from lora_jax import AdaLoRA
from lora_jax.optim import adalora, ranks
from lora_jax.optim._adalora import schedule


def matrices_of(delta):
    """a (in, rank), b (rank, out) and e of every matrix in float64, those of a stack one by one."""
    found = []
    for path, count in (("layers", 3), ("heads", 1)):
        a, b, e = (np.array(delta[path].arrays[name], np.float64) for name in "abe")
        rank = e.shape[-1]
        found += map(
            list,
            zip(a.reshape(count, -1, rank), b.reshape(count, rank, -1), e.reshape(count, rank), strict=True),
        )
    return found


class Literal:
    """The paper's algorithm 1 for gradient descent, one number after the other."""

    def __init__(self, matrices, rate, total_steps, target_rank, initial_steps, final_steps, every):
        self.matrices, self.rate, self.t = matrices, rate, 0
        self.total, self.first, self.last, self.every = total_steps, initial_steps, final_steps, every
        self.start, self.target = sum(len(e) for _, _, e in matrices), target_rank * len(matrices)
        self.averages = [[[np.zeros_like(p), np.zeros_like(p)] for p in matrix] for matrix in matrices]

    def budget(self):
        if self.t <= self.first:
            return self.start
        if self.t >= self.total - self.last:
            return self.target
        return int(
            self.target
            + (self.start - self.target)
            * (1 - (self.t - self.first) / (self.total - self.first - self.last)) ** 3
        )

    def step(self, gradients):
        self.t += 1
        scores = []
        for matrix, averages, gradient in zip(self.matrices, self.averages, gradients, strict=True):
            for place, (p, average, g) in enumerate(zip(matrix, averages, gradient, strict=True)):
                p = matrix[place] = p - self.rate * g
                if self.t < self.total - self.last:
                    average[0] = 0.85 * average[0] + 0.15 * abs(p * g)
                    average[1] = 0.85 * average[1] + 0.15 * abs(abs(p * g) - average[0])
            a, b, e = (mean * spread for mean, spread in averages)
            scores.append(e + a.mean(0) + b.mean(1))
        given_up = self.start - self.budget()
        if given_up and (self.t % self.every == 0 or self.t >= self.total - self.last):
            threshold = sorted(np.concatenate(scores))[given_up - 1]
            for matrix, score in zip(self.matrices, scores, strict=True):
                matrix[2] = np.where(score <= threshold, 0.0, matrix[2])


def test_adalora_is_its_algorithm(x64):
    """Twenty-two updates, through every phase: all numbers, which entries of e are zero, and the averages."""
    _, delta = adapted(AdaLoRA(rank=4), dtype="float64")
    tx, literal = adalora_of(optax.sgd(0.1), **SCHEDULE), Literal(matrices_of(delta), 0.1, **SCHEDULE)
    step, state, left = jitted(tx), tx.init(delta), []
    for seed in range(22):
        gradient = numbers(delta, 10 + seed)
        delta, state, updates = step(gradient, state, delta)
        literal.step(matrices_of(gradient))
        for ours, theirs in zip(matrices_of(delta), literal.matrices, strict=True):
            for ours, theirs in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-12)
                assert np.array_equal(ours == 0, theirs == 0)
        # What has no triplets gets the update of the optimiser.
        for path in ("plain/a", "plain/b", "head/kernel", "head/bias"):
            np.testing.assert_allclose(
                leaves(updates)[path], -0.1 * np.asarray(leaves(gradient)[path]), rtol=1e-15
            )
        left.append(sum(map(np.sum, ranks(delta).values())))
    # Every third update, the budget of the moment; in between, what was given up has come back.
    assert left == [16, 16, 16, 16, 16, 11, 16, 16, 9, 16, 16, 8, 16, 16, 8, 8, 8, 8, 8, 8, 8, 8]
    for which, averages in enumerate((state.sensitivity, state.uncertainty)):
        for ours, theirs in zip(matrices_of(averages), literal.averages, strict=True):
            for ours, theirs in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(ours, theirs[which], rtol=1e-12)
    assert ranks(delta)["layers"].shape == (3,) and isinstance(ranks(delta)["heads"], int)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rank_given_up_is_exactly_zero(dtype):
    """In narrow dtypes too, where e + (x − e) is not x; averages stay in float32."""
    _, delta = adapted(AdaLoRA(rank=4, dtype=dtype))
    tx = adalora_of(optax.sgd(0.1), initial_steps=1, final_steps=10)
    step, state = jitted(tx), tx.init(delta)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((state.sensitivity, state.uncertainty))} == {
        "float32"
    }
    left = []
    for seed in range(12):
        delta, state, _ = step(numbers(delta, 10 + seed), state, delta)
        left.append(sum(map(np.sum, ranks(delta).values())))
    assert left == [16, 13, 11, 10, 9, 8, 8, 8, 8, 8, 8, 8]
    assert delta["layers"].arrays["e"].dtype == dtype


@pytest.mark.parametrize(
    "start, target, first, last, total",
    [(48, 12, 0, 0, 100), (864, 576, 500, 1500, 3000), (7, 7, 1, 1, 9), (300, 1, 3, 0, 40)],
)
def test_the_budget_is_cut_as_in_python(start, target, first, last, total):
    """The table of when each rank goes, against the paper's formula step by step."""
    table, end = schedule(start, target, first, total - last), total - last
    assert table.dtype == np.int32 and len(table) == start - target
    for step in range(1, total + 5):
        budget = int(
            (start - target) * (1 - (min(max(step, first), end) - first) / (end - first)) ** 3 + target
        )
        assert start - np.sum(table <= step) == budget, step


def test_the_ranks_go_where_they_are_needed(relaxed_promotion):
    """Two matrices learn changes of rank 1 and 3, from rank 4 each and with a budget of 2 on average."""
    rng = np.random.default_rng(0)
    change = {
        name: jnp.asarray(rng.normal(size=(8, rank)) @ rng.normal(size=(rank, 8)), "float32")
        for name, rank in (("one", 1), ("three", 3))
    }
    frozen, delta = lora_jax.lorafy(
        jax.tree.map(jnp.zeros_like, change), ".*", method=AdaLoRA(rank=4, alpha=4)
    )
    forward = lora_jax.adapt(lambda params, x: [x @ params[name] for name in change])
    tx = adalora(optax.adam(0.1), total_steps=300, target_rank=2, initial_steps=20, final_steps=100)

    def loss(delta, x):
        outputs = zip(forward(lora_jax.combine(frozen, delta), x), change, strict=True)
        return sum(
            jnp.mean((y - x @ change[name]) ** 2) for y, name in outputs
        ) + 0.1 * lora_jax.methods.orthogonality(delta)

    @jax.jit
    def train(delta, state):
        def step(carry, key):
            value, gradient = jax.value_and_grad(loss)(carry[0], jax.random.normal(key, (16, 8)))
            updates, state = tx.update(gradient, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), value

        return jax.lax.scan(step, (delta, state), jax.random.split(jax.random.key(0), 300))

    (delta, _), values = train(delta, tx.init(delta))
    assert ranks(delta) == {"one": 1, "three": 3}
    assert values[-1] < 0.02 * values[0]
