"""LoRA+, LoRA-FA's corrected gradient and AdaLoRA's budget: against the rule written out in NumPy, and
against PEFT taking the same steps on the same loss in float64.

Adam needs JAX's default promotion, because Optax raises floats to integer powers of its counters.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax import AdaLoRA, DeltaLoRA, DoRA, DyLoRA, Full, LoRA, LoRAFA, PiSSA, VeRA
from lora_jax._paths import named_leaves
from lora_jax._tree.nodes import Fixed
from lora_jax.optim import adalora, lorafa, loraplus, only_trainable, ranks
from lora_jax.optim._adalora import schedule


# --- trees of random numbers --------------------------------------------------------------------------------

# A stack, several out axes, a plain matrix, and what trains itself.
SHAPES = {"layers": (3, 6, 5), "heads": (6, 2, 3), "plain": (7, 4), "head": {"kernel": (4, 2), "bias": (4,)}}
AXES = {"layers": "layer in out", "heads": "in out out", "plain": "in out"}


def numbers(tree, seed=0, dtype=None):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda array: jnp.asarray(rng.normal(size=array.shape), array.dtype if dtype is None else dtype), tree
    )


def adapted(method, other=LoRA(rank=2), dtype="float32"):
    """`(frozen, delta)` with random numbers in both. `layers` and `heads` have the method, `plain`
    another, and the head trains itself.
    """
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype), SHAPES, is_leaf=lambda node: isinstance(node, tuple)
    )
    frozen, delta = lora_jax.lorafy(
        numbers(params), {"layers|heads": method, "plain": other, "head/.*": Full()}, axes=AXES
    )
    return frozen, numbers(delta, 1)


def leaves(tree):
    """By path; the arrays of adapters by `path/name`."""
    return dict(named_leaves(tree))


def jitted(tx):
    """`tx.update` and the updated parameters, in one program."""

    @jax.jit
    def step(gradient, state, delta):
        step.traced += 1
        updates, state = tx.update(gradient, state, delta)
        return optax.apply_updates(delta, updates), state, updates

    step.traced = 0
    return step


def adalora_of(tx, **options):
    return adalora(tx, **{"total_steps": 20, "target_rank": 2, **options})


# --- what all three promise ---------------------------------------------------------------------------------

# Around an optimiser, with a method that it is for and the arrays that its state has beside the optimiser's.
RULES = {
    "loraplus": (DoRA(rank=2), lambda tx, frozen, delta: loraplus(tx, 16), []),
    "lorafa": (
        LoRAFA(rank=2),
        lambda tx, frozen, delta: optax.chain(lorafa(frozen, delta), tx),
        [(2, 2), (3, 2, 2)],
    ),
    "adalora": (
        AdaLoRA(rank=4),
        lambda tx, frozen, delta: adalora_of(tx),
        [(), *2 * [(6, 4), (4, 2, 3), (4,), (3, 6, 4), (3, 4, 5), (3, 4)]],
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_state_only_for_what_trains(rule):
    method, wrap, own = RULES[rule]
    frozen, delta = adapted(method)
    tx = optax.sgd(0.1, momentum=0.9)
    state = jax.eval_shape(wrap(tx, frozen, delta).init, delta)
    shapes = lambda tree: sorted(leaf.shape for leaf in jax.tree.leaves(tree))
    assert shapes(state) == sorted(shapes(tx.init(delta)) + own)


@pytest.mark.parametrize("rule", RULES)
def test_one_combined_tree(rule):
    """Within `only_trainable`, the same steps and the same state; the frozen leaves stay, whatever their
    gradient.
    """
    method, wrap, _ = RULES[rule]
    frozen, delta = adapted(method)
    tree = lora_jax.combine(frozen, delta)
    tx = wrap(optax.sgd(0.1, momentum=0.9), frozen, delta)
    plain, masked, state, combined = (
        jitted(tx),
        jitted(only_trainable(tx)),
        tx.init(delta),
        only_trainable(tx).init(tree),
    )
    for seed in range(2, 6):
        gradient = numbers(delta, seed)
        delta, state, updates = plain(gradient, state, delta)
        tree, combined, found = masked(lora_jax.combine(numbers(frozen, 9), gradient), combined, tree)
        still, moved = lora_jax.partition(found)
        jax.tree.map(np.testing.assert_array_equal, moved, updates)
        assert not any(map(np.any, jax.tree.leaves(still)))
    for ours, theirs in zip(jax.tree.leaves(combined), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("rule", RULES)
def test_optax_finds_what_is_like_the_parameters(rule):
    """`optax.tree_map_params`, by which the state is put on a mesh: moments and averages are, counters
    and inverses are not.
    """
    method, wrap, own = RULES[rule]
    frozen, delta = adapted(method)
    tx = wrap(optax.sgd(0.1, momentum=0.9), frozen, delta)
    masked = lambda node: isinstance(node, optax.MaskedNode)
    names = lambda leaf, name: leaf if masked(leaf) else name
    state = optax.tree_map_params(
        tx, names, tx.init(delta), delta, transform_non_params=lambda _: "other", is_leaf=masked
    )
    found = jax.tree.leaves(state)
    assert found.count("other") == (len(own) if rule == "lorafa" else rule == "adalora")
    assert all(leaf == "other" or leaf.dtype == jnp.float32 for leaf in found)


@pytest.mark.parametrize("rule", RULES)
def test_compiles_once(rule):
    method, wrap, _ = RULES[rule]
    frozen, delta = adapted(method)
    tx = wrap(optax.sgd(0.1), frozen, delta)
    step, state = jitted(tx), jax.jit(tx.init)(delta)
    for _ in range(25):  # through all of AdaLoRA's phases
        delta, state, _ = step(delta, state, delta)
    assert step.traced == 1


def test_extra_arguments_reach_the_optimiser():
    _, delta = adapted(AdaLoRA(rank=4))

    def update(updates, state, params=None, *, factor):
        return jax.tree.map(lambda array: factor * array, updates), state

    tx = loraplus(adalora_of(optax.GradientTransformationExtraArgs(optax.sgd(1.0).init, update)), 2)
    updates, _ = jax.jit(tx.update)(numbers(delta, 2), tx.init(delta), delta, factor=3.0)
    np.testing.assert_allclose(
        leaves(updates)["head/bias"], 6 * leaves(numbers(delta, 2))["head/bias"], rtol=1e-6
    )


# --- LoRA+ --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, faster",
    [
        (LoRA(rank=2), "b"),
        (DoRA(rank=2), "bm"),
        (VeRA(rank=2), "bd"),
        (LoRAFA(rank=2), "b"),
        (DyLoRA(rank=2), "b"),
        (DeltaLoRA(rank=2), "b"),
        (PiSSA(rank=2), "b"),
        (AdaLoRA(rank=2), "b"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)
def test_loraplus_multiplies_the_update_of_its_group(method, faster):
    """With weight decay, and layer axes that hide which arrays are vectors."""
    _, delta = adapted(method)
    gradient, tx = numbers(delta, 2), optax.chain(optax.add_decayed_weights(0.3), optax.sgd(0.1))
    plain, _ = tx.update(gradient, tx.init(delta), delta)
    found, _ = loraplus(tx, 16).update(gradient, tx.init(delta), delta)
    group = {f"{path}/{name}" for path in ("layers", "heads") for name in faster} | {"plain/b", "head/bias"}
    assert group < leaves(found).keys()
    for path, update in leaves(found).items():
        np.testing.assert_array_equal(
            update, leaves(plain)[path] * (16 if path in group else 1), err_msg=path
        )


def test_an_optimiser_of_its_own_for_embeddings():
    """As the docstring has it: labels for whole adapters, of which each optimiser then sees its own only."""
    params = {"wte": jnp.ones((8, 4)), "h": jnp.ones((4, 4))}
    delta = numbers(lora_jax.lorafy(params, ".*", method=LoRA(rank=1)).delta)
    tx = optax.multi_transform(
        {"embedding": optax.sgd(0.5), "other": loraplus(optax.sgd(1.0), 16)},
        {"wte": "embedding", "h": "other"},
    )
    updates, _ = tx.update(delta, tx.init(delta), delta)
    expected = {"wte/a": -0.5, "wte/b": -0.5, "h/a": -1.0, "h/b": -16.0}
    for path, update in leaves(updates).items():
        np.testing.assert_array_equal(update, expected[path] * leaves(delta)[path])


# --- LoRA-FA ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_lorafa_is_its_equation(dtype, x64):
    """`(AᵀA + 1e-8)⁺ g / s²`, matrix by matrix in float64; bfloat16 adapters are corrected in float32."""
    method = LoRAFA(rank=2, alpha=6, dtype=None if dtype == "float64" else "bfloat16")
    frozen, delta = adapted(method, other=LoRAFA(rank=3, rs=True), dtype=dtype)
    frozen = {
        name: Fixed(leaf.weight, numbers(leaf.arrays, 5), leaf.spec) if isinstance(leaf, Fixed) else leaf
        for name, leaf in frozen.items()
    }
    tx, gradient = lorafa(frozen, delta), numbers(delta, 2)
    state = jax.jit(tx.init)(delta)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {dtype}
    updates, _ = jax.jit(tx.update)(gradient, state)
    wide = lambda array: np.asarray(array, np.float64)
    for path, matrices, scale in (("layers", 3, 3.0), ("heads", 1, 3.0), ("plain", 1, 16 / 3**0.5)):
        a, g = wide(frozen[path].arrays["a"]), wide(gradient[path].arrays["b"])
        rank = a.shape[-1]
        pairs = zip(a.reshape(matrices, -1, rank), g.reshape(matrices, rank, -1), strict=True)
        expected = [np.linalg.pinv(a.T @ a + 1e-8 * np.eye(rank)) @ g / scale**2 for a, g in pairs]
        found = updates[path].arrays["b"]
        assert found.dtype == gradient[path].arrays["b"].dtype
        rounding = {"bfloat16": 2**-8, "float32": 1e-5, "float64": 1e-12}[found.dtype.name]
        np.testing.assert_allclose(
            wide(found).reshape(matrices, rank, -1), expected, rtol=rounding, atol=rounding
        )
    jax.tree.map(np.testing.assert_array_equal, updates["head"], gradient["head"])


def test_lorafa_moves_the_product_as_the_weight_would_move(x64):
    """Why it is there: s·A·ΔB is the projection of W's own gradient on what A spans."""
    x, y = (
        jnp.asarray(np.random.default_rng(seed).normal(size=(9, size))) for seed, size in ((0, 6), (1, 4))
    )
    loss = lambda params: jnp.mean((jnp.tanh(x @ params["w"]) - y) ** 2)
    frozen, delta = lora_jax.lorafy(
        numbers({"w": jax.ShapeDtypeStruct((6, 4), "float64")}), "w", method=LoRAFA(rank=2, alpha=6)
    )
    delta = numbers(delta, 3)
    dense = np.asarray(jax.grad(loss)(lora_jax.merge(frozen, delta))["w"])
    gradient = jax.grad(lambda delta: lora_jax.adapt(loss)(lora_jax.combine(frozen, delta)))(delta)
    tx = lorafa(frozen, delta)
    a, b = np.asarray(frozen["w"].arrays["a"]), tx.update(gradient, tx.init(delta))[0]["w"].arrays["b"]
    basis, _ = np.linalg.qr(a)
    np.testing.assert_allclose(3 * a @ b, basis @ (basis.T @ dense), rtol=1e-6)  # the ridge's size


# --- AdaLoRA ------------------------------------------------------------------------------------------------

# The last update that may choose, the sixteenth, is not one of every third.
SCHEDULE = dict(total_steps=20, target_rank=2, initial_steps=3, final_steps=4, every=3)


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


# --- errors -------------------------------------------------------------------------------------------------

_, LORA = lora_jax.lorafy({"w": jax.ShapeDtypeStruct((8, 8), "float32")}, "w", method=LoRA(rank=2))
_, ADALORA = lora_jax.lorafy({"w": jax.ShapeDtypeStruct((8, 8), "float32")}, "w", method=AdaLoRA(rank=4))
SGD = optax.sgd(0.1)


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (lambda: loraplus(SGD, "16"), TypeError, r"`ratio` is '16'; pass a number"),
        (lambda: loraplus(SGD, True), TypeError, r"`ratio` is True; pass a number"),
        (lambda: loraplus(SGD, 0), ValueError, r"`ratio` is 0; it must be positive and finite"),
        (lambda: loraplus(SGD, float("inf")), ValueError, r"`ratio` is inf; it must be positive and finite"),
        (
            lambda: lorafa({"w": jnp.ones((8, 8))}, LORA),
            ValueError,
            r"`delta` holds no LoRA-FA adapter; pass the two trees of `lorafy\(",
        ),
        (
            lambda: adalora(SGD, total_steps=1.5, target_rank=2),
            TypeError,
            r"`total_steps` is 1.5; pass an integer",
        ),
        (
            lambda: adalora(SGD, total_steps=9, target_rank=True),
            TypeError,
            r"`target_rank` is True; pass an integer",
        ),
        (
            lambda: adalora(SGD, total_steps=9, target_rank=0),
            ValueError,
            r"`target_rank` is 0; it must be at least 1",
        ),
        (
            lambda: adalora_of(SGD, initial_steps=-1),
            ValueError,
            r"`initial_steps` is -1; it must be at least 0",
        ),
        (lambda: adalora_of(SGD, every=0), ValueError, r"`every` is 0; it must be at least 1"),
        (lambda: adalora_of(SGD, beta1=1.0), ValueError, r"`beta1` is 1.0; it must be between 0 and 1"),
        (lambda: adalora_of(SGD, beta2=0), ValueError, r"`beta2` is 0; it must be between 0 and 1"),
        (
            lambda: adalora_of(SGD, initial_steps=12, final_steps=8),
            ValueError,
            r"`initial_steps` \(12\) and `final_steps` \(8\) leave none of the `total_steps` \(20\)",
        ),
        (
            lambda: adalora_of(SGD).init(LORA),
            ValueError,
            r"`params` holds no AdaLoRA adapter; pass the delta of `lorafy\(",
        ),
        (
            lambda: adalora_of(SGD, target_rank=5).init(ADALORA),
            ValueError,
            r"`target_rank` is 5, above the average rank at the start, 4:",
        ),
        (lambda: adalora_of(SGD).update(ADALORA, None), ValueError, r"`params` is None; importance is"),
        (lambda: ranks(LORA), ValueError, r"`delta` holds no AdaLoRA adapter"),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_errors_of_lorafa():
    w = {"w": jnp.ones((8, 8)), "v": jnp.ones((8, 8))}
    frozen, delta = lora_jax.lorafy(w, ".*", method=LoRAFA(rank=2))
    other_frozen, other = lora_jax.lorafy(w, "w", method=LoRAFA(rank=2))
    tx = lorafa(other_frozen, other)
    with pytest.raises(
        ValueError,
        match="`updates` holds a LoRA-FA adapter at 'v', where the `delta` that `lorafa` was given has none",
    ):
        tx.update(delta, tx.init(delta))
    with pytest.raises(ValueError, match="the LoRA-FA adapter of 'w' has the `alpha` 0"):
        lorafa(*lora_jax.lorafy(w, "w", method=LoRAFA(rank=2, alpha=0)))
    with pytest.raises(ValueError, match="`frozen` and `delta` do not"):
        lorafa({"w": frozen["w"]}, delta)


# --- PEFT ---------------------------------------------------------------------------------------------------

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
