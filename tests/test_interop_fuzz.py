"""Files that are damaged, or edited by somebody: never read silently as something else, never a crash without
a message.

The property is always one: `load` raises a `ValueError` that says something, or returns exactly what was
saved. PyTorch is not needed.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, HealthCheck, settings
from safetensors.numpy import load_file, save_file

import lora_jax
from lora_jax import DoRA, Full, LoRA, VeRA
from lora_jax.interop import hf, peft
from lora_jax.models import GPT2, GPT2Config


MODEL = GPT2(
    GPT2Config(vocab_size=11, n_positions=5, n_embd=4, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=None)
)
# Each example works on a fresh copy.
fuzz = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random_like(tree, seed):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(draw.normal(0.1, 0.3, leaf.shape), leaf.dtype), tree)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories by name, with what was saved in them."""
    dir = tmp_path_factory.mktemp("saved")
    params = random_like(jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"], 0)
    hf.save(dir / "model", MODEL, params)
    hf.save(dir / "sharded", MODEL, params, shard_bytes=1000)
    found = {"model": params, "sharded": params}
    for name, method in {"lora": LoRA(rank=2), "dora": DoRA(rank=2), "vera": VeRA(rank=3)}.items():
        frozen, delta = lora_jax.lorafy(params, {"c_attn/kernel": method, "ln_f/.*": Full()})
        found[name] = random_like(delta, 1)
        peft.save(dir / name, MODEL, frozen, found[name])
    return dir, found


def load(dir, name, params):
    if name in ("model", "sharded"):
        return hf.load(dir)[1]
    return peft.load(dir, MODEL, params).delta


def check(saved, name, copied):
    """Whether it was refused; if it was not, nothing may have changed."""
    dir, found = saved
    try:
        again = load(copied, name, found["model"])
    except ValueError as error:
        assert len(str(error)) > 20 and str(copied) in str(error) or "`" in str(error), error
        return True
    one, other = (
        {path: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (found[name], again)
    )
    assert {str(path) for path in one} == {str(path) for path in other}
    assert all(np.array_equal(np.asarray(leaf), np.asarray(other[path])) for path, leaf in one.items())
    return False


def copy_of(saved, name, tmp_path):
    shutil.rmtree(tmp_path / "copy", ignore_errors=True)
    shutil.copytree(saved[0] / name, tmp_path / "copy")
    return tmp_path / "copy"


names = st.sampled_from(["model", "sharded", "lora", "dora", "vera"])


def test_what_is_not_damaged_is_read(saved, tmp_path):
    for name in saved[1]:
        assert not check(saved, name, copy_of(saved, name, tmp_path))


@fuzz
@given(name=names, draw=st.data())
def test_truncations(saved, tmp_path, name, draw):
    copied = copy_of(saved, name, tmp_path)
    file = draw.draw(st.sampled_from(sorted(copied.iterdir())))
    whole = file.read_bytes()
    file.write_bytes(whole[: draw.draw(st.integers(0, len(whole) - 1))])
    assert check(saved, name, copied)


@fuzz
@given(name=names, draw=st.data())
def test_flipped_bits(saved, tmp_path, name, draw):
    copied = copy_of(saved, name, tmp_path)
    file = draw.draw(st.sampled_from(sorted(copied.iterdir())))
    content = bytearray(file.read_bytes())
    bit = draw.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << (bit % 8)
    file.write_bytes(content)
    assert check(saved, name, copied)


@fuzz
@given(name=names, draw=st.data())
def test_bytes_of_something_else(saved, tmp_path, name, draw):
    copied = copy_of(saved, name, tmp_path)
    file = draw.draw(st.sampled_from(sorted(copied.iterdir())))
    whole = file.read_bytes()
    start = draw.draw(st.integers(0, len(whole)))
    other = draw.draw(st.binary(max_size=40))
    file.write_bytes(whole[:start] + other + whole[start + draw.draw(st.integers(0, 40)) :])
    assert check(saved, name, copied) or file.read_bytes() == whole


@fuzz
@given(name=names, draw=st.data())
def test_missing_files(saved, tmp_path, name, draw):
    copied = copy_of(saved, name, tmp_path)
    draw.draw(st.sampled_from(sorted(copied.iterdir()))).unlink()
    assert check(saved, name, copied)


def _tensors_of(dir):
    return {file: load_file(file) for file in sorted(dir.glob("*.safetensors"))}


@fuzz
@given(name=st.sampled_from(["model", "lora", "dora", "vera"]), draw=st.data())
def test_tensors_that_somebody_edited(saved, tmp_path, name, draw):
    """As another tool would write them, without our checksum."""
    copied = copy_of(saved, name, tmp_path)
    ((file, tensors),) = _tensors_of(copied).items()
    chosen = draw.draw(st.sampled_from(sorted(tensors)))
    array = tensors[chosen]
    change = draw.draw(
        st.sampled_from(
            [
                "drop",
                "rename",
                "add",
                "swap axes",
                "shorten",
                "lengthen",
                "integers",
                "nan",
                "infinity",
                "flatten",
            ]
        )
    )
    if change in ("drop", "rename"):
        del tensors[chosen]
    if change == "rename":
        tensors[
            draw.draw(
                st.text(min_size=1, max_size=30).filter(
                    lambda text: text not in tensors and text != "__metadata__"
                )
            )
        ] = array
    if change == "add":
        tensors[chosen + draw.draw(st.text(alphabet="abc._", min_size=1, max_size=5))] = array
    if change == "swap axes":
        tensors[chosen] = np.ascontiguousarray(array[None].swapaxes(0, -1))
    if change == "shorten":
        tensors[chosen] = array[1:]
    if change == "lengthen":
        tensors[chosen] = np.concatenate([array, array[:1]])
    if change == "integers":
        tensors[chosen] = array.astype(draw.draw(st.sampled_from([np.int8, np.int32, np.uint16, bool])))
    if change in ("nan", "infinity"):
        array = array.copy()
        array.reshape(-1)[draw.draw(st.integers(0, array.size - 1))] = {"nan": np.nan, "infinity": -np.inf}[
            change
        ]
        tensors[chosen] = array
    if change == "flatten":
        tensors[chosen] = array.reshape(1, -1)
    save_file(tensors, file, metadata={"format": "pt"})
    assert check(saved, name, copied)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 30)
    | st.floats()
    | st.text(alphabet="c_attn.*([h01\\", max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(alphabet="hc.attn_", max_size=5), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(fuzz, max_examples=120)
@given(name=st.sampled_from(["lora", "dora", "vera"]), draw=st.data())
def test_configs_that_somebody_edited(saved, tmp_path, name, draw):
    """Any value under any key. What is accepted may say the same in other words, or change how training
    would go on, and nothing else.
    """
    copied = copy_of(saved, name, tmp_path)
    ((file, tensors),) = _tensors_of(copied).items()
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((copied / "adapter_config.json").read_text())
    known = sorted(
        {
            *config,
            "use_rslora",
            "use_dora",
            "rank_pattern",
            "alpha_pattern",
            "init_lora_weights",
            "layers_to_transform",
            "exclude_modules",
            "bias",
            "save_projection",
        }
    )
    key = draw.draw(st.sampled_from(known) | st.text(max_size=8))
    config[key] = draw.draw(values)
    (copied / "adapter_config.json").write_text(json.dumps(config))
    try:
        delta = peft.load(copied, MODEL, saved[1]["model"]).delta
    except ValueError as error:
        assert len(str(error)) > 20
        return
    one, other = ([np.asarray(leaf) for leaf in jax.tree.leaves(tree)] for tree in (saved[1][name], delta))
    assert sorted(array.tobytes() for array in one) == sorted(array.tobytes() for array in other)


def test_json_that_is_none(saved, tmp_path):
    for text in (
        "",
        "[]",
        "3",
        "{",
        '{"a": NaN',
        "\ufeff{}",
        "[" * 100_000,
        '{"r": 1e400}',
        '{"peft_type": "LORA", "r": ' + "9" * 5000 + "}",
    ):
        for name, file in (
            ("lora", "adapter_config.json"),
            ("model", "config.json"),
            ("sharded", "model.safetensors.index.json"),
        ):
            copied = copy_of(saved, name, tmp_path)
            (copied / file).write_text(text)
            assert check(saved, name, copied)


# --- models larger than memory ------------------------------------------------------------------------------

_SCRIPT = """
import resource, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
import lora_jax
from lora_jax.interop import hf, peft
dir = Path(sys.argv[1])
keep = lambda path, array: array
# Everything once at a small size, so that what follows needs memory for the weights alone.
def convert(base, adapter, to):
    model, params = hf.load(dir / base, place=keep)
    frozen, delta = peft.load(dir / adapter, model, params)
    hf.save(dir / to, model, lora_jax.combine(frozen, delta), shard_bytes=50_000_000)
convert("small", "small_adapter", "small_merged")
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[2]),) * 2)
convert("large", "large_adapter", "large_merged")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process's memory are Linux's")
def test_a_model_larger_than_memory_is_merged_and_written(tmp_path):
    """200 MB of weights, and 100 MB of memory for one matrix after the other, for compiling and for
    threads.
    """
    sizes = {
        "small": GPT2Config(vocab_size=50, n_positions=8, n_embd=64, n_layer=2, n_head=2),
        "large": GPT2Config(vocab_size=500, n_positions=8, n_embd=768, n_layer=7, n_head=2),
    }
    for name, config in sizes.items():
        model = GPT2(config)
        params = random_like(
            jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"], 0
        )
        frozen, delta = lora_jax.lorafy(params, "(c_attn|c_fc|c_proj)/kernel", method=LoRA(rank=4))
        delta = random_like(delta, 1)
        hf.save(tmp_path / name, model, params)
        peft.save(tmp_path / f"{name}_adapter", model, frozen, delta)
    merged = lora_jax.merge(frozen, delta)
    assert sum(file.stat().st_size for file in (tmp_path / "large").iterdir()) > 195_000_000
    run = [sys.executable, "-c", _SCRIPT, str(tmp_path), str(100_000_000)]
    # Without it, glibc keeps what is freed, in pieces.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(
        run, capture_output=True, text=True, cwd=Path(__file__).parent.parent, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / "large_merged").glob("*.safetensors"))) >= 4
    found = hf.load(tmp_path / "large_merged")[1]
    assert all(
        np.array_equal(one, other)
        for one, other in zip(jax.tree.leaves(merged), jax.tree.leaves(found), strict=True)
    )
