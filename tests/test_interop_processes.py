"""Files of models and adapters whose arrays span several processes: the same bytes as from one process,
and an error in one is one in all.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest

import lora_jax
from lora_jax import LoRA
from lora_jax.interop import hf, loralib, peft
from lora_jax.interop._safetensors import Pending, stored_tensors, write_tensors
from lora_jax.models import GPT2Config
from lora_jax.models.gpt2 import GPT2


pytestmark = pytest.mark.slow

CONFIG = GPT2Config(
    vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=None
)
TARGETS = {
    "attn/c_attn/kernel": LoRA(rank=2, alpha=4),
    "mlp/c_fc/kernel": LoRA(rank=2, alpha=4),
    "ln_f/.*": lora_jax.Full(),
}
SHARD_BYTES = 8_000
# How an error that another process has met ends.
NAMED = r" \(process \d\)(?=\.?$)"


def eighths(tree, seed):
    """Few digits, so that whichever device adds whichever products, no sum is rounded."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(draw.integers(-8, 9, leaf.shape) / 8, leaf.dtype), tree)


def bytes_of(path):
    return (
        {file.name: file.read_bytes() for file in sorted(path.iterdir())}
        if path.is_dir()
        else path.read_bytes()
    )


def messages(out):
    """The errors that each process has met, by what it tried."""
    return [json.loads(file.read_text()) for file in sorted(out.glob("messages*"))]


def rewritten(base, dir, change):
    """Another tool's directory with the same tensors after `change(name, array)`, one file or two,
    without checksums.
    """
    dir.mkdir()
    (dir / "config.json").write_bytes((base / "config.json").read_bytes())
    arrays = {name: change(name, np.array(stored.read())) for name, stored in stored_tensors(base).items()}
    write_tensors(
        dir,
        [
            Pending(name, array.shape, array.dtype, lambda array=array: array)
            for name, array in arrays.items()
        ],
        2**30,
    )


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """What one process writes: a base, its adapter, and both in one model, and what the others shall
    stumble over.
    """
    root = tmp_path_factory.mktemp("single")
    model = GPT2(CONFIG)
    params = eighths(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"], 0)
    params["wpe"] = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16), params["wpe"]
    )  # goes behind the others in a file
    for layer in params["h"].values():  # int8's scale is the largest of a column by 127: a power of two
        layer["mlp"]["c_fc"]["kernel"] = layer["mlp"]["c_fc"]["kernel"].at[0].set(127 / 64)
    hf.save(root / "base", model, params, shard_bytes=SHARD_BYTES)
    frozen, delta = lora_jax.lorafy(params, TARGETS, axes={".*": "in out"})
    delta = eighths(delta, 1)
    hf.save(root / "combined", model, lora_jax.combine(frozen, delta), shard_bytes=SHARD_BYTES)
    peft.save(root / "peft", model, frozen, delta, base="gpt2")
    loralib.save(root / "loralib.pt", model, frozen, delta)
    hf.save(
        root / "packed",
        model,
        lora_jax.combine(lora_jax.quantize(frozen, "int8", targets="mlp/c_fc/kernel"), delta),
    )

    vera = lora_jax.lorafy(params, "attn/c_attn/kernel", method=lora_jax.VeRA(rank=2), axes="in out")
    peft.save(root / "vera", model, *vera)
    hf.save(root / "damaged", model, params, shard_bytes=SHARD_BYTES)
    file = sorted((root / "damaged").glob("*.safetensors"))[1]  # which process 1 verifies
    content = bytearray(file.read_bytes())
    content[-4] ^= 1
    file.write_bytes(content)

    def last_row_is_nan(name, array):
        if name.endswith("wte.weight"):
            array[-1] = np.nan
        return array

    rewritten(root / "base", root / "nan", last_row_is_nan)
    return root


BEGIN = """
    import json
    from pathlib import Path
    import jax.numpy as jnp
    from jax.experimental import multihost_utils
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    import lora_jax
    from lora_jax.interop import hf, loralib, peft
    from lora_jax.interop import _safetensors, _torch_files
    from lora_jax.interop.hf import _load
    from lora_jax.sharding import delta_specs, frozen_specs, partition_specs, shardings

    single, out = Path(sys.argv[1]), Path(sys.argv[2])
    devices = np.asarray(jax.devices())
    mesh = Mesh(devices.reshape(1, -1, 2), ("data", "fsdp", "tensor"))
    crossed = Mesh(devices.reshape(1, 2, -1).swapaxes(1, 2), ("data", "fsdp", "tensor"))
    me = jax.process_index()
    messages = {}

    gathered = []
    allgather = multihost_utils.process_allgather
    def noted(array, tiled=False):
        if isinstance(array, jax.Array):
            gathered.append(array)
        return allgather(array, tiled=tiled)
    multihost_utils.process_allgather = noted

    def fails(name, function, *arguments, **options):
        try:
            function(*arguments, **options)
        except Exception as error:
            messages[name] = [type(error).__name__, str(error)]
        else:
            raise AssertionError(f"{name}: no error")

    def placed(frozen, delta, specs, mesh):
        frozen = jax.device_put(frozen, shardings(mesh, frozen_specs(frozen, specs), frozen))
        delta = jax.device_put(delta, shardings(mesh, delta_specs(delta, specs), delta))
        gathered.clear()  # JAX compares what the processes put
        return frozen, delta
"""

LOADED = """
    seen, check = [], _load.check_finite
    _load.check_finite = lambda file, name, array: seen.append(array.size) or check(file, name, array)
    model, params = hf.load(single / "base", mesh=here, scan=scan)
    _load.check_finite = check
    leaves = jax.tree.leaves(params)
    parts = {(number, str(shard.index)): shard.data.size for number, leaf in enumerate(leaves) for shard in leaf.addressable_shards}
    assert sum(seen) == sum(parts.values()) < 0.7 * sum(leaf.size for leaf in leaves), "it has read more than its parts"
    own = out / str(scan)
    hf.save(own / "base", model, params, shard_bytes=8_000)
    assert (own / "base" / "config.json").is_file()
    frozen, delta = peft.load(single / "peft", model, params)
    hf.save(own / "combined", model, lora_jax.combine(frozen, delta), shard_bytes=8_000)
    assert gathered and all(array.ndim < 3 for array in gathered), "a stack was gathered as a whole"
"""  # noqa: E501

ADAPTERS = """
    specs = partition_specs(params, model.partition_rules)
    frozen, delta = placed(frozen, delta, specs, here)
    hf.save(own / "placed", model, lora_jax.combine(frozen, delta), shard_bytes=8_000)
    peft.save(own / "peft", model, frozen, delta, base="gpt2")
    assert (own / "peft" / "adapter_model.safetensors").is_file()
    again = placed(*loralib.load(single / "loralib.pt", model, params, alpha=4), specs, here)
    assert loralib.save(own / "loralib.pt", model, *again) == 4
    assert (own / "loralib.pt").is_file()
    vera = placed(*peft.load(single / "vera", model, params), specs, here)
    peft.save(own / "vera", model, *vera)
    packed = lora_jax.quantize(frozen, "int8", targets="mlp/c_fc/kernel")
    hf.save(own / "packed", model, lora_jax.combine(packed, delta))
    assert all(array.ndim < 3 for array in gathered), "a stack was gathered as a whole"
"""


ERRORS = """
    out = out / "errors"
    out.mkdir(exist_ok=True)
    model, params = hf.load(single / "base", mesh=mesh, scan=True)
    frozen, delta = peft.load(single / "peft", model, params)
    tree = lora_jax.combine(*placed(frozen, delta, partition_specs(params, model.partition_rules), mesh))
    # Along the rank, so that merging needs the other process: whoever merged while that is gone would wait for ever.
    arrays = tree["h"]["mlp"]["c_fc"]["kernel"].adapter.arrays
    arrays["a"] = jax.device_put(arrays["a"], NamedSharding(mesh, P(None, None, "fsdp")))
    arrays["b"] = jax.device_put(arrays["b"], NamedSharding(mesh, P(None, "fsdp", None)))

    fails("nan", hf.load, single / "nan", mesh=crossed)
    fails("nan, scanned", hf.load, single / "nan", mesh=crossed, scan=True)
    fails("damaged", hf.load, single / "damaged", mesh=mesh)
    fails("not empty", hf.save, single / "base", model, params)
    fails("adapter not empty", peft.save, single / "peft", model, *lora_jax.partition(tree))
    fails("file exists", loralib.save, single / "loralib.pt", model, *lora_jax.partition(tree))
    fails("no model", hf.save, out / "none", model, {**params, "more": jnp.zeros(2)})
    other = {**params, "wte": jax.tree.map(lambda leaf: leaf + 1, params["wte"])}
    fails("another base", peft.load, single / "peft", model, other)
    fails("another base of loralib's", loralib.load, single / "loralib.pt", model, other, alpha=4)
    wrong = {**params, "wte": jax.tree.map(lambda leaf: leaf * jnp.nan, params["wte"])}
    fails("no numbers", hf.save, out / "wrong", model, wrong)

    # The disk is full: of the writer's, after more and more tensors.
    append, left = _safetensors._append, [0]
    def full(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        append(*arguments)
    _safetensors._append = full
    for count in range(0, 20, 3):
        left[0] = count
        fails(f"full {count}", hf.save, out / "full", model, tree)
        fails(f"full adapter {min(count, 4)}", peft.save, out / "full", model, *lora_jax.partition(tree)) if count < 5 else None
    _safetensors._append = append
    write = _torch_files.write
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")
    _torch_files.write = full
    fails("full file", loralib.save, out / "full.pt", model, *lora_jax.partition(tree))
    _torch_files.write = write

    # Process 1 alone cannot read, and cannot fetch.
    def unreadable(*arguments, **options):
        raise PermissionError("not yours")
    if me == 1:
        _load.read_json, kept = unreadable, _load.read_json
    fails("unreadable", hf.load, single / "base", mesh=mesh)
    if me == 1:
        _load.read_json = kept
        facts, peft._load.facts_of = peft._load.facts_of, unreadable
    fails("unreadable adapter", peft.load, single / "peft", model, params)
    if me == 1:
        peft._load.facts_of = facts

    # After all that the processes are still in step.
    hf.save(out / "after", model, tree, shard_bytes=8_000)

    # What is a process's own needs no other: only process 0 does this, who was not the one to verify what is damaged.
    def never(*arguments, **options):
        raise AssertionError("a collective")
    multihost_utils.process_allgather = never
    local = Mesh(np.asarray(jax.local_devices()).reshape(1, 1, 2), ("data", "fsdp", "tensor"))
    second = Mesh(devices[2:].reshape(1, 1, 2), ("data", "fsdp", "tensor"))
    for here in (None, local) if me == 0 else ():
        own = out / str(here is None)
        fails(f"damaged, own {here is None}", hf.load, single / "damaged", mesh=here)
        model, params = hf.load(single / "base", mesh=here)
        frozen, delta = peft.load(single / "peft", model, params)
        hf.save(own / "combined", model, lora_jax.combine(frozen, delta), shard_bytes=8_000)
        peft.save(own / "peft", model, frozen, delta, base="gpt2")
        loralib.save(own / "loralib.pt", model, frozen, delta)
    if me == 0:
        fails("mesh of another", hf.load, single / "base", mesh=second)
        theirs = jax.make_array_from_callback((2,), NamedSharding(second, P()), lambda index: np.zeros(2)[index], dtype=np.float32)
        fails("array of another", hf.save, out / "none", model, {**params, "wpe": {"embedding": theirs}})
    (out / f"messages{me}").write_text(json.dumps(messages))
"""  # noqa: E501


def assert_same(own, single, **names):
    for name, expected in names.items():
        assert bytes_of(own / name.replace("_", ".")) == bytes_of(single / expected.replace("_", ".")), name
    assert sorted(entry.name for entry in own.iterdir()) == sorted(name.replace("_", ".") for name in names)


@pytest.fixture(scope="module")
def two(single, tmp_path_factory):
    """What two processes write, which do first what goes well and then what does not."""
    out = tmp_path_factory.mktemp("two")
    unrolled = "    scan, here = False, crossed\n" + LOADED
    script = BEGIN + "    scan, here = True, mesh\n" + LOADED + ADAPTERS + unrolled + ERRORS
    processes.run(2, script, single, out)
    return out


def test_two_processes_write_the_bytes_of_one(single, two):
    both = dict(base="base", combined="combined")
    assert_same(
        two / "True",
        single,
        **both,
        placed="combined",
        peft="peft",
        vera="vera",
        packed="packed",
        loralib_pt="loralib_pt",
    )
    assert_same(two / "False", single, **both)
    assert len(list((single / "base").glob("*.safetensors"))) > 2 and "BF16" in {
        stored.dtype for stored in stored_tensors(single / "base").values()
    }


def test_four_processes_write_the_bytes_of_one(single, tmp_path):
    damaged = """
    fails("damaged", hf.load, single / "damaged", mesh=mesh)
    (out / f"messages{me}").write_text(json.dumps(messages))
    """
    processes.run(4, BEGIN + "    scan, here = True, mesh\n" + LOADED + damaged, single, tmp_path)
    assert_same(tmp_path / "True", single, base="base", combined="combined")
    said = [found["damaged"] for found in messages(tmp_path)]
    assert (
        len(said) == 4
        and len({re.sub(NAMED, "", text) for _, text in said}) == 1
        and sum(re.search(NAMED, text) is None for _, text in said) == 1  # its own
        and "is damaged: its contents" in said[0][1]
    )


def test_what_one_process_meets_all_raise(single, two):
    out = two / "errors"
    first, second = messages(out)
    assert len(first) > 20
    for name in second:
        alone = "unreadable" in name
        writer, other = (second, first) if alone else (first, second)
        (kind, text), (other_kind, other_text) = writer[name], other[name]
        if kind == "ValueError":  # which both of them may have met, or either
            assert other_kind == kind and re.sub(NAMED, "", other_text) == re.sub(NAMED, "", text), name
            assert not (re.search(NAMED, text) and re.search(NAMED, other_text)), name
        else:
            assert other_kind == "OSError" and re.sub(NAMED, "", other_text) == text, name
            assert f"(process {1 if alone else 0})" in other_text, name
    assert (
        "values in 'transformer.wte.weight'" in first["nan"][1]
        and "values in 'transformer.wte.weight'" in first["nan, scanned"][1]
    )
    assert "is damaged: its contents do not have the checksum" in first["damaged"][1]
    assert (
        "is not empty" in first["not empty"][1]
        and "is not empty" in first["adapter not empty"][1]
        and "exists; choose" in first["file exists"][1]
    )
    assert (
        "'more' is unexpected" in first["no model"][1]
        and "infinite or no numbers, so nothing is written" in first["no numbers"][1]
    )
    assert all(
        "beside another base: 'transformer.wte.weight'" in first[name][1]
        for name in ("another base", "another base of loralib's")
    )
    assert all(messages[0] == "OSError" for name, messages in first.items() if name.startswith("full"))
    assert second["unreadable"] == ["PermissionError", "not yours"] == second["unreadable adapter"]
    assert sorted(entry.name for entry in out.iterdir()) == [
        "False",
        "True",
        "after",
        "messages0",
        "messages1",
    ]
    assert bytes_of(out / "after") == bytes_of(single / "combined")
    for own in ("True", "False"):
        assert_same(out / own, single, combined="combined", peft="peft", loralib_pt="loralib_pt")
        assert "is damaged" in first[f"damaged, own {own}"][1]
    assert "on the devices of the processes [1], and this is process 0 of 2" in first["mesh of another"][1]
    assert "an array of shape (2,)" in first["array of another"][1]
