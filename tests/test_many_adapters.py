"""Adapters of one base that train in one program, as `vmap` makes it of the step of one: each learns what it
learns alone, and what is frozen is stored and contracted once for all.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from benchmarks.many_adapters import products
from lora_jax import DoRA, LoRA, VeRA
from lora_jax.models import _losses, GPT2, GPT2Config, Llama, LlamaConfig


pytestmark = pytest.mark.usefixtures("relaxed_promotion")  # optax's bias correction counts on it

ADAPTERS, BATCH, TOKENS = 3, 2, 12
# No two sizes of what is frozen and what is computed are alike, so that a shape says what an array is.
CONFIG = GPT2Config(vocab_size=97, n_positions=22, n_embd=20, n_layer=1, n_head=2, n_inner=34)
DEEP = dataclasses.replace(CONFIG, n_layer=2)
LLAMA = LlamaConfig(
    vocab_size=97,
    hidden_size=20,
    intermediate_size=34,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    tie_word_embeddings=False,
)


@dataclasses.dataclass(frozen=True)
class Case:
    method: Any = LoRA(rank=3)
    model: Any = GPT2(CONFIG)
    targets: str = "h/.*/kernel"
    axes: str = "in out"
    format: str | None = None
    reduce: str | None = None


CASES = {
    "LoRA": Case(),
    "dropout": Case(LoRA(rank=3, dropout=0.5)),
    "scan": Case(LoRA(rank=3, dropout=0.5), GPT2(DEEP, scan=True, checkpoint=True), axes="layer in out"),
    "DoRA": Case(DoRA(rank=3)),
    "VeRA": Case(VeRA(rank=3)),
    "nf4": Case(format="nf4"),
    "bfloat16": Case(model=GPT2(CONFIG, dtype=jnp.bfloat16), reduce="float32"),
    "head": Case(LoRA(rank=3), Llama(LLAMA), ".*/kernel"),
    "blocks": Case(LoRA(rank=3, blocks=(True, False, True)), targets="c_attn/kernel"),
}


@pytest.fixture(autouse=True)
def few_columns_at_a_time(monkeypatch):
    """Six columns of one adapter's losses, or two of all."""
    monkeypatch.setattr(_losses, "TOKENS", 12)


class Ways:
    """The step of one adapter and of all, and what they take: stacked states, the base, tokens and keys."""

    def __init__(self, case: Case):
        draw = np.random.default_rng(0)
        self.ids = jnp.asarray(draw.integers(97, size=(ADAPTERS, BATCH, TOKENS)), jnp.int32)
        self.keys = jax.random.split(jax.random.key(1), ADAPTERS)
        shapes = jax.eval_shape(case.model.init, jax.random.key(0), self.ids[0])["params"]
        random = lambda leaf: jnp.asarray(draw.normal(0.05, 0.2, leaf.shape), leaf.dtype)
        self.frozen, delta = lora_jax.lorafy(
            jax.tree.map(random, shapes), case.targets, method=case.method, axes=case.axes
        )
        if case.format is not None:
            self.frozen = lora_jax.quantize(self.frozen, case.format, targets=case.targets)
        # Not at the start, where B is 0 and A has no gradient.
        self.deltas = [jax.tree.map(lambda leaf: leaf + random(leaf), delta) for _ in range(ADAPTERS)]
        # Large beside rounding: Adam divides the gradient by its own size.
        self.tx = optax.adamw(1e-2, eps=1e-2)
        self.forward = lora_jax.adapt(case.model.apply, reduce=case.reduce)
        self.many = jax.vmap(self.one, in_axes=(0, 0, None, 0, 0))

    def loss(self, delta, frozen, ids, key):
        variables = {"params": lora_jax.combine(frozen, delta, key=key)}
        return self.forward(variables, ids, labels=jnp.roll(ids, -1, 1))[:, :-1].mean()

    def one(self, delta, state, frozen, ids, key):
        value, gradient = jax.value_and_grad(self.loss)(delta, frozen, ids, key)
        updates, state = self.tx.update(gradient, state, delta)
        return optax.apply_updates(delta, updates), state, value, gradient

    def arguments(self, number=None):
        """Of one adapter, or of all."""
        stacked = lora_jax.stack(self.deltas)
        if number is not None:
            # From the stack, which has the scales in B.
            delta = lora_jax.take(stacked, number)
            return delta, self.tx.init(delta), self.frozen, self.ids[number], self.keys[number]
        return stacked, jax.vmap(self.tx.init)(stacked), self.frozen, self.ids, self.keys


@functools.cache
def ways(name):
    return Ways(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_each_learns_what_it_learns_alone(name):
    way = ways(name)
    together, one = jax.jit(way.many)(*way.arguments()), jax.jit(way.one)
    tolerance = 2e-2 if name == "bfloat16" else 2e-5
    for number in range(ADAPTERS):
        alone = one(*way.arguments(number))
        mine = jax.tree.map(lambda array, number=number: array[number], together)
        jax.tree.map(
            lambda found, expected: np.testing.assert_allclose(
                found, expected, rtol=0, atol=tolerance * np.abs(expected).max()
            ),
            mine,
            alone,
        )


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if isinstance(value, jex.Jaxpr | jex.ClosedJaxpr):
                yield from equations(getattr(value, "jaxpr", value))


def of_weights(function, arguments, shapes):
    """The shapes of the other operands of all products with a weight, and how many arrays have one of its
    shape for each adapter.
    """
    others, batched = [], 0
    for eqn in equations(jax.make_jaxpr(function)(*arguments).jaxpr):
        operands = [atom.aval.shape for atom in eqn.invars]
        batched += sum(
            variable.aval.shape[-3:] in {(ADAPTERS, *s) for s in shapes} for variable in eqn.outvars
        )
        if eqn.primitive.name == "dot_general":
            others += [
                (operands[1 - side], shape)
                for side, shape in enumerate(operands)
                if shape in shapes and not any(eqn.params["dimension_numbers"][1])
            ]
    return others, batched


@pytest.mark.parametrize("name", CASES)
def test_what_is_frozen_is_contracted_once_over_all_rows(name):
    """The step of one adapter has the same products with W, DoRA's norm and the head's among them."""
    way = ways(name)
    shapes = {(20, 60), (60, 20), (20, 34), (34, 20), (20, 10), (97, 20), (20, 97), (20, 20)}
    every, batched = of_weights(way.many, way.arguments(), shapes)
    single, _ = of_weights(way.one, way.arguments(0), shapes)
    assert len(every) == len(single) >= 8 and batched == 0
    rows = lambda found: sorted(int(np.prod(shape)) for shape, _ in found)
    head = {shape for shape in shapes if 97 in shape}
    for side in (True, False):  # The head has as many rows at a time for all as for one, more often.
        mine, alone = (
            rows([pair for pair in pairs if (pair[1] in head) == side]) for pairs in (every, single)
        )
        assert mine == (alone if side and name != "head" else [ADAPTERS * size for size in alone])


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "scan"])
def test_the_compiled_step_has_no_product_and_no_byte_of_the_base_more(name):
    way = ways(name)
    weights = {(20, 60), (20, 34), (97, 20), (20, 20)}
    compiled = {}
    for which, function, arguments in (
        ("one", way.one, way.arguments(0)),
        ("many", way.many, way.arguments()),
    ):
        compiled[which] = jax.jit(function).lower(*arguments).compile()
    counted = {which: products(program.as_text(), weights, ADAPTERS) for which, program in compiled.items()}
    assert 8 <= counted["many"][0] <= counted["one"][0] and counted["many"][1] == 0
    size = {which: program.memory_analysis().argument_size_in_bytes for which, program in compiled.items()}
    frozen = sum(leaf.nbytes for leaf in jax.tree.leaves(way.frozen))
    assert size["many"] - frozen == ADAPTERS * (size["one"] - frozen)


def test_products_of_a_batched_weight_are_counted():
    """The base copied for each adapter, which is what the bounds forbid."""
    x, w = jnp.ones((3, 5, 7)), jnp.ones((3, 7, 11))
    each = jax.jit(jax.vmap(jnp.matmul)).lower(x, w).compile().as_text()
    shared = jax.jit(jax.vmap(jnp.matmul, (0, None))).lower(x, w[0]).compile().as_text()
    assert products(each, {(7, 11)}, 3) == (0, 1) and products(shared, {(7, 11)}, 3) == (1, 0)


def test_each_has_a_dropout_of_its_own():
    """One adapter and one text three times: keys that differ are all that differs."""
    way = ways("dropout")
    stacked = lora_jax.take(lora_jax.stack(way.deltas), jnp.zeros(ADAPTERS, int))
    loss = jax.jit(jax.vmap(way.loss, in_axes=(0, None, None, 0)))
    losses = loss(stacked, way.frozen, way.ids[0], way.keys)
    assert len({float(value) for value in losses}) == ADAPTERS
    assert (
        len({float(value) for value in loss(stacked, way.frozen, way.ids[0], way.keys[jnp.zeros(3, int)])})
        == 1
    )


@pytest.mark.parametrize("mapped", ["x", "labels", "head"])
def test_losses_whose_operands_are_mapped_in_part(mapped):
    """Texts, labels or heads of their own, and the rest shared: values and gradients of each."""
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(3, 2, 9, 5)), jnp.float32)
    head = jnp.asarray(draw.normal(size=(3, 5, 7)), jnp.float32)
    labels = jnp.asarray(draw.integers(7, size=(3, 2, 9)))
    one = lambda x, head, labels: _losses.head_losses(lambda x, head: x @ head, x, head, labels)
    gradient = jax.value_and_grad(lambda x, head, labels: jnp.sum(jnp.sin(one(x, head, labels))))
    axes = [0 if name == mapped else None for name in ("x", "head", "labels")]
    operands = [a if axis == 0 else a[0] for a, axis in zip((x, head, labels), axes, strict=True)]
    found = jax.vmap(gradient, axes)(*operands)
    for number in range(3):
        own = [a[number] if axis == 0 else a for a, axis in zip(operands, axes, strict=True)]
        expected = gradient(*own)
        for mine, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine[number], other, rtol=1e-5, atol=1e-5)


def test_a_gradient_of_a_gradient_of_the_losses():
    """`custom_vmap` has no derivative backwards; the losses under `vmap` have."""
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(3, 2, 9, 5)), jnp.float32)
    head, labels = (
        jnp.asarray(draw.normal(size=(5, 7)), jnp.float32),
        jnp.asarray(draw.integers(7, size=(2, 9))),
    )
    chunked = lambda x: jnp.sum(_losses.head_losses(lambda x, head: x @ head, x, head, labels))
    whole = lambda x: jnp.sum(_losses.cross_entropy(x @ head, labels))
    twice = lambda f: jax.vmap(jax.grad(lambda x: jnp.sum(jnp.sin(jax.grad(f)(x)))))(x)
    np.testing.assert_allclose(twice(chunked), twice(whole), atol=1e-5)
