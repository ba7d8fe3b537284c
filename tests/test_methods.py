"""All methods (the rows, in `method_rows.py`) have the same properties (the columns, a test each), on one
model that uses weights in every way. What is one method's own is in `methods/`."""

import functools

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from formation import formed
from method_columns import (
    adapted,
    adapters,
    close,
    COMPILED,
    defaults,
    equation,
    loss,
    MODEL,
    rows,
    TEACHER,
    weight_of,
)
from method_rows import (
    adapters_of,
    AXES,
    BY_NAME,
    case,
    literal,
    model,
    OUT,
    parameters,
    precision,
    quickly,
    TOKENS,
    WEIGHT_SIZES,
    WIDTH,
)

import lora_jax
from lora_jax._paths import named_leaves
from lora_jax._tree.nodes import Fixed, is_node
from lora_jax.checkpoint import Checkpoints, State


# --- the values ---------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=None)
def base_outputs():
    params = parameters("float32")
    return MODEL(params, TOKENS), model(params, TOKENS)


@rows
def test_starts_from_the_base(name):
    """To the bit, compiled or not, with a key or without. Compiled without optimisation: which products and
    sums LLVM rounds as one depends on what stands around them, in the plain model too."""
    here = case(name)
    compiled, eager = base_outputs()
    for key in (None, jax.random.key(5)):
        tree = lora_jax.combine(here.frozen, here.start, key=key)
        np.testing.assert_array_equal(COMPILED(tree, TOKENS), compiled)
    np.testing.assert_array_equal(adapted(here.frozen, here.start), eager)


@functools.lru_cache(maxsize=None)
def model_and_gradient():
    """In float64, of the plain model: one program for all rows."""

    @quickly
    def both(params, weights):
        output, backward = jax.vjp(lambda params: model(params, TOKENS), params)
        return output, backward(weights)[0]

    return both


@functools.lru_cache(maxsize=None)
def exact(name):
    """In float64: value and gradient of the adapted model, of the one with W' by the equation, and of the
    merged one.
    """
    here, (by_equation, pulled_back) = case(name, "float64"), equation(name)

    @quickly
    def of_adapted(frozen, delta, weights):
        output, backward = jax.vjp(lambda delta: adapted(frozen, delta), delta)
        return output, backward(weights)[0]

    @quickly
    def there_and_back(frozen, delta):
        merged = lora_jax.merge(frozen, delta)
        return merged, None if name == "Full" else lora_jax.unmerge(merged, delta, frozen=frozen)

    with precision("float64"):
        weights = jnp.asarray(np.random.default_rng(4).normal(size=(*TOKENS.shape, OUT)))
        literally = by_equation(here.later, here.delta)
        merged, back = there_and_back(here.later, here.delta)
        output, cotangent = model_and_gradient()(literally, weights)
        return {
            "merged": merged,
            "literal": literally,
            "back": back,
            "of merged": model_and_gradient()(merged, weights)[0],
            "found": of_adapted(here.later, here.delta, weights),
            "expected": (output, pulled_back(here.later, here.delta, cotangent)),
        }


@rows
def test_merged_and_adapted_are_the_equation(name):
    found = exact(name)
    close(found["merged"], found["literal"], 1e-14)
    close(found["found"][0], found["of merged"], 1e-12)
    close(found["found"][0], found["expected"][0], 1e-12)
    assert np.max(np.abs(found["merged"]["qkv"] - case(name, "float64").params["qkv"])) > 0.1


@rows
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2.0**-6)])
def test_adapted_is_merged_in_few_bits(name, dtype, tolerance):
    """Both are near the equation in float32, on the average over the outputs; a single one tells what the
    model amplifies.
    """
    row, here = BY_NAME[name], case(name, dtype)
    wide = lambda tree: jax.tree.map(lambda array: array.astype("float32"), tree)

    @quickly
    def weights(frozen, delta):
        return lora_jax.merge(frozen, delta), literal(row, wide(frozen), wide(delta))

    merged, by_equation = weights(here.frozen, here.delta)
    found = COMPILED(lora_jax.combine(here.frozen, here.delta), TOKENS), MODEL(merged, TOKENS)
    expected = MODEL(by_equation, TOKENS)
    assert [output.dtype for output in found] == [dtype] * 2
    assert jax.tree.map(lambda leaf: leaf.dtype, merged) == jax.tree.map(lambda leaf: leaf.dtype, here.params)
    for output in found:
        error = np.asarray(output, np.float64) - np.asarray(expected, np.float64)
        assert np.sqrt(np.mean(error**2)) <= tolerance * np.max(np.abs(expected))


@rows
def test_unmerge_undoes_merge(name):
    row, here = BY_NAME[name], case(name, "float64")
    if name == "Full":
        with pytest.raises(ValueError, match=r"trained themselves \(`Full`\)"):
            lora_jax.unmerge(here.params, here.delta, frozen=here.frozen)
        return
    close(exact(name)["back"], here.params, 1e-13)
    if row.fixed:
        with pytest.raises(
            ValueError,
            match=(
                rf"`unmerge` of the {type(row.method).__name__} adapter of .* needs "
                rf"{', '.join(sorted(row.fixed))}"
            ),
        ):
            lora_jax.unmerge(here.params, here.delta)


# --- what trains --------------------------------------------------------------------------------------------


@rows
def test_gradients_are_those_of_the_equation(name):
    """Which holds constant what the paper holds constant."""
    close(exact(name)["found"][1], exact(name)["expected"][1], 1e-11)


@rows
def test_exactly_this_trains(name):
    row, here = BY_NAME[name], case(name)
    if name == "Full":
        assert all(
            one is two
            for one, two in zip(jax.tree.leaves(here.start), jax.tree.leaves(here.params), strict=True)
        )
        assert not jax.tree.leaves(here.frozen)
        return
    nodes = {path: node for path, node in named_leaves(here.start, is_leaf=is_node) if node is not None}
    assert set(nodes) == set(AXES)
    kept = {path: node for path, node in named_leaves(here.frozen, is_leaf=is_node)}
    for path, node in nodes.items():
        own = row.of(path)
        assert set(node.arrays) == set(own.trains)
        assert isinstance(kept[path], Fixed) == bool(own.fixed)
        assert not own.fixed or set(kept[path].arrays) == set(own.fixed)
    for (path, node), weight in zip(kept.items(), jax.tree.leaves(here.params), strict=True):
        assert weight_of(node) is weight, path


@functools.lru_cache(maxsize=None)
def training(name):
    """Twenty steps as a trainer does them, delta and state donated; then a few from another adapter of
    another base.
    """
    row, here = BY_NAME[name], case(name)
    tx = optax.adamw(row.learning_rate, weight_decay=1e-3)
    target = MODEL(TEACHER, TOKENS)
    other = jax.tree.map(lambda array: jnp.asarray(2 * np.asarray(array)), here.params)

    @functools.partial(quickly, donate_argnums=(0, 1))
    def step(delta, state, frozen, tokens, target, key):
        found["traced"] += 1
        value, gradient = jax.value_and_grad(lambda delta: loss(frozen, delta, tokens, target, key))(delta)
        updates, state = tx.update(gradient, state, delta)
        return optax.apply_updates(delta, updates), state, value, gradient

    # Not under the defaults, by which JAX would compile all that `lorafy` does a second time.
    (frozen, delta), again = adapters_of(row, parameters("float32")), adapters_of(row, other, seed=4)
    found = {"traced": 0, "losses": [], "gradients": [], "tx": tx, "frozen": row.begin(frozen, delta)}
    other = row.begin(*again), jax.tree.map(lambda array: jnp.array(np.array(array)), again.delta)
    with defaults():
        state = tx.init(delta)
        for seed in range(20):
            delta, state, value, gradient = step(
                delta, state, found["frozen"], TOKENS, target, jax.random.key(seed)
            )
            found["losses"].append(float(value))
            found["gradients"].append(jax.tree.map(np.asarray, gradient))
        found |= {"delta": delta, "state": state}
        frozen, delta = other
        state = tx.init(delta)
        for seed in range(2):
            delta, state, *_ = step(delta, state, frozen, TOKENS[::-1].copy(), -target, jax.random.key(seed))
    return found


@rows
def test_learns(name):
    """Towards weights that are all a little different; the loss falls to less than half in 20 steps."""
    losses = training(name)["losses"]
    assert np.mean(losses[-3:]) < 0.5 * losses[0], losses


@rows
def test_one_compilation(name):
    """Over steps, keys, other adapters and another base."""
    assert training(name)["traced"] == 1


@rows
def test_everything_that_trains_moves_and_nothing_else(name):
    here, found = case(name), training(name)
    largest = jax.tree.map(lambda *steps: max(np.max(np.abs(step)) for step in steps), *found["gradients"])
    assert all(value > 0 for value in jax.tree.leaves(largest)), largest
    assert jax.tree.structure(largest) == jax.tree.structure(here.start)
    # Two moments for every trained array, and a counter.
    bytes_of = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert bytes_of(found["state"]) == 2 * bytes_of(here.start) + 4
    # Donated, and yet the frozen tree is there and what it was: PiSSA and Delta-LoRA remember the start of
    # what is donated.
    jax.tree.map(np.testing.assert_array_equal, found["frozen"], here.frozen)


@rows
def test_checkpoints(name, tmp_path):
    found = training(name)
    with Checkpoints(tmp_path, identity={"method": name}) as checkpoints:
        checkpoints.save(State(found["delta"], found["state"], 20, (0, 20), jax.random.key(1)))
        zeros = lambda array: jnp.asarray(np.zeros(array.shape, array.dtype))
        blank = jax.tree.map(zeros, (found["delta"], found["state"]))
        back = checkpoints.restore(*blank)
    for one, two in ((back.delta, found["delta"]), (back.opt_state, found["state"])):
        assert jax.tree.structure(one) == jax.tree.structure(two)
        for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
            assert left.dtype == right.dtype and np.array_equal(left, right)


# --- what must not happen -----------------------------------------------------------------------------------


def every_aval(jaxpr):
    """Of every array that is computed, at any depth."""
    for eqn in jaxpr.eqns:
        yield from (var.aval for var in eqn.outvars)
        for entry in eqn.params.values():
            for value in entry if isinstance(entry, tuple | list) else [entry]:
                if isinstance(value, jex.Jaxpr | jex.ClosedJaxpr):
                    yield from every_aval(getattr(value, "jaxpr", value))


@rows
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes(name, dtype, x64):
    """Where float64 is allowed, none of it comes in: the factors of a narrow base are float32."""
    here = case(name, dtype)
    for leaf in jax.tree.leaves((here.start, training(name)["delta"] if dtype == "float32" else ())):
        assert leaf.dtype == (dtype if name == "Full" else "float32") and not leaf.weak_type
    value = lambda delta: jnp.sum(adapted(here.frozen, delta).astype("float32"))
    jaxpr = jax.make_jaxpr(jax.value_and_grad(value))(here.delta)
    floats = {aval.dtype.name for aval in every_aval(jaxpr.jaxpr) if jnp.issubdtype(aval.dtype, jnp.floating)}
    assert floats <= {dtype, "float32"}
    gradient = jax.eval_shape(jax.grad(value), here.delta)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), gradient) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), here.delta
    )


def weight_positions(frozen, arguments):
    """Where among the flat arguments the weights of `frozen` are."""
    nodes = [node for node in jax.tree.leaves(frozen, is_leaf=is_node) if node is not None]
    weights = [id(weight_of(node)) for node in nodes]
    return [position for position, leaf in enumerate(jax.tree.leaves(arguments)) if id(leaf) in weights]


@adapters
def test_no_weight_is_formed(name):
    here = case(name)

    def jaxpr_of(function):
        value = lambda frozen, delta, tokens, shift: jnp.sum(
            jnp.square(function(frozen, delta, tokens, shift))
        )
        return jax.make_jaxpr(jax.value_and_grad(value, (1, 3)))(*arguments)

    arguments = (here.frozen, here.delta, TOKENS, jnp.zeros(WIDTH))
    positions = weight_positions(here.frozen, arguments)
    assert len(positions) == len(jax.tree.leaves(here.params))
    key = jax.random.key(0)
    jaxpr = jaxpr_of(lambda frozen, delta, *rest: adapted(frozen, delta, *rest, key=key))
    control = jaxpr_of(lambda frozen, delta, *rest: model(lora_jax.merge(frozen, delta), *rest))
    for size in WEIGHT_SIZES:
        assert not formed(jaxpr, positions, size), formed(jaxpr, positions, size)
    assert all(formed(control, positions, size) for size in WEIGHT_SIZES - {WIDTH * 20}), (
        "the walk does not see the merged form"
    )
