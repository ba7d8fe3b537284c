"""All methods (the rows, in `method_rows.py`) have the same properties (the columns, a test each), on one
model that uses weights in every way. Below the columns: what is one method's own."""

import contextlib
import dataclasses
import functools

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from formation import formed
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P
from method_rows import (
    ADAPTERS,
    adapters_of,
    APART,
    AXES,
    by_matrix,
    BY_NAME,
    case,
    layer,
    literal,
    model,
    moved,
    OUT,
    parameters,
    precision,
    quickly,
    TOKENS,
    WEIGHT_SIZES,
    WIDTH,
)

import lora_jax
from lora_jax import AdaLoRA, DeltaLoRA, DoRA, DyLoRA, LoRA, LoRAFA, PiSSA, VeRA
from lora_jax._paths import named_leaves
from lora_jax._tree.nodes import Adapter, Fixed, is_node, resolved, Shared
from lora_jax.checkpoint import Checkpoints, State
from lora_jax.methods import orthogonality, start_delta, truncate
from lora_jax.sharding import delta_specs, frozen_specs, partition_specs, shardings


FORWARD = lora_jax.adapt(model)
rows = pytest.mark.parametrize("name", BY_NAME)
adapters = pytest.mark.parametrize("name", ADAPTERS)
distinct = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if row.like else []) for name, row in BY_NAME.items()],
)


def adapted(frozen, delta, *args, key=None):
    return FORWARD(lora_jax.combine(frozen, delta, key=key), *(args or (TOKENS,)))


def weight_of(node):
    return node.weight if isinstance(node, Fixed) else node


def close(left, right, tolerance):
    """Equal within `tolerance` of the largest number of each array."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, one), two in zip(named_leaves(left), jax.tree.leaves(right), strict=True):
        one, two = np.asarray(one, np.float64), np.asarray(two, np.float64)
        assert one.shape == two.shape and np.all(np.isfinite(one)), path
        assert np.max(np.abs(one - two)) <= tolerance * np.max(np.abs(two)), (
            path,
            np.max(np.abs(one - two)) / np.max(np.abs(two)),
        )


# --- the values ---------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=None)
def base_outputs():
    params = parameters("float32")
    return quickly(model)(params, TOKENS), model(params, TOKENS)


@rows
def test_starts_from_the_base(name):
    """To the bit, compiled or not, with a key or without. Compiled without optimisation: which products and
    sums LLVM rounds as one depends on what stands around them, in the plain model too."""
    here = case(name)
    compiled, eager = base_outputs()
    forward = quickly(FORWARD)
    for key in (None, jax.random.key(5)):
        np.testing.assert_array_equal(
            forward(lora_jax.combine(here.frozen, here.start, key=key), TOKENS), compiled
        )
    np.testing.assert_array_equal(adapted(here.frozen, here.start), eager)


@functools.lru_cache(maxsize=None)
def exact(name):
    """In float64: value and gradient of the adapted model, of the one with W' by the equation, and of the
    merged one.
    """
    row, here = BY_NAME[name], case(name, "float64")

    @quickly
    def everything(frozen, delta, weights):
        def differentiated(function):
            value = lambda delta: (jnp.sum(function(delta) * weights), function(delta))
            gradient, output = jax.grad(value, has_aux=True)(delta)
            return output, gradient

        merged = lora_jax.merge(frozen, delta)
        back = None if name == "Full" else lora_jax.unmerge(merged, delta, frozen=frozen)
        found = differentiated(lambda delta: adapted(frozen, delta))
        expected = differentiated(lambda delta: model(literal(row, frozen, delta), TOKENS))
        values = {
            "merged": merged,
            "literal": literal(row, frozen, delta),
            "of merged": model(merged, TOKENS),
        }
        return values | {"back": back, "found": found, "expected": expected}

    with precision("float64"):
        return everything(
            here.later, here.delta, jnp.asarray(np.random.default_rng(4).normal(size=(*TOKENS.shape, OUT)))
        )


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
    def outputs(frozen, delta):
        merged = lora_jax.merge(frozen, delta)
        return (
            adapted(frozen, delta),
            model(merged, TOKENS),
            merged,
            model(literal(row, wide(frozen), wide(delta)), TOKENS),
        )

    *found, merged, expected = outputs(here.frozen, here.delta)
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


TEACHER = moved(parameters("float32"), 0.15, seed=7)


def loss(frozen, delta, tokens, target, key=None):
    return jnp.mean(jnp.square(adapted(frozen, delta, tokens, key=key) - target))


def defaults():
    """JAX's default promotion, which optax counts on."""
    both = contextlib.ExitStack()
    both.enter_context(jax.numpy_dtype_promotion("standard"))
    both.enter_context(jax.numpy_rank_promotion("allow"))
    return both


@functools.lru_cache(maxsize=None)
def training(name):
    """Twenty steps as a trainer does them, delta and state donated; then a few from another adapter of
    another base.
    """
    row, here = BY_NAME[name], case(name)
    tx = optax.adamw(row.learning_rate, weight_decay=1e-3)
    target = model(TEACHER, TOKENS)

    @functools.partial(quickly, donate_argnums=(0, 1))
    def step(delta, state, frozen, tokens, target, key):
        found["traced"] += 1
        value, gradient = jax.value_and_grad(lambda delta: loss(frozen, delta, tokens, target, key))(delta)
        updates, state = tx.update(gradient, state, delta)
        return optax.apply_updates(delta, updates), state, value, gradient

    found = {"traced": 0, "losses": [], "gradients": [], "tx": tx}
    with defaults():
        frozen, delta = adapters_of(row, parameters("float32"))
        found["frozen"], state = row.begin(frozen, delta), tx.init(delta)
        for seed in range(20):
            delta, state, value, gradient = step(
                delta, state, found["frozen"], TOKENS, target, jax.random.key(seed)
            )
            found["losses"].append(float(value))
            found["gradients"].append(jax.tree.map(np.asarray, gradient))
        found |= {"delta": delta, "state": state}
        frozen, delta = adapters_of(row, jax.tree.map(lambda array: 2 * array, here.params), seed=4)
        frozen, delta = (
            row.begin(frozen, delta),
            jax.tree.map(lambda array: jnp.asarray(np.array(array)), delta),
        )
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
        blank = jax.tree.map(jnp.zeros_like, (found["delta"], found["state"]))
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


# --- with everything else -----------------------------------------------------------------------------------

TRANSFORMATIONS = {
    "jit": jax.jit,
    "grad": lambda function: (
        lambda w, tokens, shift: jax.grad(lambda shift: jnp.sum(function(w, tokens, shift) ** 2))(shift)
    ),
    "vmap": lambda function: jax.vmap(function, (None, 0, None)),
    "scan": lambda function: (
        lambda w, tokens, shift: lax.scan(lambda total, row: (total, function(w, row, shift)), 0, tokens)[1]
    ),
    "checkpoint": jax.checkpoint,
}


@distinct
def test_composes_with_transformations(name, x64):
    """Each transformation, inside of the adapted function and around it: values, and the gradient of
    their sum.
    """
    here = case(name, "float64")
    rng = np.random.default_rng(6)
    tokens, shift = jnp.asarray(TOKENS), jnp.asarray(rng.normal(size=WIDTH))
    forms = {}
    for kind, transformation in TRANSFORMATIONS.items():
        forms[kind, "inside"] = lora_jax.adapt(transformation(model))
        forms[kind, "around"] = transformation(FORWARD)
    weights = {
        kind: jnp.asarray(rng.normal(size=(WIDTH,) if kind[0] == "grad" else (*TOKENS.shape, OUT)))
        for kind in forms
    }

    @quickly
    def all_of_them(frozen, delta, tokens, shift):
        def values(delta, weight_of):
            found = {kind: weight_of(kind, form)(delta) for kind, form in forms.items()}
            return sum(jnp.sum(found[kind] * weights[kind]) for kind in forms), found

        tree = lambda form: lambda delta: form(lora_jax.combine(frozen, delta), tokens, shift)

        def merged(delta):
            plain = lora_jax.merge(frozen, delta)
            whole, inner = model(plain, tokens, shift), TRANSFORMATIONS["grad"](model)(plain, tokens, shift)
            found = {kind: inner if kind[0] == "grad" else whole for kind in forms}
            return sum(jnp.sum(found[kind] * weights[kind]) for kind in forms), found

        adapted = lambda delta: values(delta, lambda kind, form: tree(form))
        return [jax.grad(function, has_aux=True)(delta) for function in (adapted, merged)]

    (gradient, found), (expected_gradient, expected) = all_of_them(here.frozen, here.delta, tokens, shift)
    close(
        {"/".join(kind): value for kind, value in found.items()},
        {"/".join(kind): value for kind, value in expected.items()},
        1e-12,
    )
    close(gradient, expected_gradient, 1e-11)


@rows
def test_loops_over_the_layers_of_a_combined_tree(name, x64):
    """A user's own scan, or vmap, over the stacked leaves, around an adapted layer."""
    row, here = BY_NAME[name], case(name, "float64")
    tree = lora_jax.combine(here.frozen, here.delta)
    step = lora_jax.adapt(layer)
    x = jnp.asarray(np.random.default_rng(8).normal(size=(5, WIDTH)))

    @quickly
    def both(tree, plain, x):
        results = []
        for weights, function in ((tree["layers"], step), (plain["layers"], layer)):
            looped = lax.scan(lambda x, weights, function=function: (function(weights, x), None), x, weights)[
                0
            ]
            mapped = jax.vmap(function, (0, None))(weights, x)
            results.append((looped, mapped))
        return results

    fixed = [node for node in jax.tree.leaves(here.frozen, is_leaf=is_node) if isinstance(node, Fixed)]
    if any(isinstance(array, Shared) for node in fixed for array in node.arrays.values()):
        with pytest.raises(
            ValueError, match="shares shared_a with that of 'heads', which is missing: pass the whole tree"
        ):
            both(tree, here.params, x)
        return
    close(*both(tree, literal(row, here.frozen, here.delta), x), 1e-12)


MESH_RULES = (
    ("table", P(None, ("fsdp", "tensor"))),
    ("qkv|up|down|out", P("fsdp", "tensor")),
    ("heads", P("fsdp", None, "tensor")),
)


@distinct
def test_sharded(name):
    """A step of training on eight devices, weights and adapters split alike, is the step on one."""
    row, here = BY_NAME[name], case(name)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    specs = partition_specs(here.params, MESH_RULES)
    frozen = jax.device_put(here.frozen, shardings(mesh, frozen_specs(here.frozen, specs), here.frozen))
    delta = jax.device_put(here.delta, shardings(mesh, delta_specs(here.delta, specs), here.delta))
    batch = jax.device_put(TOKENS, jax.NamedSharding(mesh, P(("data", "fsdp"))))
    for (path, node), kept in zip(
        named_leaves(delta, is_leaf=is_node), jax.tree.leaves(frozen, is_leaf=is_node), strict=True
    ):
        if isinstance(node, Adapter):
            weight, spec, kinds = weight_of(kept), node.spec, row.of(path).trains | row.of(path).fixed
            part = weight.sharding.shard_shape(weight.shape)
            assert part != weight.shape
            layers, ins, outs = (
                [part[axis] for axis in spec.axis_indices(word)] for word in ("layer", "in", "out")
            )
            for label, array in (node.arrays | (kept.arrays if isinstance(kept, Fixed) else {})).items():
                if not isinstance(array, Shared):
                    shapes = {
                        "a": (*layers, *ins, array.shape[-1]),
                        "b": (*layers, array.shape[len(layers)], *outs),
                        "out": (*layers, *outs),
                    }
                    shapes["a of blocks"] = (array.shape[0], *shapes["a"])
                    assert array.sharding.shard_shape(array.shape) == shapes.get(kinds[label], array.shape), (
                        path,
                        label,
                    )

    tx = optax.adamw(1e-3)

    @quickly
    def step(frozen, delta, tokens):
        value, gradient = jax.value_and_grad(
            lambda delta: loss(frozen, delta, tokens, jnp.ones((), "float32"))
        )(delta)
        return value, optax.apply_updates(delta, tx.update(gradient, tx.init(delta), delta)[0])

    with defaults():
        close(step(frozen, delta, batch), step(here.frozen, here.delta, TOKENS), 1e-6)


@rows
def test_from_shapes(name):
    row, here = BY_NAME[name], case(name)
    shapes = jax.eval_shape(lambda: parameters("float32"))
    frozen, delta = adapters_of(row, shapes)
    frozen = row.begin(frozen, delta)
    for found, real in ((frozen, here.frozen), (delta, here.start)):
        assert jax.tree.structure(found) == jax.tree.structure(real)
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(found))
        assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(found)] == [
            (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(real)
        ]
    explanation = lora_jax.explain(model, lora_jax.combine(frozen, delta), TOKENS)
    assert not explanation.formed and not explanation.unused and not explanation.contradictory
    assert {use.path for use in explanation.uses} == (set() if name == "Full" else set(AXES))
    merged = lora_jax.merge(frozen, delta)
    assert merged == shapes


@rows
def test_partition_and_summary(name, capsys):
    row, here = BY_NAME[name], case(name)
    for key in (None, jax.random.key(1)):
        back = lora_jax.partition(lora_jax.combine(here.frozen, here.delta, key=key))
        for found, given in zip(back, (here.frozen, here.delta), strict=True):
            assert jax.tree.structure(found) == jax.tree.structure(given)
            assert all(
                one is two for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(given), strict=True)
            )
    print(lora_jax.summary(here.params, here.delta))
    *lines, total = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + (len(jax.tree.leaves(here.params)) if name == "Full" else len(AXES))
    assert all(f"{type(row.method).__name__}(" in line for line in lines[2:])
    trains, of = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (here.delta, here.params))
    assert total.startswith(f"trainable {trains:,} of {of:,} parameters")


# --- unusual uses -------------------------------------------------------------------------------------------


def _conv(w, x):
    return jnp.tanh(
        lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    )


def _indexed(w, x):
    """Layers picked from a stack: by number, by a traced number, and two at once."""
    x = jnp.tanh(x @ w[2]) @ w[jnp.asarray(x[0, 0] > 1e9, int)]
    return jnp.einsum("td,ldk->ltk", x, w[jnp.array([1, 0])])


def _tied(w, x):
    """An embedding that is the head as well."""
    return jnp.tanh(w[jnp.array([[3, 1], [0, 7]])] * x) @ w.T


UNUSUAL = {
    "conv": ((3, 3, 2, 4), "in in in out", (1, 5, 4, 2), _conv),
    "indexed": ((3, 5, 5), "layer in out", (2, 5), _indexed),
    "tied": ((8, 5), "in out", (2, 2, 5), _tied),
}


def single(name, shape, axes, **options):
    """One weight in float64 with the method of this row, moved: its two trees, and W' by the equation."""
    row = BY_NAME[name]
    own = row.qkv if row.qkv and axes == "in out" and shape[1] % 3 == 0 else row
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=shape))}
    frozen, start = lora_jax.lorafy(params, "w", method=dataclasses.replace(own.method, **options), axes=axes)
    frozen = row.begin(frozen, start)

    def equation(delta):
        fixed = frozen["w"].arrays if isinstance(frozen["w"], Fixed) else {}
        return {"w": by_matrix(own, params["w"], tuple(axes.split()), delta["w"].arrays | fixed)}

    return params, frozen, start, equation


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize("use", UNUSUAL)
def test_unusual_uses(name, use, x64):
    """Value and gradient, with respect to the input too, are those of the equation, and no weight is
    formed.
    """
    shape, axes, x_shape, function = UNUSUAL[use]
    params, frozen, start, equation = single(name, shape, axes)
    x = jnp.asarray(np.random.default_rng(1).normal(size=x_shape))
    forward = lora_jax.adapt(lambda params, x: function(params["w"], x))

    def differentiated(outputs):
        value = lambda delta, x: (jnp.sum(outputs(delta, x) ** 2), outputs(delta, x))
        return jax.grad(value, (0, 1), has_aux=True)

    of_adapted = differentiated(lambda delta, x: forward(lora_jax.combine(frozen, delta), x))
    of_equation = differentiated(lambda delta, x: function(equation(delta)["w"], x))
    delta = moved(start)
    close(*quickly(lambda delta, x: (of_adapted(delta, x), of_equation(delta, x)))(delta, x), 1e-11)
    assert not lora_jax.explain(
        lambda params, x: function(params["w"], x), lora_jax.combine(frozen, delta), x
    ).formed


def test_a_tied_embedding_has_to_have_its_axes_named():
    """Methods for which in and out are not alike do not guess which of its two uses counts."""
    shapes, x = {"w": jax.ShapeDtypeStruct((8, 5), "float32")}, jax.ShapeDtypeStruct((2, 2, 5), "float32")
    read = lambda method: lora_jax.lorafy(
        shapes, "w", method=method, fn=lambda params, x: _tied(params["w"], x), args=(x,)
    )
    for method in (LoRA(rank=2), AdaLoRA(rank=2), PiSSA(rank=2), DeltaLoRA(rank=2), DyLoRA(rank=2)):
        assert read(method).delta["w"].spec.axes == ("in", "out")
    for method in (DoRA(rank=2), VeRA(rank=2), LoRAFA(rank=2)):
        with pytest.raises(
            ValueError, match=r"uses 'w', of shape \(8, 5\), in contradictory ways.*Pass `axes="
        ):
            read(method)


def test_a_gradient_inside_that_keeps_a_view_of_each_layer_is_refused():
    """The derivative of a scan hands the transposed layers on from the forward to the backward loop, as
    an output.
    """
    frozen, delta = lora_jax.lorafy({"w": jnp.ones((3, 4, 4))}, "w", method=LoRA(rank=2), axes="layer out in")
    looped = lambda params, x: lax.scan(lambda x, w: (jnp.tanh(x @ w.T), None), x, params["w"])[0]
    inside = lora_jax.adapt(jax.grad(lambda x, params: jnp.sum(looped(params, x))))
    with pytest.raises(lora_jax.MaterializeError, match="`scan`.*'w'"):
        inside(jnp.ones((2, 4)), lora_jax.combine(frozen, delta))
    jax.grad(lambda x: jnp.sum(lora_jax.adapt(looped)(lora_jax.combine(frozen, delta), x)))(
        jnp.ones((2, 4))
    )  # around: fine


DROPPED = [
    name for name in APART if "dropout" in {field.name for field in dataclasses.fields(BY_NAME[name].method)}
]


@pytest.mark.parametrize("name", DROPPED)
def test_dropout(name):
    """Without a key none; with keys, the mean is the output without; at the start there is nothing to
    drop; lookups are not dropped.
    """
    rate, keys = {"dropout": 0.5}, jax.random.split(jax.random.key(0), 4000)
    frozen, start, equation = single(name, (6, 6), "in out", **rate)[1:]
    delta = moved(start, 0.5)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 6)), "float32")
    forward = lora_jax.adapt(lambda params, x: (x @ params["w"], params["w"][jnp.array([4, 0])]))

    @quickly
    def outputs(delta, frozen, x):  # all are arguments, so that XLA folds none of them
        dropped = jax.vmap(lambda key: forward(lora_jax.combine(frozen, delta, key=key), x))(keys)
        return dropped, forward(lora_jax.combine(frozen, delta), x), x @ weight_of(frozen["w"])

    (dropped, rows), (plain, row), _ = outputs(delta, frozen, x)
    weight = equation(delta)["w"]
    close((plain, row), (x @ weight, weight[jnp.array([4, 0])]), 1e-5)
    if name == "DyLoRA":  # the keys draw the rank too
        a, b = delta["w"].arrays["a"], delta["w"].arrays["b"]
        plain = jnp.mean(
            jnp.stack([x @ (frozen["w"] + 3 / rank * a[:, :rank] @ b[:rank]) for rank in (1, 2)]), 0
        )
    else:
        np.testing.assert_array_equal(rows, jnp.broadcast_to(row, rows.shape))
    error = np.std(dropped, 0) / np.sqrt(len(keys))
    assert np.any(error > 1e-3) and np.all(np.abs(np.mean(dropped, 0) - plain) < 5 * error + 1e-6)
    (dropped, _), (plain, _), base = outputs(start, frozen, x)
    np.testing.assert_array_equal(plain, base)
    np.testing.assert_array_equal(dropped, jnp.broadcast_to(base, dropped.shape))


@pytest.mark.parametrize(
    "method",
    [DoRA(rank=2), VeRA(rank=4), LoRAFA(rank=2), PiSSA(rank=2), DeltaLoRA(rank=2)],
    ids=lambda method: type(method).__name__,
)
def test_what_does_not_belong_together_is_refused(method):
    """The parameters in place of `frozen`, a habit from LoRA, and the `frozen` of another method."""
    params = {"w": jnp.ones((8, 8))}
    frozen, delta = lora_jax.lorafy(params, "w", method=method)
    for call in (lora_jax.merge, lora_jax.combine, lora_jax.merge_report, lora_jax.arithmetic.as_lora):
        with pytest.raises(
            ValueError,
            match=f"do not belong together: the {type(method).__name__} adapter of 'w' needs .* in `frozen`",
        ):
            call(params, delta)
    other = lora_jax.lorafy(
        params, "w", method=PiSSA(rank=2) if isinstance(method, DeltaLoRA) else DeltaLoRA(rank=2)
    ).frozen
    with pytest.raises(ValueError, match="do not belong together"):
        lora_jax.merge(other, delta)
    if isinstance(method, VeRA):
        with pytest.raises(ValueError, match="do not belong together.*seed=1"):
            lora_jax.merge(lora_jax.lorafy(params, "w", method=VeRA(rank=4, seed=1)).frozen, delta)


@pytest.mark.parametrize("method", [DoRA(rank=2), VeRA(rank=4)], ids=lambda method: type(method).__name__)
def test_a_part_of_a_weight_is_refused(method):
    """Its norm, or its part of the projections, is not that of the whole."""
    frozen, delta = lora_jax.lorafy({"w": jnp.ones((8, 8))}, "w", method=method)
    part = jax.tree.map(lambda leaf: leaf[:4] if leaf.shape == (8, 8) else leaf, frozen)
    with pytest.raises(
        ValueError,
        match=r"needs the whole weight, of shape \(8, 8\), and has a part of it, \(4, 8\): a `shard_map`",
    ):
        lora_jax.adapt(lambda params, x: x @ params["w"])(lora_jax.combine(part, delta), jnp.ones((1, 4)))


def test_summary_of_what_is_at_hand(capsys):
    """Of `frozen` too, where the parameters are gone."""
    params = {"w": jnp.ones((64, 64)), "b": jnp.ones(64)}
    frozen, delta = lora_jax.lorafy(params, "w", method=DoRA(rank=2))
    for tree in (params, frozen, lora_jax.quantize(frozen, "nf4")):
        print(lora_jax.summary(tree, delta))
    first, second, third = capsys.readouterr().out.split("leaf ")[1:]
    assert first == second == third and "of 4,160 parameters" in first


# --- DoRA ---------------------------------------------------------------------------------------------------


def test_dora_in_bfloat16_multiplies_in_float32():
    """It multiplies in float32, with the one rounding of the result: in bfloat16, 1.01 would be 1.0078
    itself.
    """
    weight = jax.random.normal(jax.random.key(0), (64, 64), jnp.bfloat16)
    frozen, delta = lora_jax.lorafy({"w": weight}, "w", method=DoRA(rank=2))
    x = jax.random.normal(jax.random.key(1), (256, 64), jnp.bfloat16)
    forward = jax.jit(
        lora_jax.adapt(lambda params, x: (x @ params["w"], x @ params["w"].T, params["w"][jnp.arange(8)]))
    )
    base = forward(lora_jax.combine(frozen, delta), x)
    delta["w"].arrays["m"] = delta["w"].arrays["m"] * 1.01
    for found, plain in zip(forward(lora_jax.combine(frozen, delta), x), base, strict=True):
        found, plain = np.asarray(found, np.float64), np.asarray(plain, np.float64)
        np.testing.assert_allclose(np.sum(found * plain) / np.sum(plain * plain), 1.01, atol=1e-3)


@pytest.mark.parametrize(
    "shape, axes",
    [
        ((6, 4), "in out"),
        ((4, 6), "out in"),
        ((3, 6, 4), "layer in out"),
        ((6, 2, 4), "in out out"),
        ((3, 3, 2, 4), "in in in out"),
    ],
)
def test_dora_norm(shape, axes, x64):
    """By its expansion, and constant in the backward pass: the gradient through it is another one."""
    frozen, start = lora_jax.lorafy(
        {"w": jnp.asarray(np.random.default_rng(0).normal(size=shape))},
        "w",
        method=DoRA(rank=2, alpha=3),
        axes=axes,
    )
    delta = moved(start)
    node = delta["w"]
    magnitude = node.spec.method.canonical(
        frozen["w"].weight, frozen["w"].arrays, node.arrays, node.spec, None
    ).magnitude
    words = axes.split()
    letters = "".join("xyzw"[index] for index in range(len(words)))
    of = lambda *kinds: "".join(letter for letter, word in zip(letters, words, strict=True) if word in kinds)
    product = np.einsum(
        f"{of('layer')}{of('in')}r,{of('layer')}r{of('out')}->{letters}", node.arrays["a"], node.arrays["b"]
    )
    direction = np.asarray(frozen["w"].weight) + 1.5 * product
    norm = np.sqrt(np.einsum(f"{letters},{letters}->{of('layer')}{of('out')}", direction, direction))
    np.testing.assert_allclose(magnitude, node.arrays["m"] / norm, rtol=1e-13)
    # Had the norm a derivative, scaling V up would change nothing.
    gradient = jax.grad(lambda delta: jnp.sum(lora_jax.merge(frozen, delta)["w"] * direction))(delta)[
        "w"
    ].arrays
    moving = sum(jnp.sum(gradient[name] * node.arrays[name]) for name in ("b",))
    expected = 1.5 * np.sum(
        product
        * direction
        * np.einsum(f"{of('layer', 'out')},{letters}->{letters}", np.asarray(magnitude), np.ones(shape))
    )
    np.testing.assert_allclose(moving, expected, rtol=1e-11)


def test_dora_norm_in_float32_when_the_update_nearly_cancels_the_weight():
    """The worst case of the expansion: what is left is a hundredth of W."""
    rng = np.random.default_rng(0)
    a, b, rest = (rng.normal(size=sizes) for sizes in ((64, 4), (4, 32), (64, 32)))
    rest *= 0.01 * np.linalg.norm(a @ b) / np.linalg.norm(rest)
    frozen, delta = lora_jax.lorafy(
        {"w": jnp.asarray(rest - a @ b, "float32")}, "w", method=DoRA(rank=4, alpha=4)
    )
    arrays = {"a": jnp.asarray(a, "float32"), "b": jnp.asarray(b, "float32"), "m": jnp.ones(32)}
    found = (
        delta["w"]
        .spec.method.canonical(frozen["w"].weight, frozen["w"].arrays, arrays, delta["w"].spec, None)
        .magnitude
    )
    np.testing.assert_allclose(found, 1 / np.linalg.norm(rest, axis=0), rtol=0.02)


def test_dora_of_a_column_of_zeros():
    """It has no direction: the base's zeros at the start, a finite gradient, and it learns."""
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), "float32").at[:, 1].set(0.0)
    frozen, delta = lora_jax.lorafy({"w": weight}, "w", method=DoRA(rank=2))
    x, forward = jnp.ones((3, 6)), lora_jax.adapt(lambda params, x: x @ params["w"])
    np.testing.assert_array_equal(forward(lora_jax.combine(frozen, delta), x), x @ weight)
    step = quickly(
        jax.value_and_grad(
            lambda delta: jnp.mean(jnp.square(forward(lora_jax.combine(frozen, delta), x)[:, 1] - 1.0))
        )
    )
    for _ in range(60):
        value, gradient = step(delta)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((value, gradient)))
        delta = jax.tree.map(lambda array, slope: array - 0.05 * slope, delta, gradient)
    assert value < 0.01
    assert np.all(np.isfinite(lora_jax.merge(frozen, delta)["w"]))


# --- DyLoRA -------------------------------------------------------------------------------------------------

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
    a, b = delta["p"].arrays["a"], delta["p"].arrays["b"]
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, RANK)), "float32")
    gradient = quickly(
        jax.grad(lambda delta, key: jnp.sum(forward(lora_jax.combine(frozen, delta, key=key), x)[0] ** 2))
    )
    seen = set()
    for seed in range(12):
        found = gradient(delta, jax.random.key(seed))["p"].arrays
        rank = int(np.flatnonzero(np.any(found["b"] != 0, axis=1))[-1]) + 1
        whole = jax.grad(
            lambda a, b, rank=rank: jnp.sum((12 / rank * (x @ a[:, :rank]) @ b[:rank]) ** 2), (0, 1)
        )(a, b)
        trains = np.arange(RANK) == rank - 1 if train == "last" else np.arange(RANK) < rank
        np.testing.assert_allclose(found["a"], np.asarray(whole[0]) * trains[None], rtol=2e-5, atol=1e-5)
        np.testing.assert_allclose(found["b"], np.asarray(whole[1]) * trains[:, None], rtol=2e-5, atol=1e-5)
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
        arrays = here.delta["heads"].arrays
        update = 3 / rank * np.einsum("ir,rhk->ihk", arrays["a"][:, :rank], arrays["b"][:rank])
        close(lora_jax.merge(here.frozen, cut)["heads"], here.params["heads"] + update, 1e-6)
        arrays = here.delta["layers"]["up"].arrays
        update = 3 / rank * np.einsum("lir,lro->lio", arrays["a"][..., :rank], arrays["b"][:, :rank])
        close(lora_jax.merge(here.frozen, cut)["layers"]["up"], here.params["layers"]["up"] + update, 1e-6)
        close(adapted(here.frozen, cut), drawn[rank], 1e-5)
    for rank in (0, 3, 1.0, True):
        with pytest.raises(ValueError, match=rf"`rank` is {rank}; 'heads' can be truncated to 1 … 2"):
            truncate(here.delta, rank)
    with pytest.raises(ValueError, match="holds no DyLoRA adapter"):
        truncate(case("LoRA").delta, 1)


# --- Delta-LoRA ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimiser", [optax.sgd(0.05), optax.adamw(0.02, weight_decay=0.1)], ids=["sgd", "adamw"]
)
@pytest.mark.parametrize("waits", [0, 5])
def test_delta_lora_is_the_algorithm(optimiser, waits, x64, relaxed_promotion):
    """Fifteen steps of the paper's algorithm 1, with W itself updated after each: the same A, B and
    weight.
    """
    rng = np.random.default_rng(0)
    w, x, y = (jnp.asarray(rng.normal(size=sizes)) for sizes in ((5, 4), (7, 5), (7, 4)))
    frozen, delta = lora_jax.lorafy(
        {"w": w}, "w", method=DeltaLoRA(rank=2, alpha=3, ratio=0.5, delayed=waits > 0)
    )
    factors = {name: jnp.copy(array) for name, array in delta["w"].arrays.items()}

    @quickly
    def literally(w, factors, state, follows):
        def loss(factors):
            return jnp.mean((jnp.tanh(x @ (w + 1.5 * factors["a"] @ factors["b"])) - y) ** 2)

        updates, state = optimiser.update(jax.grad(loss)(factors), state, factors)
        after = optax.apply_updates(factors, updates)
        return w + follows * 0.5 * 1.5 * (after["a"] @ after["b"] - factors["a"] @ factors["b"]), after, state

    forward = lora_jax.adapt(lambda params: jnp.tanh(x @ params["w"]))

    @quickly
    def telescoped(frozen, delta, state):
        gradient = jax.grad(lambda delta: jnp.mean((forward(lora_jax.combine(frozen, delta)) - y) ** 2))(
            delta
        )
        updates, state = optimiser.update(gradient, state, delta)
        return optax.apply_updates(delta, updates), state

    state, other = optimiser.init(factors), optimiser.init(delta)
    for number in range(15):
        if number == waits and waits:
            frozen = start_delta(frozen, delta)
        w, factors, state = literally(w, factors, state, float(number >= waits))
        delta, other = telescoped(frozen, delta, other)
    close(delta["w"].arrays, factors, 1e-12)
    close(lora_jax.merge(frozen, delta)["w"], w + 1.5 * factors["a"] @ factors["b"], 1e-12)
    assert np.max(np.abs(w - (frozen["w"].weight))) > 1e-3


def test_start_delta_once():
    delayed = lora_jax.lorafy({"w": jnp.ones((4, 4))}, "w", method=DeltaLoRA(rank=1, delayed=True))
    plain = lora_jax.lorafy({"w": jnp.ones((4, 4))}, "w", method=LoRA(rank=1, alpha=16, init="kaiming"))
    moved_delta = moved(delayed.delta)
    # Until then it is LoRA.
    plain.delta["w"].arrays.update(moved_delta["w"].arrays)
    np.testing.assert_array_equal(
        lora_jax.merge(delayed.frozen, moved_delta)["w"], lora_jax.merge(*plain)["w"]
    )
    started = start_delta(delayed.frozen, moved_delta)
    close(lora_jax.merge(started, moved_delta), lora_jax.merge(*plain), 1e-6)
    for trees in (
        (started, moved_delta),
        lora_jax.lorafy({"w": jnp.ones((4, 4))}, "w", method=DeltaLoRA(rank=1)),
        plain,
    ):
        with pytest.raises(ValueError, match="holds no Delta-LoRA adapter that waits"):
            start_delta(*trees)


# --- LoRA-FA, VeRA, PiSSA, AdaLoRA --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, keeps_input", [(LoRAFA(rank=2), False), (LoRA(rank=2), True)], ids=["LoRA-FA", "LoRA"]
)
def test_lora_fa_keeps_nothing_of_the_input(method, keeps_input):
    """What waits for the backward pass: x·A, of width rank, and for LoRA x as well."""
    frozen, delta = lora_jax.lorafy({"w": jnp.ones((24, 10))}, "w", method=method)
    forward = lora_jax.adapt(lambda params, x: x @ params["w"])
    _, backward = jax.vjp(
        lambda delta, x: forward(lora_jax.combine(frozen, delta), x), delta, jnp.ones((7, 24))
    )
    kept = [leaf.shape for leaf in jax.tree.leaves(backward)]
    assert (7, 2) in kept and ((7, 24) in kept) == keeps_input
    assert not [shape for shape in kept if shape[:1] == (7,) and shape[1] > (24 if keeps_input else 2)]


def test_vera_shares_one_pair_of_projections():
    here = case("VeRA")
    nodes = {
        node.spec.path: node
        for node in jax.tree.leaves(here.frozen, is_leaf=is_node)
        if isinstance(node, Fixed)
    }
    owners = [path for path, node in nodes.items() if not isinstance(node.arrays["shared_a"], Shared)]
    assert owners == ["heads"]
    owner = nodes["heads"].arrays
    # As large as the largest leaf needs, and counted once.
    assert (owner["shared_a"].shape, owner["shared_b"].shape) == ((20, 5), (5, 24))
    held = sum(leaf.size for leaf in jax.tree.leaves(here.frozen)) - sum(
        leaf.size for leaf in jax.tree.leaves(here.params)
    )
    assert held == 20 * 5 + 5 * 24
    for node in resolved(jax.tree.leaves(here.frozen, is_leaf=is_node)):
        if isinstance(node, Fixed):
            assert all(node.arrays[name] is owner[name] for name in owner)
    # Of the seed alone: neither the key nor the weights.
    params = jax.tree.map(lambda array: 3 * array, here.params)
    of_seed = lambda seed: (
        lora_jax.lorafy(
            params, "|".join(AXES), method=VeRA(rank=5, seed=seed), axes=AXES, key=jax.random.key(9)
        ).frozen
    )
    again, other = (of_seed(seed)["heads"].arrays for seed in (0, 1))
    for name in owner:
        np.testing.assert_array_equal(again[name], owner[name])
        assert not np.any(other[name] == owner[name])
    # Two pools for two methods; one path is enough for a pool of its own.
    mixed = lora_jax.lorafy(
        params, {"heads": VeRA(rank=5, seed=1), "qkv|table": VeRA(rank=5)}, axes=AXES
    ).frozen
    assert [type(mixed[path].arrays["shared_a"]) is Shared for path in ("heads", "qkv", "table")] == [
        False,
        False,
        True,
    ]
    assert (mixed["heads"].arrays["shared_a"].shape, mixed["qkv"].arrays["shared_a"].shape) == (
        (8, 5),
        (18, 5),
    )


def test_vera_without_the_leaf_that_has_the_projections():
    """A borrower alone cannot be merged nor run, and says whom it borrows from."""
    here = case("VeRA")
    frozen, delta = ({"qkv": tree["qkv"]} for tree in (here.frozen, here.delta))
    message = (
        "the adapter of 'qkv' shares shared_a with that of 'heads', which is missing: pass the whole tree"
    )
    with pytest.raises(ValueError, match=message):
        lora_jax.merge(frozen, delta)
    forward = lora_jax.adapt(lambda params, x: x @ params["qkv"])
    with pytest.raises(ValueError, match=message):
        forward(lora_jax.combine(frozen, delta), jnp.ones((2, WIDTH)))
    # With its owner, and nothing else, it can.
    frozen, delta = ({"qkv": tree["qkv"], "heads": tree["heads"]} for tree in (here.frozen, here.delta))
    merged = lora_jax.merge(frozen, delta)
    np.testing.assert_array_equal(merged["qkv"], lora_jax.merge(here.frozen, here.delta)["qkv"])
    close(
        forward(lora_jax.combine(frozen, delta), jnp.ones((2, WIDTH))),
        jnp.ones((2, WIDTH)) @ merged["qkv"],
        1e-6,
    )


@pytest.mark.parametrize("name, tolerance", [("PiSSA", 1e-12), ("PiSSA, iterations", 0.01)])
def test_pissa_starts_with_the_principal_part(name, tolerance):
    """s·A·B is the best approximation of W of that rank, of every layer."""
    here, row = case(name, "float64"), BY_NAME[name]
    scaled = dataclasses.replace(row, equation=lambda w, a, b, start_a, start_b: 1.5 * a @ b)
    with precision("float64"):
        found = literal(scaled, here.frozen, here.start)
    for path, axes in AXES.items():
        kinds = [("layer", "in", "out").index(word) for word in axes.split()]
        for product, matrix in zip(
            *(_matrices(dict(named_leaves(tree))[path], kinds) for tree in (found, here.params)), strict=True
        ):
            u, values, v = np.linalg.svd(matrix)
            best = (u[:, :2] * values[:2]) @ v[:2]
            assert np.linalg.norm(product - best) <= tolerance * np.linalg.norm(best), path


def _matrices(array, kinds):
    """Those of every layer, (in, out)."""
    rows = np.prod([size for size, kind in zip(array.shape, kinds, strict=True) if kind == 1])
    layers = np.prod([size for size, kind in zip(array.shape, kinds, strict=True) if kind == 0], dtype=int)
    return np.asarray(array).transpose(np.argsort(kinds, kind="stable")).reshape(layers, rows, -1)


def test_orthogonality():
    """The mean of Frobenius norms over A and B of every layer of every leaf; zero for orthonormal ones,
    and it has a gradient.
    """
    here = case("AdaLoRA")
    norms = []
    for node in jax.tree.leaves(here.delta, is_leaf=is_node):
        if isinstance(node, Adapter):
            layers = node.spec.axes.count("layer")
            a, b = (np.asarray(node.arrays[name], np.float64) for name in "ab")
            a = a.reshape(*(a.shape[:1] if layers else (1,)), -1, 2)
            b = b.reshape(len(a), 2, -1)
            norms += [
                np.linalg.norm(gram - np.eye(2))
                for one, two in zip(a, b, strict=True)
                for gram in (one.T @ one, two @ two.T)
            ]
    assert len(norms) == 2 * (3 + 3 + 4)
    np.testing.assert_allclose(orthogonality(here.delta), np.mean(norms), rtol=1e-5)
    shapes = {"w": jax.ShapeDtypeStruct((3, 8, 6), "float32")}
    delta = lora_jax.lorafy(shapes, "w", method=AdaLoRA(rank=2), axes="layer in out").delta
    delta["w"].arrays.update(
        a=jnp.tile(jnp.eye(8, 2)[None], (3, 1, 1)),
        b=jnp.tile(jnp.eye(2, 6)[None], (3, 1, 1)),
        e=jnp.ones((3, 2)),
    )
    assert orthogonality(delta) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(jax.grad(orthogonality)(delta))), (
        "at an orthonormal A and B the root has no derivative"
    )
    gradient = jax.grad(orthogonality)(here.delta)
    assert all(
        np.any(node.arrays[name] != 0)
        for node in jax.tree.leaves(gradient, is_leaf=is_node)
        if isinstance(node, Adapter)
        for name in "ab"
    )
    with pytest.raises(ValueError, match="holds no AdaLoRA adapter"):
        orthogonality(case("LoRA").delta)


@pytest.mark.parametrize(
    "word, spec", [("in out", P("fsdp", "tensor")), ("layer in out", P(None, "fsdp", "tensor"))]
)
def test_orthogonality_on_explicit_axes(word, spec):
    """As `jax.make_mesh` makes them, where a sum over split axes has to be told how its result lies."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    _, delta = lora_jax.lorafy(
        {"w": jnp.ones((3, 8, 6)[3 - len(spec) :])},
        "w",
        method=AdaLoRA(rank=2),
        axes=word,
        key=jax.random.key(0),
    )
    delta = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), delta)
    placed = jax.device_put(delta, shardings(mesh, delta_specs(delta, {"w": spec}), delta))
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-5),
        *(jax.jit(jax.value_and_grad(orthogonality))(tree) for tree in (placed, delta)),
    )
