"""Mixed precision: three dtypes are what the policy says, in arrays and in the traced step. The fourth,
`reduce`, has `test_reduce`.

What a compiled program for the CPU does in bfloat16 it may do in float32; so what is asked of XLA is read
from the traced step.
"""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from narrow import ALL, arguments, config, dtypes, LORA, NARROW, of, started, steps, traced, WIDE
from stopping import lost_in
from training import examples, MODEL, optax_promotes as optax_promotes, weights

import lora_jax
from experiments import config as configs
from experiments.command_line import main
from experiments.config import Architecture, Base, Mesh, methods, Precision
from experiments.running import base as bases, finish
from experiments.running.run import run
from experiments.training import loss as losses, order, sharded, spread
from experiments.training.step import step_of
from lora_jax.interop import hf
from lora_jax.models import cross_entropy


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
        params = {"params": lora_jax.combine(frozen, delta, key=key)}
        found = forward(params, piece["input_ids"], labels=piece["labels"], logits_at=piece["columns"])
        mask = piece["mask"].astype(jnp.float32)
        return jnp.sum(found * mask), jnp.sum(mask)

    plain = jax.make_jaxpr(step_of(plain_loss, trainer.step.tx, 2))(*arguments(trainer, state))
    ours = jax.make_jaxpr(step_of(trainer.loss, trainer.step.tx, 2, None, trainer.config.precision.reduce))(
        *arguments(trainer, state)
    )
    assert str(plain) == str(ours)
    assert "bf16" not in str(ours) and "custom_vjp" not in str(ours)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A base in float32 on the disk, with a tokenizer."""
    import tokenizers
    import transformers

    words = {word: number for number, word in enumerate(["<end>", "a", "b", "c"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<end>"))
    made = tmp_path_factory.mktemp("bases")
    hf.save(made / "base", MODEL, weights())
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>").save_pretrained(
        made / "base"
    )
    return made


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_the_base_is_stored_rounded_and_split(directory, drawn, shape):
    section = Base(architecture=Architecture(8, 1, 2, 16), tokenizer="base") if drawn else Base(path="base")
    mesh = sharded.make_mesh(Mesh(*shape))
    places = bases.Places(directory, directory, directory, None, directory)
    load = lambda policy: bases.load(section, places, jax.random.key(0), mesh, policy)
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


@functools.cache
def narrow_logits():
    """The base's, of the batch of the first step."""
    params = jax.tree.map(lambda leaf: leaf.astype(NARROW), weights())
    batch = examples().batch(order.indices(0, 0, 24, 8))
    apply = jax.jit(MODEL.clone(dtype=NARROW).apply)
    return apply({"params": params}, batch["input_ids"], logits_at=batch["columns"])


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
    batch = jax.tree.map(lambda array: array[0], arguments(trainer, state)[3])
    expected = losses.masked_sum(cross_entropy(narrow_logits(), batch["labels"]), batch["mask"])[0]
    np.testing.assert_allclose(
        jax.jit(trainer.loss)(state.delta, trainer.frozen, batch)[0], expected, rtol=1e-6
    )
    found, after = steps(trainer, state, 3)
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


def _has_moments(node):
    return isinstance(node, optax.ScaleByAdamState)


def test_bfloat16_learns_what_float32_learns():
    task = {
        "method": {"name": "LoRA", "rank": 4},
        "targets": (".*kernel", "wte/embedding"),
        "batch": 24,
        "lr": 0.005,
    }
    wide, narrow = (steps(*started(config(policy, **task)), 40)[0] for policy in (Precision(), ALL))
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


@pytest.mark.slow
def test_a_run_in_bfloat16_resumes_and_exports(tmp_path):
    """Bit for bit, from the command line; the export is bfloat16, and computes what was trained."""
    path = tmp_path / "narrow.json"
    path.write_text(json.dumps(RUN))
    policy = ["precision.parameters=bfloat16", "precision.compute=bfloat16", "precision.adapters=bfloat16"]
    settings = itertools.chain.from_iterable(("--set", item) for item in policy)
    assert main(["run", "--config", str(path), "--workdir", str(tmp_path / "whole"), *settings]) == 0
    narrow = configs.load(path, policy)
    with lost_in(5):
        run(narrow, path, tmp_path, tmp_path / "parts")
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
