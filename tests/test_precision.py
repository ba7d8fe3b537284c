"""Mixed precision: each of the four dtypes is what the policy says, in arrays, in the traced step and in what
XLA sends between devices.

What a compiled program for the CPU does in bfloat16 it may do in float32; so what is asked of XLA is read
from the traced step, and what devices send each other from the program as it was right after it was divided
among them.
"""

import dataclasses
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh as DeviceMesh, NamedSharding, PartitionSpec as P
from test_experiments_train import examples, MODEL, weights

import lora_jax
from experiments import config as configs
from experiments.command_line import main
from experiments.config import (
    Architecture,
    Base,
    Budget,
    Config,
    Mesh,
    methods,
    Optimizer,
    Precision,
    Source,
    TextData,
    Train,
)
from experiments.plan import flops
from experiments.running import base as bases, finish
from experiments.running.run import run
from experiments.training import loss as losses, order, precision, sharded, spread, trainer as train
from experiments.training.step import step_of
from lora_jax.interop import hf


NARROW, WIDE = jnp.dtype("bfloat16"), jnp.dtype("float32")
ALL = Precision(parameters="bfloat16", compute="bfloat16", adapters="float32")
LORA = {"name": "LoRA", "rank": 2, "alpha": 4, "blocks": [True, False, True]}
RULES = {"AdaLoRA": {"adalora": Budget(target_rank=1, final_steps=1)}, "LoRAFA": {"lorafa": True}}


@pytest.fixture(autouse=True, scope="module")
def _optax_promotes():
    """Optax raises floats to integer powers of its counters, which strict promotion refuses. Ranks stay
    strict.
    """
    with jax.numpy_dtype_promotion("standard"):
        yield


def config(policy, method=LORA, targets=("attn/c_attn/kernel",), mesh=Mesh(), **settings):
    section = Train(**{"steps": 40, "batch": 8, "lr": 1e-2, **settings})
    base = Base(architecture=Architecture(8, 1, 2, 16), tokenizer="none")
    rule = Optimizer(**RULES.get(method["name"], {}))
    return Config(
        "tiny",
        Source(None),
        base,
        TextData("text", "none", "none", 12),
        method,
        targets,
        section,
        rule,
        mesh,
        policy,
    )


def of(name):
    """A method's section, and targets for it."""
    return {"name": name} if name == "Full" else {"name": name, "rank": 2}, (
        "mlp/.*",
    ) if name == "Full" else ("attn/c_attn/kernel", "mlp/c_fc/kernel")


def started(settings):
    """A trainer and its first state, as `run` makes them, from the base of `weights`."""
    policy, mesh = settings.precision, sharded.make_mesh(settings.mesh)
    model = precision.computing(MODEL.clone(param_dtype=policy.parameters or "float32"), policy)
    params = jax.tree.map(lambda leaf: leaf.astype(policy.parameters or leaf.dtype), weights())
    params, specs = sharded.on_mesh(mesh, params, model.partition_rules)
    frozen, delta = lora_jax.lorafy(
        params, list(settings.targets), method=precision.method(settings), key=jax.random.key(1)
    )
    trainer = train.Trainer.create(settings, mesh, model.apply, frozen, delta, specs)
    return trainer, trainer.start(delta, specs, jax.random.key(2))


def arguments(trainer, state, number=0):
    settings = trainer.config.train
    batch = trainer.device_batch(
        examples(), order.indices(0, number, len(examples()), settings.batch), settings.accumulate
    )
    return state.delta, state.opt_state, trainer.frozen, batch, jax.random.fold_in(state.key, number)


def steps(settings, count):
    trainer, state = started(settings)
    step, found = trainer.compiled_step(state), []
    for number in range(count):
        delta, opt_state, numbers = step(*arguments(trainer, state, number))
        state = state._replace(delta=delta, opt_state=opt_state, step=number + 1)
        found.append(float(numbers["loss"]))
    return found, state


def dtypes(tree):
    return {leaf.dtype for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)}


def equations(jaxpr):
    """Those of a jaxpr and of all jaxprs in it."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for inner in flops._inner(eqn.params.values()):
            yield from equations(inner)


def traced(settings):
    trainer, state = started(settings)
    step = trainer.compiled_step(state)
    return list(equations(jax.make_jaxpr(step)(*arguments(trainer, state)))), trainer, state


# --- the config ---------------------------------------------------------------------------------------------


def tree(**section):
    return {
        "name": "tiny",
        "source": {"paper": None},
        "base": {
            "architecture": {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16},
            "tokenizer": "tok",
        },
        "data": {"task": "text", "train": "a.txt", "valid": "b.txt", "seq_len": 8},
        "method": LORA,
        "targets": ["attn/c_attn/kernel"],
        "train": {"steps": 4, "batch": 2, "lr": 0.001},
        **section,
    }


def loaded(tmp_path, content, *overrides):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    return configs.load(path, overrides)


def test_a_dtype_by_name(tmp_path):
    assert loaded(tmp_path, tree()).precision == Precision() == Precision(None, None, None, "float32")
    assert loaded(tmp_path, tree(), "precision.compute=bfloat16").precision == Precision(compute="bfloat16")
    for name, near in (("bf16", "bfloat16"), ("float23", "float32")):
        with pytest.raises(
            ValueError,
            match=f'`precision.compute` must be one of "bfloat16", "float32", got "{name}"; did you mean `{near}`',  # noqa: E501
        ):
            loaded(tmp_path, tree(), f"precision.compute={name}")
    with pytest.raises(
        ValueError, match="unknown key `precision.params`; did you mean `precision.parameters`"
    ):
        loaded(tmp_path, tree(precision={"params": "bfloat16"}))
    with pytest.raises(
        ValueError,
        match=(
            "`precision.adapters` is float32 and `method.dtype` is bfloat16, of the same arrays: leave one "
            "of them out"
        ),
    ):
        loaded(tmp_path, tree(method={**LORA, "dtype": "bfloat16"}, precision={"adapters": "float32"}))


def test_the_default_leaves_the_step_as_it_was():
    """Equation for equation that of a step which knows nothing of dtypes."""
    trainer, state = started(config(Precision(), accumulate=2))

    def plain_loss(delta, frozen, piece, key):
        forward = lora_jax.adapt(spread.spread(MODEL.apply, trainer.mesh))
        logits = forward({"params": lora_jax.combine(frozen, delta, key=key)}, piece["input_ids"])
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        taken = jnp.take_along_axis(logits, piece["labels"][..., None], axis=-1)[..., 0]
        mask = piece["mask"].astype(jnp.float32)
        return jnp.sum((normalizer - taken) * mask), jnp.sum(mask)

    plain = jax.make_jaxpr(step_of(plain_loss, trainer.step.tx, 2))(*arguments(trainer, state))
    ours = jax.make_jaxpr(step_of(trainer.loss, trainer.step.tx, 2, None, trainer.config.precision.reduce))(
        *arguments(trainer, state)
    )
    assert str(plain) == str(ours)
    assert "bf16" not in str(ours) and "custom_vjp" not in str(ours)


# --- parameters ---------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path):
    """A base in float32 on the disk, with a tokenizer."""
    import tokenizers
    import transformers

    words = {word: number for number, word in enumerate(["<end>", "a", "b", "c"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<end>"))
    hf.save(tmp_path / "base", MODEL, weights())
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>").save_pretrained(
        tmp_path / "base"
    )
    return tmp_path


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_the_base_is_stored_rounded_and_split(directory, drawn, shape):
    section = Base(architecture=Architecture(8, 1, 2, 16), tokenizer="base") if drawn else Base(path="base")
    mesh = sharded.make_mesh(Mesh(*shape))
    load = lambda policy: bases.load(
        section, directory, directory, None, None, jax.random.key(0), mesh, policy
    )
    wide, narrow = load(Precision()), load(Precision(parameters="bfloat16"))
    assert dtypes(wide.params) == {WIDE} and dtypes(narrow.params) == {NARROW}
    assert (wide.model.param_dtype, narrow.model.param_dtype, narrow.model.dtype) == (WIDE, NARROW, None)

    def same(old, new):
        np.testing.assert_array_equal(np.asarray(old.astype(NARROW)), np.asarray(new))
        assert old.sharding == new.sharding

    jax.tree.map(same, wide.params, narrow.params)
    split = narrow.params["h"]["0"]["mlp"]["c_fc"]["kernel"]
    assert split.size // split.addressable_shards[0].data.size == shape[1] * shape[2]


def test_what_is_read_is_cast_before_it_goes_to_a_device(directory, monkeypatch):
    """Each device is given its own part, and in bfloat16: never more bytes than it keeps."""
    given, make = [], jax.make_array_from_callback

    def watched(shape, sharding, read):
        def part(index):
            given.append((read(index), sharding.shard_shape(shape)))
            return given[-1][0]

        return make(shape, sharding, part)

    monkeypatch.setattr(jax, "make_array_from_callback", watched)
    hf.load(directory / "base", mesh=sharded.make_mesh(Mesh(1, 4, 2)), param_dtype=jnp.bfloat16)
    assert len(given) >= 16 and all(array.dtype == NARROW and array.shape == shape for array, shape in given)


def test_without_a_mesh_too(directory):
    for scan in (False, True):
        model, params = hf.load(directory / "base", param_dtype=jnp.bfloat16, scan=scan)
        assert dtypes(params) == {NARROW} and model.param_dtype == NARROW
        assert dtypes(model.init_cache(1, 4).layers) == {NARROW}


# --- compute ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy", [ALL, Precision(compute="bfloat16"), Precision(parameters="bfloat16")], ids=str
)
def test_products_are_of_the_compute_dtype(policy):
    """Forwards and backwards: none has two wide operands, which would be a product in float32."""
    found, _, _ = traced(config(policy))
    products = [
        {atom.aval.dtype for atom in eqn.invars} for eqn in found if eqn.primitive.name == "dot_general"
    ]
    assert len(products) > 20 and all(NARROW in operands for operands in products)


def test_wide_products_beside_a_narrow_base():
    found, _, _ = traced(config(Precision(parameters="bfloat16", compute="float32")))
    products = [
        {atom.aval.dtype for atom in eqn.invars} for eqn in found if eqn.primitive.name == "dot_general"
    ]
    assert products and all(operands == {WIDE} for operands in products)


def test_master_weights_do_not_widen_the_products():
    """Nor do biases that train in float32 beside a base in bfloat16."""
    for targets in (("mlp/.*",), ("bias",)):
        found, trainer, state = traced(
            config(Precision(parameters="bfloat16", adapters="float32"), {"name": "Full"}, targets)
        )
        products = [
            {atom.aval.dtype for atom in eqn.invars} for eqn in found if eqn.primitive.name == "dot_general"
        ]
        assert all(NARROW in operands for operands in products)
        assert dtypes(state.delta) == {WIDE} and dtypes(trainer.frozen) == {NARROW}


# --- adapters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, dtype", [*((name, "bfloat16") for name in methods()), ("LoRA", "float32"), ("Full", "float32")]
)
def test_what_trains_and_its_moments(name, dtype):
    """And the start is the base, exactly, whatever the factors are rounded to."""
    method, targets = of(name)
    settings = config(dataclasses.replace(ALL, adapters=dtype), method, targets)
    trainer, state = started(settings)
    trained = dict(jax.tree_util.tree_flatten_with_path(state.delta)[0])
    always_wide = {path for path in trained if name == "DoRA" and "m" in jax.tree_util.keystr(path[-1:])}
    assert {leaf.dtype for path, leaf in trained.items() if path not in always_wide} == {jnp.dtype(dtype)}
    found, after = steps(settings, 3)
    assert jax.tree.map(lambda leaf: leaf.dtype, after.delta) == jax.tree.map(
        lambda leaf: leaf.dtype, state.delta
    )
    mu, nu = (
        next(
            getattr(part, name)
            for part in jax.tree.leaves(after.opt_state, is_leaf=_has_moments)
            if _has_moments(part)
        )
        for name in ("mu", "nu")
    )
    for moments in (mu, nu):
        assert jax.tree.map(lambda leaf: leaf.dtype, moments) == jax.tree.map(
            lambda leaf: leaf.dtype, after.delta
        )
    assert np.all(np.isfinite(found)) and found[2] != found[0]
    batch = jax.tree.map(lambda array: array[0], arguments(trainer, state)[3])
    logits = jax.jit(MODEL.clone(dtype=NARROW).apply)(
        {"params": jax.tree.map(lambda leaf: leaf.astype(NARROW), weights())}, batch["input_ids"]
    )
    expected = losses.masked_sum(logits, batch["labels"], batch["mask"])[0]
    np.testing.assert_allclose(
        jax.jit(trainer.loss)(state.delta, trainer.frozen, batch)[0], expected, rtol=1e-6
    )


def _has_moments(node):
    return isinstance(node, optax.ScaleByAdamState)


# --- reduce -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["bfloat16", "float32"])
def test_the_sum_over_parts_and_the_loss(reduce):
    """In the loop over parts every gradient is carried in `reduce`; whatever has the vocabulary's size
    and is an exponential is taken in it.
    """
    found, _, state = traced(config(dataclasses.replace(ALL, reduce=reduce), accumulate=4))
    loops = [eqn for eqn in found if eqn.primitive.name in ("while", "scan") and len(eqn.outvars) > 4]
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(state.delta))
    (loop,) = [
        eqn for eqn in loops if all(shape in [out.aval.shape for out in eqn.outvars] for shape in shapes)
    ]
    assert {out.aval.dtype for out in loop.outvars if out.aval.shape in shapes} == {jnp.dtype(reduce)}
    exponentials = {
        eqn.outvars[0].aval.dtype
        for eqn in found
        if eqn.primitive.name == "exp" and eqn.outvars[0].aval.shape[-1:] == (32,)
    }
    assert exponentials == {jnp.dtype(reduce)}


def test_many_parts_are_added_without_loss():
    """1,024 parts in bfloat16: their float32 sum is that of all, a bfloat16 sum of ones stays at 256."""
    parts = 1024
    random = np.random.default_rng(0)
    values = jnp.asarray(random.uniform(0.5, 1.5, (parts, 16)), NARROW)

    def loss(delta, frozen, piece, key):
        return jnp.sum((delta["w"].astype(NARROW) * piece["x"]).astype(jnp.float32)), jnp.float32(1)

    def gradient(reduce):
        step = step_of(loss, optax.sgd(1.0), parts, None, reduce)
        delta = {"w": jnp.zeros(16)}
        return -np.asarray(
            jax.jit(step)(delta, optax.sgd(1.0).init(delta), None, {"x": values}, jax.random.key(0))[0]["w"],
            np.float64,
        )

    exact = np.asarray(values, np.float64).mean(0)
    error = lambda found: np.abs(found - exact).max() / np.abs(exact).max()
    assert error(gradient("float32")) < 1e-5
    assert error(gradient("bfloat16")) > 0.5


def test_a_number_of_tokens_is_never_rounded():
    mask = jnp.ones((1, 257), bool)
    total, count = losses.masked_sum(
        jnp.zeros((1, 257, 4), NARROW), jnp.zeros((1, 257), jnp.int32), mask, 0.0, NARROW
    )
    assert (total.dtype, count.dtype, float(count)) == (NARROW, WIDE, 257.0)


def sent(settings, tmp_path):
    """(dtype, shape) of what devices add up of each other, in the step right after it was divided among
    them.
    """
    trainer, state = started(settings)
    lowered = trainer.compiled_step(state).lower(*arguments(trainer, state))
    lowered.compile(
        compiler_options={
            "xla_dump_to": str(tmp_path),
            "xla_dump_hlo_pass_re": "spmd.*",
            "xla_backend_optimization_level": 0,
        }
    )
    (text,) = (path.read_text() for path in tmp_path.glob("*after_spmd-partitioning*"))
    sums = re.findall(r"= (\w+)\[([\d,]*)\]\S* (?:all-reduce|reduce-scatter)\(", text)
    return [
        (dtype, shape)
        for dtype, text in sums
        if len(shape := tuple(map(int, filter(None, text.split(","))))) > 1
    ]


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_devices_add_gradients_in_reduce(shape, tmp_path):
    """Those of A and B; in bfloat16 where the policy says so, which is also what JAX does by itself."""
    method = {**LORA, "blocks": None}
    for reduce, expected in (("float32", "f32"), ("bfloat16", "bf16")):
        directory = tmp_path / reduce
        found = sent(config(dataclasses.replace(ALL, reduce=reduce), method, mesh=Mesh(*shape)), directory)
        # A is (8, 2) and B (2, 24); a product that is itself a sum over devices has the batch among its axes.
        gradients = [dtype for dtype, size in found if 2 in size and len(size) == 2]
        assert len(gradients) >= 2 and set(gradients) == {expected}, found


def linear(reduce):
    """The loss of a layer in bfloat16, and what goes into it: whole numbers, so small that no product of
    them is rounded, only their sums are.
    """
    random = np.random.default_rng(0)
    draw = lambda most, *shape: jnp.asarray(random.integers(-most, most + 1, shape), jnp.float32)
    frozen, delta = lora_jax.lorafy(
        {"w": draw(1, 16, 8).astype(NARROW)}, "w", method=lora_jax.LoRA(rank=4, alpha=4)
    )
    delta = jax.tree.map(lambda leaf: draw(1, *leaf.shape), delta)
    forward = lora_jax.adapt(lambda params, x: x @ params["w"], reduce=reduce)

    def loss(delta, x, cotangent):
        with jax.numpy_dtype_promotion("strict"):
            return jnp.sum(
                forward(lora_jax.combine(frozen, delta), x).astype(jnp.float32)
                * cotangent.astype(jnp.float32)
            )

    return loss, delta, draw(3, 4096, 16).astype(NARROW), draw(3, 4096, 8).astype(NARROW)


def errors(found, delta, x, cotangent):
    """The largest difference to the gradients of A and B in float64."""
    a, b, x, cotangent = (
        np.asarray(array, np.float64)
        for array in (delta["w"].arrays["a"], delta["w"].arrays["b"], x, cotangent)
    )
    wanted = {"a": x.T @ (cotangent @ b.T), "b": (x @ a).T @ cotangent}
    return [np.abs(np.asarray(found["w"].arrays[name], np.float64) - wanted[name]).max() for name in "ab"]


def test_a_gradient_is_as_exact_as_its_operands():
    """Made by a product of two narrow operands with a wide result. XLA for the CPU may round less than it
    is asked to; so both are looked at.
    """
    for reduce, expected in ((jnp.float32, WIDE), (None, NARROW)):
        loss, *operands = linear(reduce)
        products = [
            eqn
            for eqn in equations(jax.make_jaxpr(jax.grad(loss))(*operands))
            if eqn.primitive.name == "dot_general"
        ]
        made = [eqn for eqn in products if sorted(eqn.outvars[0].aval.shape) in ([4, 16], [4, 8])]
        assert [eqn.outvars[0].aval.dtype for eqn in made] == [expected, expected]
        assert {atom.aval.dtype for eqn in made for atom in eqn.invars} == {NARROW}
    assert errors(jax.jit(jax.grad(linear(jnp.float32)[0]))(*operands), *operands) == [0, 0]


def _checkpointed(loss):
    return jax.checkpoint(loss)


def _vmapped(loss):
    return lambda delta, x, cotangent: jnp.sum(
        jax.vmap(loss, (None, 0, 0))(delta, x.reshape(8, -1, 16), cotangent.reshape(8, -1, 8))
    )


def _scanned(loss):
    def scanned(delta, x, cotangent):
        body = lambda total, rows: (total + loss(delta, *rows), None)
        return jax.lax.scan(body, jnp.float32(0), (x.reshape(8, -1, 16), cotangent.reshape(8, -1, 8)))[0]

    return scanned


def _on_devices(explicit):
    def wrap(loss):
        kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
        rows = NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(kind,)), P("data"))
        return lambda delta, x, cotangent: loss(
            delta, jax.device_put(x, rows), jax.device_put(cotangent, rows)
        )

    return wrap


def _in_shard_map(loss):
    mesh = DeviceMesh(np.array(jax.devices()), ("data",))
    own = lambda *operands: jax.lax.psum(loss(*operands), "data")
    return jax.shard_map(own, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P())


WRAPPERS = {
    "checkpoint": _checkpointed,
    "vmap": _vmapped,
    "scan": _scanned,
    "auto mesh": _on_devices(False),
    "explicit mesh": _on_devices(True),
    "shard_map": _in_shard_map,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_reduce_goes_through_transformations(name):
    loss, *operands = linear(jnp.float32)
    found = jax.jit(jax.grad(WRAPPERS[name](loss)))(*operands)
    assert dtypes(found) == {WIDE} and errors(jax.device_get(found), *operands) == [0, 0]


def test_reduce_costs_nothing():
    """The same FLOPs, whatever is differentiated, the same forward pass to the bit, and no more temporary
    bytes.
    """
    costs = []
    for reduce in (None, jnp.float32):
        loss, *operands = linear(reduce)
        compiled = jax.jit(jax.grad(loss)).lower(*operands).compile()
        work = [flops.of(jax.grad(loss, which), *operands) for which in (0, 1, (0, 1))]
        costs.append((work, float(jax.jit(loss)(*operands)), compiled.memory_analysis().temp_size_in_bytes))
    (plain, value, temporaries), (work, other, more) = costs
    assert (plain, value) == (work, other) and more <= temporaries


def test_lookups_have_the_gradient_they_had():
    """`reduce` only rounds less."""
    grads = []
    for reduce in ("bfloat16", "float32"):
        trainer, state = started(
            config(
                dataclasses.replace(ALL, reduce=reduce),
                {**LORA, "blocks": None},
                ("wte/embedding", "attn/c_attn/kernel"),
            )
        )
        delta = jax.tree.map(lambda leaf: leaf + 0.1, state.delta)
        batch = jax.tree.map(lambda array: array[0], arguments(trainer, state)[3])
        grads.append(
            jax.jit(
                jax.grad(lambda delta: trainer.loss(delta, trainer.frozen, batch)[0].astype(jnp.float32))
            )(delta)
        )
    norm = lambda tree: float(optax.tree.norm(tree))
    assert 0 < norm(jax.tree.map(jnp.subtract, *grads)) < 0.03 * norm(grads[1])


def test_reduce_is_checked_and_forward_mode_is_named():
    with pytest.raises(
        ValueError,
        match="`reduce` is 'int32'; gradients are summed in a floating-point dtype: pass `jnp.float32`",
    ):
        lora_jax.adapt(lambda params: params, reduce=jnp.int32)
    for reduce in (None, jnp.float32):
        loss, delta, x, cotangent = linear(reduce)
        forwards = lambda: jax.jvp(lambda delta: loss(delta, x, cotangent), (delta,), (delta,))
        if reduce is None:
            forwards()
        else:
            with pytest.raises(TypeError, match="forward-mode"):
                forwards()


# --- whole runs ---------------------------------------------------------------------------------------------


def test_bfloat16_learns_what_float32_learns():
    task = {
        "method": {"name": "LoRA", "rank": 4},
        "targets": (".*kernel", "wte/embedding"),
        "batch": 24,
        "lr": 0.005,
    }
    wide, narrow = (steps(config(policy, **task), 40)[0] for policy in (Precision(), ALL))
    assert wide[-1] < 0.93 * wide[0]
    assert abs(narrow[-1] - wide[-1]) < 0.03 * (wide[0] - wide[-1])


def test_merging_is_wide_and_rounds_once(tmp_path):
    """And master weights are rounded when they are exported, so that every tensor has the base's dtype."""
    settings = config(ALL)
    trainer, state = started(settings)
    delta = jax.tree.map(lambda leaf: leaf + 0.03, state.delta)
    merged = lora_jax.merge(trainer.frozen, delta)
    widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trainer.frozen)
    jax.tree.map(
        lambda one, two: np.testing.assert_array_equal(one, two.astype(NARROW)),
        merged,
        lora_jax.merge(widened, delta),
    )
    assert dtypes(merged) == {NARROW}
    trainer, state = started(config(ALL, {"name": "Full"}, ("mlp/.*",)))
    params = jax.tree.map(lambda leaf: leaf.astype(NARROW), weights())
    assert dtypes(lora_jax.merge(trainer.frozen, state.delta)) == {NARROW, WIDE}
    returned = finish.export(
        trainer, state.delta, bases.Loaded(MODEL, params, None, tmp_path, "a test"), tmp_path / "merged"
    )
    assert dtypes(returned) == dtypes(hf.load(tmp_path / "merged")[1]) == {NARROW}


RUN = {
    "name": "narrow",
    "source": {"paper": None, "note": "a test"},
    "generate": {"seed": 0, "meanings": 12, "held_out": 4, "references": 2},
    "base": {"architecture": {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 160}, "vocabulary": 400},
    "data": {"task": "text", "train": "train.txt", "valid": "valid.txt", "seq_len": 32},
    "method": {"name": "LoRA", "rank": 2, "dropout": 0.1},
    "targets": ["attn/c_attn/kernel"],
    "train": {
        "steps": 6,
        "batch": 8,
        "lr": 0.01,
        "accumulate": 2,
        "log_every": 1,
        "eval_batches": 1,
        "checkpoint_every": 3,
    },
    "mesh": {"data": 2},
}


def test_a_run_in_bfloat16_resumes_and_exports(tmp_path):
    """Bit for bit, from the command line; the export is bfloat16, and computes what was trained."""
    path = tmp_path / "narrow.json"
    path.write_text(json.dumps(RUN))
    policy = ["precision.parameters=bfloat16", "precision.compute=bfloat16", "precision.adapters=bfloat16"]
    settings = itertools.chain.from_iterable(("--set", item) for item in policy)
    assert main(["run", "--config", str(path), "--workdir", str(tmp_path / "whole"), *settings]) == 0
    narrow = configs.load(path, policy)
    run(narrow, path, tmp_path, tmp_path / "parts", stop_after=3)
    assert not (tmp_path / "parts" / "merged").exists()
    run(narrow, path, tmp_path, tmp_path / "parts")
    whole, parts = (
        (tmp_path / name / "merged" / "model.safetensors").read_bytes() for name in ("whole", "parts")
    )
    assert whole == parts
    model, params = hf.load(tmp_path / "whole" / "merged")
    assert dtypes(params) == {NARROW}
    assert json.loads((tmp_path / "whole" / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    facts = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert (
        facts["bytes"]["base"] == 2 * facts["base"]["parameters"]
        and facts["bytes"]["delta"] == 2 * facts["trainable"]
    )
    assert facts["comparison"]["max_difference"] < 0.05 * facts["comparison"]["max_logit"]
