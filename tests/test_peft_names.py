"""Names that other tools give to PEFT's tensors: refused by default with a word on `rename="auto"`, which
reads them where they pair one to one.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_files import trained
from safetensors.numpy import load_file, save_file

import lora_jax
from lora_jax import DoRA, Full, LoRA, VeRA
from lora_jax.interop import hf, peft
from lora_jax.models import GPT2, GPT2Config


MODEL = GPT2(GPT2Config(vocab_size=11, n_positions=5, n_embd=4, n_layer=2, n_head=2))
_PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    return trained(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))


def inside(name):
    return name.removeprefix(_PREFIX)


def with_adapter(name):
    for kind in (
        "lora_A",
        "lora_B",
        "lora_magnitude_vector",
        "vera_lambda_b",
        "vera_lambda_d",
        "vera_A",
        "vera_B",
    ):
        name = name.replace(kind, f"{kind}.default")
    return name


_TOOLS = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "torch.compile of the model": lambda name: name.replace(_PREFIX, f"{_PREFIX}_orig_mod."),
    "FSDP": lambda name: "_fsdp_wrapped_module." + name.replace(".attn.", "._fsdp_wrapped_module.attn."),
    "DDP": lambda name: f"module.{name}",
    "a trainer's attribute": lambda name: f"model.{name}" if name.startswith("base_model.model.") else name,
    "the adapter's name": with_adapter,
    "PEFT twice": lambda name: name.replace(_PREFIX, _PREFIX * 2),
    "no prefix": inside,
    "all at once": lambda name: f"module._orig_mod.{with_adapter(name)}",
}
_METHODS = {"LoRA": LoRA(rank=2, alpha=8), "DoRA": DoRA(rank=2), "VeRA": VeRA(rank=3)}


@pytest.fixture(scope="module")
def saved(params, tmp_path_factory):
    """By method, what was saved and the directory."""
    found = {}
    for name, method in _METHODS.items():
        frozen, delta = lora_jax.lorafy(params, {"c_attn/kernel": method, "ln_f/.*": Full()})
        delta = trained(delta)
        directory = tmp_path_factory.mktemp("saved") / name
        peft.save(directory, MODEL, frozen, delta)
        found[name] = directory, delta
    return found


def copy_of(directory, tmp_path, change):
    """The adapter with its tensors changed, as another tool would write them."""
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "adapter_config.json").write_bytes((directory / "adapter_config.json").read_bytes())
    tensors = change(load_file(directory / "adapter_model.safetensors"))
    save_file(tensors, tmp_path / "copy" / "adapter_model.safetensors", metadata={"format": "pt"})
    return tmp_path / "copy"


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("method", _METHODS)
@pytest.mark.parametrize("tool", _TOOLS)
def test_names_that_a_tool_wrapped(saved, params, tmp_path, tool, method):
    directory, delta = saved[method]
    change = _TOOLS[tool]
    copied = copy_of(directory, tmp_path, lambda old: {change(name): array for name, array in old.items()})
    with pytest.raises(ValueError, match=r"Each name pairs with one that PEFT writes: pass `rename=.auto.`"):
        peft.load(copied, MODEL, params)
    with pytest.warns(UserWarning, match="has names that are not PEFT's: '.*' is read as 'base_model.*more"):
        assert_same(peft.load(copied, MODEL, params, rename="auto").delta, delta)


def of_kohya(tensors, alpha=8.0):
    found = {}
    for name, array in tensors.items():
        module, _, kind = inside(name).partition(".lora_")
        if not kind:
            found[name] = array
            continue
        flat = "lora_te_" + module.replace(".", "_")
        found[flat + {"A.weight": ".lora_down.weight", "B.weight": ".lora_up.weight"}[kind]] = array
        found[f"{flat}.alpha"] = np.array(alpha, np.float32)
    return found


def of_mlx(tensors):
    """MLX has A as (in, r) and B as (r, out)."""
    turn = {".lora_A.weight": ".lora_a", ".lora_B.weight": ".lora_b"}
    found = {}
    for name, array in tensors.items():
        ending = next((ending for ending in turn if name.endswith(ending)), None)
        found[inside(name).removesuffix(ending) + turn[ending] if ending else inside(name)] = (
            np.ascontiguousarray(array.T) if ending else array
        )
    return found


@pytest.mark.parametrize("change", [of_kohya, of_mlx])
def test_names_of_other_tools_files(saved, params, tmp_path, change):
    directory, delta = saved["LoRA"]
    copied = copy_of(directory, tmp_path, change)
    with pytest.raises(ValueError, match="pass `rename=.auto.`"):
        peft.load(copied, MODEL, params)
    with pytest.warns(UserWarning, match="has names that are not PEFT's"):
        assert_same(peft.load(copied, MODEL, params, rename="auto").delta, delta)


def test_an_alpha_that_differs_is_refused(saved, params, tmp_path):
    copied = copy_of(saved["LoRA"][0], tmp_path, lambda tensors: of_kohya(tensors, alpha=4.0))
    with pytest.raises(ValueError, match="alpha' in .* is 4, and adapter_config.json says 8 for that module"):
        peft.load(copied, MODEL, params, rename="auto")


A = "transformer.h.0.attn.c_attn.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # Two names for one tensor.
        (lambda old: {**old, f"module.{_PREFIX}{A}": old[_PREFIX + A] + 1}, "which are one name without"),
        # A stranger, and something missing.
        (lambda old: {**old, "module.extra": old[_PREFIX + A]}, "'module.extra' is unexpected"),
        (lambda old: {f"module.{name}": old[name] for name in old if name != _PREFIX + A}, "is missing"),
        (lambda old: {name.replace("c_attn", "c_atn"): array for name, array in old.items()}, "is missing"),
    ],
)
def test_what_does_not_pair_one_to_one_is_refused(saved, params, tmp_path, change, message):
    copied = copy_of(saved["LoRA"][0], tmp_path, change)
    with pytest.raises(ValueError, match=message):
        peft.load(copied, MODEL, params, rename="auto")
    with pytest.raises(ValueError) as refusal:
        peft.load(copied, MODEL, params)
    assert "rename" not in str(refusal.value)


def test_whole_weights_under_the_wrappers_name_alone(saved, params, tmp_path):
    directory, delta = saved["LoRA"]
    change = lambda name: name.replace(".ln_f.", ".ln_f.modules_to_save.default.")
    copied = copy_of(directory, tmp_path, lambda old: {change(name): array for name, array in old.items()})
    with pytest.warns(UserWarning, match="modules_to_save.default"):
        assert_same(peft.load(copied, MODEL, params, rename="auto").delta, delta)


def test_peft_names_are_left_alone(saved, params, recwarn):
    for directory, delta in saved.values():
        assert_same(peft.load(directory, MODEL, params, rename="auto").delta, delta)
    assert not recwarn.list
    with pytest.raises(ValueError, match="`rename` is 'yes'; it must be 'strict' or 'auto'"):
        peft.load(directory, MODEL, params, rename="yes")


def test_convert_says_what_it_renamed(saved, params, tmp_path):
    from experiments.convert import convert, Job

    hf.save(tmp_path / "base", MODEL, params)
    directory, delta = saved["LoRA"]
    copied = copy_of(
        directory, tmp_path, lambda old: {f"module.{name}": array for name, array in old.items()}
    )
    with pytest.raises(ValueError, match="pass `--rename auto`"):
        convert(Job(copied, tmp_path / "out", "peft", tmp_path / "base"))
    lines = convert(Job(copied, tmp_path / "out", "peft", tmp_path / "base", rename="auto"))
    assert any("is read as 'base_model.model.transformer" in line for line in lines)
    assert_same(peft.load(tmp_path / "out", MODEL, params).delta, delta)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2
