"""`plan`: its bytes against arrays that are really there, its FLOPs against XLA's count, its collectives
against known programs.
"""

import json
import math
import re

import jax
import jax.numpy as jnp
import llama_models
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec as P
from plans import directories as directories, plans_promote as plans_promote, SMALL, small

import lora_jax
from experiments.config import Architecture, Base, Config, Mesh, method_value, Source, TextData, Train
from experiments.plan import figures, flops, models, size, step
from experiments.plan.collectives import Collectives
from experiments.plan.figures import QUICK
from experiments.plan.step import training_step, Workload
from experiments.tasks.examples import Blocks
from experiments.training import sharded, trainer as train
from lora_jax import Full, LoRA
from lora_jax.models import GPT2Config


def held(tree):
    """Bytes of arrays on each device."""
    found = dict.fromkeys(jax.devices()[:8], 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            found[shard.device] += shard.data.nbytes
    return set(found.values())


@pytest.mark.parametrize(
    "section, name, quantize",
    [
        (Mesh(2, 2, 2), "DoRA", None),
        (Mesh(2, 2, 2), "Full", None),
        (Mesh(2, 2, 2), "LoRA", None),
        (Mesh(1, 8, 1), "LoRA", None),
        (Mesh(1, 8, 1), "LoRA", "nf4"),
    ],
    ids=str,
)
def test_bytes_are_those_of_a_run(section, name, quantize, directories):
    """The trainer's own arrays, on every device, in the layout that a plan has."""
    subject = small(directories / "gpt2")
    method = {"name": name} if name == "Full" else {"name": name, "rank": 2}
    targets = (".*",) if name == "Full" else ("attn/c_attn/kernel",)
    settings = Train(steps=2, batch=8, lr=1e-3)
    base, data = Base(architecture=Architecture(64, 2, 8, 24), tokenizer="none"), TextData("text", "", "", 16)
    config = Config(
        "plan", Source(None), base, data, method, targets, settings, mesh=section, quantize=quantize
    )
    mesh = sharded.make_mesh(section)
    fresh = jax.jit(subject.model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    params, specs = sharded.on_mesh(mesh, fresh, subject.model.partition_rules)
    axes = None if name == "Full" else "layer in out"
    frozen, delta = lora_jax.lorafy(params, list(targets), method=method_value(method), axes=axes)
    trainer = train.Trainer.create(config, mesh, subject.model.apply, frozen, delta, specs)
    state = trainer.start(delta, specs, jax.random.key(1))

    planned = training_step(
        subject, sharded.make_mesh(section), Workload(8, 16, method_value(method), targets, quantize=quantize)
    )
    assert held(trainer.frozen) == {size.per_device(planned.frozen)}
    assert held(state.delta) == {size.per_device(planned.delta)}
    assert held(state.opt_state) == {size.per_device(planned.opt_state)}
    batch = trainer.device_batch(Blocks(np.ones(8 * 16 + 1), 16), np.arange(8))
    assert held(batch) == {size.per_device(planned.batch)}


SETTINGS = {
    "LoRA": {"method": LoRA(rank=2)},
    "accumulated": {"method": LoRA(rank=2, dropout=0.1), "accumulate": 2, "batch": 16},
    "nf4": {"method": LoRA(rank=2), "quantize": "nf4"},
    "int8": {"method": lora_jax.DoRA(rank=2), "quantize": "int8"},
    "AdaLoRA": {"method": lora_jax.AdaLoRA(rank=2)},
    "VeRA": {"method": lora_jax.VeRA(rank=4), "optimizer": "adamw_authors"},
    "Full": {"method": Full()},
    "counted": {"method": LoRA(rank=2), "counted": 5},
}


@pytest.mark.parametrize(
    "kind, setting",
    [
        *(("gpt2", setting) for setting in SETTINGS),
        ("bert", "LoRA"),
        ("roberta", "nf4"),
        ("deberta-v2", "LoRA"),
        ("qwen2", "counted"),
        ("gemma3_text", "nf4"),
    ],
)
def test_the_step_runs_in_the_bytes_of_its_plan(kind, setting, directories):
    subject = small(directories / kind)
    planned = training_step(
        subject, sharded.make_mesh(Mesh(2, 2, 2)), Workload(**{**SMALL, **SETTINGS[setting]})
    )
    compiled = planned.lower().compile(compiler_options=QUICK)
    stored = (planned.delta, planned.opt_state, planned.frozen, planned.batch)
    memory = compiled.memory_analysis()
    # Apart from the key, which only some methods use, the compiler's arguments are what is stored.
    assert memory.argument_size_in_bytes - size.per_device(stored) in (0, 8)

    filled = jax.tree.map(
        lambda leaf: jax.device_put(jnp.ones(leaf.shape, leaf.dtype), leaf.sharding), stored
    )
    assert held(filled) == {size.per_device(stored)}
    key = jax.device_put(jax.random.key(0), planned.key.sharding)
    delta, opt_state, numbers = compiled(*filled, key)
    assert math.isfinite(numbers["loss"])
    assert held((delta, opt_state)) == {size.per_device((planned.delta, planned.opt_state))}


def test_every_device_attends_for_its_own_examples(directories):
    """Otherwise scores of (batch, heads, time, time) are computed for the whole group of an fsdp axis."""
    planned = training_step(
        small(directories / "gpt2"), sharded.make_mesh(Mesh(1, 8, 1)), Workload(8, 16, LoRA(rank=2))
    )
    text = planned.lower().compile(compiler_options=QUICK).as_text()
    scores = {
        math.prod(map(int, re.findall(r"\d+", leading)))
        for leading in re.findall(r"f32\[([\d,]*,)16,16\]", text)
    }
    assert scores == {8}, "one example of 8 heads"
    sent = Collectives.of(text)
    assert sent.bytes["all-gather"] > 10 * sent.bytes["all-reduce"], (
        "weights are gathered, and no activations summed"
    )


def test_quantised_weights_are_sent_as_codes(directories):
    """The embeddings are sent as they are."""
    bytes_sent = {}
    for quantize in (None, "nf4"):
        planned = training_step(
            small(directories / "gpt2"),
            sharded.make_mesh(Mesh(1, 8, 1)),
            Workload(8, 16, LoRA(rank=2), quantize=quantize),
        )
        bytes_sent[quantize] = Collectives.of(
            planned.lower().compile(compiler_options=QUICK).as_text()
        ).bytes["all-gather"]
    assert bytes_sent["nf4"] < bytes_sent[None] / 2


@pytest.mark.parametrize(
    "section, checkpoint, method",
    [
        (Mesh(), False, LoRA(rank=2)),
        (Mesh(), True, LoRA(rank=2)),
        (Mesh(2, 4, 1), True, LoRA(rank=2)),
        (Mesh(2, 2, 2), False, LoRA(rank=2)),
        (Mesh(2, 2, 2), True, Full()),
    ],
    ids=str,
)
def test_flops_are_what_the_compiler_counts_of_unrolled_layers(section, checkpoint, method, tmp_path):
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=256, n_layer=2, n_head=8)
    (tmp_path / "config.json").write_text(json.dumps({**config.to_hf(), "model_type": "gpt2"}))
    unrolled = training_step(
        small(tmp_path, checkpoint=checkpoint, scan=False),
        sharded.make_mesh(section),
        Workload(8, 64, method),
    )
    counted = flops.of(unrolled.function, *unrolled.arguments)
    # On a CPU XLA would take what `checkpoint` repeats for a common subexpression, and spare it.
    options = {**QUICK, "xla_disable_hlo_passes": "cse"}
    compiled = unrolled.lower().compile(compiler_options=options).cost_analysis()["flops"]
    # XLA counts what is done element by element too, of which Adam on few tokens is a large part, and spares
    # a recomputation or two.
    elements = (
        10 * sum(leaf.size for leaf in jax.tree.leaves(unrolled.delta)) if isinstance(method, Full) else 0
    )
    assert 0.95 < (counted + elements) / unrolled.mesh.size / compiled < 1.04
    scanned = training_step(
        small(tmp_path, checkpoint=checkpoint), sharded.make_mesh(section), Workload(8, 64, method)
    )
    # One layer for all: the first one's input gets a gradient too, though nothing before it trains.
    spared = 0 if isinstance(method, Full) else 2 * 8 * 64 * 256 * 768
    assert flops.of(scanned.function, *scanned.arguments) - spared == pytest.approx(counted, rel=0.001)


def test_flops_of_operations():
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, "float32")
    repeated = lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0]
    assert flops.of(repeated, f32(2, 3), f32(3, 3)) == 7 * 2 * 2 * 3 * 3
    chosen = lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w)
    assert flops.of(chosen, f32(2, 3), f32(3, 3)) == 2 * 2 * 2 * 3 * 3
    convolved = lambda x, w: jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert flops.of(convolved, f32(1, 8, 8, 3), f32(3, 3, 3, 5)) == 2 * 8 * 8 * 5 * 3 * 3 * 3
    assert flops.of(lambda x: jnp.einsum("bij,bjk->bik", x, x), f32(4, 5, 5)) == 2 * 4 * 5**3


TEXT = """HloModule jit_f, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %sum = f32[] add(%x, %y)
}

%inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %two = (f32[8]{0}, bf16[4,2]{1,0}) all-reduce(%a, %b), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
  %part = f32[2]{0} reduce-scatter(%c), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
  ROOT %started = (f32[2]{0}, f32[8]{0}) all-gather-start(%d), replica_groups={{0,1,2,3}}, dimensions={0}
  %done = f32[8]{0} all-gather-done(%started)
}

%condition (p: (s32[], f32[8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %loop = (s32[], f32[8]{0}) while(%t), condition=%condition, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
  %unknown = (s32[], f32[8]{0}) while(%loop), condition=%condition, body=%inner
  ROOT %last = pred[16]{0} collective-permute(%y), source_target_pairs={{0,1}}
}
"""  # noqa: E501


def test_collectives_of_a_text():
    found = Collectives.of(TEXT)
    assert found.count == {"all-reduce": 6, "reduce-scatter": 6, "all-gather": 6, "collective-permute": 1}
    assert found.bytes == {
        "all-reduce": 6 * (32 + 16),
        "reduce-scatter": 6 * 4 * 8,
        "all-gather": 6 * 32,
        "collective-permute": 16,
    }
    assert found.once == 1


def test_collectives_of_a_compiled_program():
    mesh = sharded.make_mesh(Mesh(1, 8, 1))
    weights = jax.ShapeDtypeStruct(
        (5, 64, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp", None))
    )
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, P("fsdp", None)))

    def layer(x, w):
        return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), NamedSharding(mesh, P("fsdp", None))), None

    compiled = jax.jit(lambda x, weights: jax.lax.scan(layer, x, weights)[0]).lower(x, weights).compile()
    found = Collectives.of(compiled.as_text())
    assert (found.count, found.bytes, found.once) == ({"all-gather": 5}, {"all-gather": 5 * 64 * 64 * 4}, 0)


@pytest.mark.parametrize(
    "name, method, parameters, adapters",
    [  # totals as published; adapters by hand: layers * 2 matrices * 2 * width * rank
        ("gpt2", LoRA(rank=4, blocks=(True, False, True)), 124_439_808, 12 * 2 * 2 * 768 * 4),
        ("gpt3-175b", LoRA(rank=4, blocks=(True, False, True)), 174_604_259_328, 18_874_368),
        ("bert-base-uncased", LoRA(rank=8), None, 294_912),
        ("all-MiniLM-L6-v2", LoRA(rank=8), None, 6 * 2 * 2 * 384 * 8),
        ("roberta-base", LoRA(rank=8), None, 294_912),
        ("deberta-v2-xxlarge", LoRA(rank=16), None, 48 * 2 * 2 * 1536 * 16),
        # Here: layers * (width + width of the heads of queries, and the same of values) * rank.
        ("llama-3-8b", LoRA(rank=8), 8_030_261_248, 32 * (4096 + 4096 + 4096 + 1024) * 8),
        ("llama-3.1-70b", LoRA(rank=8), 70_553_706_496, 80 * (8192 + 8192 + 8192 + 1024) * 8),
        ("qwen2.5-7b", LoRA(rank=8), 7_615_616_512, 28 * (3584 + 3584 + 3584 + 512) * 8),
        ("smollm2-135m", LoRA(rank=8), 134_515_008, 30 * (576 + 576 + 576 + 192) * 8),
    ],
)
def test_published_models(name, method, parameters, adapters):
    planned = training_step(
        models.named(name, "bfloat16", checkpoint=True),
        sharded.make_mesh(Mesh(1, 1, 8)),
        Workload(1, 8, method),
    )
    assert parameters in (None, lora_jax.count(planned.params))
    assert figures._of_adapters(planned.delta) == adapters


@pytest.mark.parametrize("kind", llama_models.TINY)
def test_the_llama_family_by_its_directories(kind, directories):
    """Query and value of each layer are adapted, and every weight is split over the mesh."""
    subject = small(directories / kind)
    assert (subject.layers, subject.width, subject.longest, subject.bounded) == (2, 64, 40, False)
    planned = training_step(subject, sharded.make_mesh(Mesh(2, 2, 2)), Workload(**SMALL, method=LoRA(rank=2)))
    assert figures._of_adapters(planned.delta) == 2 * (64 + 64 + 64 + 16) * 2
    for path, leaf in traverse_util.flatten_dict(planned.frozen).items():
        parts = 4 if path[-1] in ("kernel", "embedding") else 1
        assert parts * math.prod(leaf.sharding.shard_shape(leaf.shape)) == leaf.size, path


def test_gpt3_sizes_are_roughly_what_they_are_called():
    for name in models.GPT3:
        said = float(name[5:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
        count = lora_jax.count(step.shapes_of(models.named(name, "bfloat16", checkpoint=True)))
        assert count == pytest.approx(said, rel=0.06), name
