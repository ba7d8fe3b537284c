"""`plan`: its bytes against arrays that are really there, its FLOPs against XLA's count, its collectives
against known programs, and bad input.
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import encoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import lora_jax
from experiments.command_line import main
from experiments.config import Architecture, Base, Config, Mesh, method_value, Source, TextData, Train
from experiments.plan import accelerators, figures, flops, models, report, size, step
from experiments.plan.collectives import Collectives
from experiments.plan.figures import QUICK
from experiments.plan.step import training_step, Workload
from experiments.tasks.examples import Blocks
from experiments.training import sharded, trainer as train
from lora_jax import Full, LoRA
from lora_jax.models import GPT2Config


REPOSITORY = Path(__file__).resolve().parent.parent
SIZES = {
    "vocab_size": 80,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
}
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=80, n_positions=24, n_embd=64, n_layer=2, n_head=8),
    "roberta": dataclasses.replace(encoders.ROBERTA, **SIZES),
    "deberta-v2": dataclasses.replace(encoders.DEBERTA, **SIZES),
}
SMALL = {"batch": 8, "tokens": 16}


@pytest.fixture(autouse=True, scope="module")
def _optax_promotes():
    """Optax raises floats to integer powers of its counters, and plans are made as users make them."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A directory with nothing but a config.json, for each kind of model."""
    root = tmp_path_factory.mktemp("models")
    for kind, config in CONFIGS.items():
        (root / kind).mkdir()
        (root / kind / "config.json").write_text(json.dumps({**config.to_hf(), "model_type": kind}))
    return root


def small(directory, dtype="float32", checkpoint=True, **changes):
    subject = models.named(str(directory), dtype, checkpoint=checkpoint)
    return dataclasses.replace(subject, model=subject.model.clone(**changes))


# --- bytes --------------------------------------------------------------------------------------------------


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
}


@pytest.mark.parametrize(
    "kind, setting",
    [
        *(("gpt2", setting) for setting in SETTINGS),
        ("roberta", "LoRA"),
        ("roberta", "nf4"),
        ("deberta-v2", "LoRA"),
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


# --- FLOPs --------------------------------------------------------------------------------------------------


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
    compiled = unrolled.lower().compile(compiler_options=QUICK).cost_analysis()["flops"]
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


# --- collectives --------------------------------------------------------------------------------------------

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


# --- models and accelerators --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, method, parameters, adapters",
    [  # totals as published; adapters by hand: layers * 2 matrices * 2 * width * rank
        ("gpt2", LoRA(rank=4, blocks=(True, False, True)), 124_439_808, 12 * 2 * 2 * 768 * 4),
        ("gpt3-175b", LoRA(rank=4, blocks=(True, False, True)), 174_604_259_328, 18_874_368),
        ("roberta-base", LoRA(rank=8), None, 294_912),
        ("deberta-v2-xxlarge", LoRA(rank=16), None, 48 * 2 * 2 * 1536 * 16),
    ],
)
def test_published_models(name, method, parameters, adapters):
    planned = training_step(
        models.named(name, "bfloat16", checkpoint=True), sharded.make_mesh(Mesh()), Workload(1, 8, method)
    )
    assert parameters in (None, lora_jax.count(planned.params))
    assert figures._of_adapters(planned.delta) == adapters


def test_gpt3_sizes_are_roughly_what_they_are_called():
    for name in models.GPT3:
        said = float(name[5:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
        count = lora_jax.count(step.shapes_of(models.named(name, "bfloat16", checkpoint=True)))
        assert count == pytest.approx(said, rel=0.06), name


def test_verdicts():
    gigabyte = 10**9
    assert accelerators.verdict("a100-80g", 30 * gigabyte, 30 * gigabyte)["fits"] == "yes"
    assert accelerators.verdict("a100-80g", 30 * gigabyte, 48 * gigabyte)["fits"] == "close"
    assert accelerators.verdict("a100-80g", 30 * gigabyte, 80 * gigabyte) | {"share": 0} == {
        "accelerator": "a100-80g", "memory": 80 * gigabyte, "share": 0, "fits": "no", "why": "by the estimate of temporaries"  # noqa: E501
    }  # fmt: skip
    assert accelerators.verdict("a100-80g", 81 * gigabyte, 0)["why"] == "what is stored alone is more"


@pytest.mark.parametrize(
    "count, text",
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (349_208_518_656, "349.21 GB"), (1.2e12, "1.20 TB")],
)
def test_amounts(count, text):
    assert report.amount(count) == text


# --- the command line ---------------------------------------------------------------------------------------


def test_command(directories, tmp_path, capsys):
    words = [
        "plan",
        str(directories / "gpt2"),
        "--mesh",
        "data=2,fsdp=4",
        "--rank",
        "2",
        "--batch",
        "8",
        "--seq",
        "16",
        "--dtype",
        "float32",
        "--compare-full",
    ]
    assert main([*words, "--accelerator", "h100", "--json", str(tmp_path / "plan.json")]) == 0
    captured = capsys.readouterr()
    assert "8 virtual devices" in captured.err
    for title in (
        "Bytes a device",
        "FLOPs of a step",
        "Collectives a device",
        "Does it fit?",
        "full fine-tuning",
        "h100, 80.00 GB | yes",
    ):
        assert title in captured.out
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    assert found["step"]["trained"] == {
        "numbers": 1024,
        "of_adapters": 1024,
        "bytes": 4096,
        "with_optimiser_bytes": 3 * 4096 + 8,
    }
    assert found["step"]["bytes"]["kept_activations"] == 2 * 1 * 16 * 64 * 4
    assert found["full"]["bytes"]["opt_state"] > 2 * found["step"]["bytes"]["frozen"] - 100
    assert (
        found["step"]["bytes"]["total"] < found["full"]["bytes"]["total"]
        and found["step"]["flops"]["all_devices"] < found["full"]["flops"]["all_devices"]
    )


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert "example: python -m experiments plan gpt3-175b" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["gpt4"],
            "`MODEL` is 'gpt4', neither a published size nor a directory with a config.json; did you mean "
            "`gpt2`",
        ),
        (
            ["gpt2", "--mesh", "data=8,expert=2"],
            "`--mesh` is 'data=8,expert=2': 'expert=2' is not one of data=N, fsdp=N and tensor=N",
        ),
        (
            ["gpt2", "--mesh", "data=2,data=2"],
            "'data=2' is not one of data=N, fsdp=N and tensor=N, each at most once",
        ),
        (["gpt2", "--mesh", "data=0"], "`mesh.data` must be at least 1, got 0"),
        (["gpt2", "--mesh", "data=64"], "`--mesh` has 64 devices, and JAX, which was running before, sees 8"),
        (["gpt2", "--mesh", "data=65536"], "`--mesh` has 65536 devices, and at most 4096 can be planned"),
        (
            ["gpt2", "--mesh", "data=3"],
            "`--batch` is 64, and must be a multiple of data * fsdp * accumulate (3)",
        ),
        (["gpt2", "--batch", "0"], "`--batch` must be at least 1, got 0"),
        (["gpt2", "--seq", "2048"], "`--seq` is 2048, and gpt2 has positions for 1024"),
        (["gpt2", "--method", "Lora"], "`--method` is 'Lora', and must be one of AdaLoRA, DeltaLoRA"),
        (["gpt2", "--method", "DoRA", "--blocks", "1,0,1"], "`--blocks` is not an option of DoRA"),
        (["gpt2", "--rank", "10000"], "`rank` is 10000, above min(in, out) = 768"),
        (["gpt2", "--targets", "c_atn/kernel"], "`targets` pattern 'c_atn/kernel' matches no leaf"),
        (["gpt2", "--accelerator", "h1oo"], "`--accelerator` is 'h1oo', and must be one of v100-32g"),
        (["gpt2", "--mesh", "tensor=7"], "the mesh {'data': 1, 'fsdp': 1, 'tensor': 7} does not divide"),
        (
            ["gpt2", "--json", "/no/such/place/plan.json"],
            "`--json` is `/no/such/place/plan.json`, and there is no directory",
        ),
    ],
)
def test_bad_input_is_one_line(words, message, capsys):
    assert main(["plan", *words]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert message in captured.err


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not valid JSON"),
        ('{"model_type": "llama"}', "is 'llama', and must be one of gpt2, roberta, deberta-v2"),
        ("[]", "is None"),
    ],
)
def test_a_config_that_is_none(content, message, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        models.named(str(tmp_path), "float32", checkpoint=True)


def test_virtual_devices_come_before_jax():
    """Whatever the environment says of devices, and nothing else in XLA_FLAGS is lost."""
    code = (
        "import os; from experiments.plan import devices; devices.start(12); import jax; "
        "print(jax.device_count(), os.environ['XLA_FLAGS'])"
    )
    flags = "--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == [
        "12",
        "--xla_cpu_multi_thread_eigen=false",
        "--xla_force_host_platform_device_count=12",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, parts, most", [("fsdp=64", 64, 35e9), ("fsdp=64,tensor=8", 512, 18e9), ("data=8,fsdp=8", 8, 72e9)]
)
def test_gpt3_in_less_than_a_minute(mesh, parts, most, tmp_path):
    started = time.perf_counter()
    words = [
        "plan",
        "gpt3-175b",
        "--mesh",
        mesh,
        "--rank",
        "4",
        "--accelerator",
        "a100-80g",
        "--json",
        str(tmp_path / "plan.json"),
    ]
    run = subprocess.run(
        [sys.executable, "-m", "experiments", *words],
        cwd=REPOSITORY,
        env=os.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.perf_counter() - started < 60
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["step"]["bytes"]["frozen"] == pytest.approx(349_208_518_656 / parts, rel=0.05)
    # jax 0.10 keeps 32-bit copies of a whole device's bfloat16 weights, 87 GB of them on the last mesh.
    assert found["step"]["bytes"]["temporaries"] == min(
        found["step"]["bytes"]["temporaries_compiled_in"].values()
    )
    assert found["step"]["bytes"]["total"] < most and found["step"]["fits"][0]["fits"] == "yes"
    stated = found["claims"]
    assert (
        stated["full"]["all"] - stated["full"]["gradients"] < stated["paper"]["full"] < stated["full"]["all"]
    )
    assert stated["lora"]["all"] == pytest.approx(stated["paper"]["lora"], rel=0.01)
    assert stated["checkpoint"]["full"] == pytest.approx(stated["paper"]["full_checkpoint"], rel=0.01)
    assert (
        stated["checkpoint"]["lora_16_bits"]
        == 2 * 18_874_368
        == pytest.approx(stated["paper"]["lora_checkpoint"], rel=0.1)
    )
    assert (
        stated["merged_is_the_base"]
        and stated["forward_flops"]["merged"]
        == stated["forward_flops"]["base"]
        < stated["forward_flops"]["adapted"]
    )
    assert "GPT-3 175B in LoRA's paper, and here" in run.stdout and len(run.stderr.splitlines()) == 1
