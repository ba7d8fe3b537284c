"""Small models with loralib's own layers, in PyTorch and here, and files between the two."""

import copy
import functools
import json

import encoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import Full, LoRA
from lora_jax._paths import named_leaves
from lora_jax._tree.nodes import Adapter, is_node
from lora_jax.interop import _torch_files, hf, loralib
from lora_jax.models import GPT2, GPT2Config


_SIZES = dict(
    vocab_size=31, hidden_size=12, intermediate_size=20, num_attention_heads=2, labels=("a", "b", "c")
)
CONFIGS = {
    "gpt2": GPT2Config(
        vocab_size=29, n_positions=9, n_embd=12, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=None
    ),
    "bert": encoders.changed(encoders.BERT, **_SIZES),
    "roberta": encoders.changed(encoders.ROBERTA, **_SIZES),
    "deberta": encoders.changed(encoders.DEBERTA, **_SIZES),
}
CONFIGS["gpt2 of three layers"] = encoders.changed(CONFIGS["gpt2"], n_layer=3)
IDS = np.random.default_rng(0).integers(2, 29, (3, 7))
C_ATTN = "transformer.h.0.attn.c_attn"
QV = [True, False, True]


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("loralib", reason="loralib is not installed: pip install 'lora_jax[torch]'")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """`bases(family, head)`: a model's directory, with random weights, nothing at 0 or 1."""

    @functools.cache
    def make(family, head=None):
        config, dir = CONFIGS[family], tmp_path_factory.mktemp("base") / f"{family}_{head}"
        config = encoders.changed(config, labels=("start", "end")) if head == "question_answering" else config
        model = GPT2(config) if family.startswith("gpt2") else encoders.ours(config, head)
        hf.save(dir, model, encoders.random_params(model))
        return dir

    return make


# --- here ---------------------------------------------------------------------------------------------------


def output(model, frozen, delta):
    found = encoders.apply(model, lora_jax.merge(frozen, delta), IDS)
    return np.asarray(found[0] if isinstance(found, tuple) else found)


def assert_close(found, expected):
    assert found.shape == expected.shape and np.abs(expected).max() > 0.1
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def adapters(delta):
    return {
        leaf.spec.path: leaf for leaf in jax.tree.leaves(delta, is_leaf=is_node) if isinstance(leaf, Adapter)
    }


def whole(delta):
    """The paths of what trains without an adapter."""
    return {
        path
        for path, leaf in named_leaves(delta, is_leaf=is_node)
        if leaf is not None and not isinstance(leaf, Adapter)
    }


def axes(scan):
    return (
        {"(h|layer)/.*kernel": "layer in out", ".*embedding": "in out", ".*kernel": "in out"}
        if scan
        else {".*": "in out"}
    )


def trained(tree, seed=5):
    """Another value for every number that trains."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(np.asarray(leaf, np.float32) + draw.normal(0, 0.3, leaf.shape), leaf.dtype),
        tree,
    )


def made(dir, targets, scan=False, **options):
    model, params = hf.load(dir, scan=scan, **options)
    frozen, delta = lora_jax.lorafy(params, targets, axes=axes(scan))
    return model, params, frozen, trained(delta)


# --- in PyTorch ---------------------------------------------------------------------------------------------


def in_torch(dir):
    """The base, of the class that its config names; a copy, which may be changed."""
    return copy.deepcopy(_in_torch(dir))


@functools.cache
def _in_torch(dir):
    import transformers

    name = json.loads((dir / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(dir, attn_implementation="eager").eval()


def output_in_torch(torch, model):
    with torch.no_grad():
        return encoders.run_theirs(torch, model, IDS).numpy()


def disturb(torch, parameters):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def with_layers(torch, theirs, model, layers, **every):
    """`model` with loralib's layers, A and B random: `layers` are their options by the ending of the
    module's name.
    """
    every = {"lora_alpha": 6, "merge_weights": False, **every}
    for name, module in list(model.named_modules()):
        for ending, options in layers.items():
            if name.endswith(ending):
                model.set_submodule(name, _layer(torch, theirs, module, **{**every, **options}))
    disturb(torch, [parameter for name, parameter in model.named_parameters() if "lora_" in name])
    return model


def _layer(torch, theirs, module, enable_lora=None, **options):
    if isinstance(module, torch.nn.Embedding):
        layer = theirs.Embedding(*module.weight.shape, padding_idx=module.padding_idx, **options)
    else:
        turned = not isinstance(module, torch.nn.Linear)  # transformers' Conv1D
        ins, outs = module.weight.shape if turned else module.weight.shape[::-1]
        kind = (
            theirs.Linear
            if enable_lora is None
            else functools.partial(theirs.MergedLinear, enable_lora=enable_lora)
        )
        layer = kind(ins, outs, fan_in_fan_out=turned, bias=module.bias is not None, **options)
        layer.bias = module.bias
    assert layer.weight.shape == module.weight.shape
    layer.weight = module.weight  # itself, so that what was tied is tied
    return layer


def read_in_torch(torch, theirs, dir, file, alpha, enable_lora=None):
    """What PyTorch computes with a file of ours: in layers of the ranks and the alpha that belong to it."""
    tensors, model = torch.load(file, weights_only=True), in_torch(dir)
    layers = {}
    for name in (name.removesuffix(".lora_B") for name in tensors if name.endswith(".lora_B")):
        rank = tensors[f"{name}.lora_B"].shape[1]
        layers[name] = {
            "r": rank,
            **({"enable_lora": list(enable_lora)} if enable_lora and name.endswith("c_attn") else {}),
        }
    model = with_layers(torch, theirs, model, layers, lora_alpha=alpha).eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and not [name for name in missing if "lora_" in name]
    return output_in_torch(torch, model)


def check_continued(torch, theirs, dir, tmp_path, model, trees, state, enable_lora=None):
    """Written again, bit for bit what was read, and as good in PyTorch."""
    alpha = loralib.save(tmp_path / "again.pt", model, *trees)
    assert alpha == 6
    written = torch.load(tmp_path / "again.pt", weights_only=True)
    read = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    assert written.keys() <= read.keys() and {name for name in read if "lora_" in name} <= written.keys()
    for name, tensor in written.items():
        assert tensor.dtype == read[name].dtype and torch.equal(tensor, read[name]), name
    assert_close(
        read_in_torch(torch, theirs, dir, tmp_path / "again.pt", alpha, enable_lora), output(model, *trees)
    )


QUERIES = {"bert": ("query", "value"), "roberta": ("query", "value"), "deberta": ("query_proj", "value_proj")}


class Ours:
    """A file of ours, and copies of it with other tensors, as another tool would write them."""

    def __init__(self, dir, root, method, **options):
        self.model, self.params, self.frozen, self.delta = made(
            dir, {"c_attn/kernel": method, "c_attn/bias": Full()}, **options
        )
        self.file, self.other, self.alpha = root / "ours.pt", root / "other.pt", method.alpha
        loralib.save(self.file, self.model, self.frozen, self.delta)
        self.tensors = dict(_torch_files.read(self.file))

    def load(self, tensors=None, **options):
        if tensors is not None:
            _torch_files.write(self.other, tensors, facts={})
        return loralib.load(
            self.file if tensors is None else self.other,
            self.model,
            self.params,
            **{"alpha": self.alpha, **options},
        )


@pytest.fixture(scope="module")
def ours(bases, tmp_path_factory):
    return Ours(bases("gpt2"), tmp_path_factory.mktemp("ours"), LoRA(rank=2, blocks=(True, False, True)))


A, B = f"{C_ATTN}.lora_A", f"{C_ATTN}.lora_B"
