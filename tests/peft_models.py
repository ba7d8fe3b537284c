"""One model here and in PyTorch, adapted by us and by PEFT, in float64.

GPT-2 stands here for `Conv1D`, fused projections, mixed shapes and layers one by one; RoBERTa for `Linear`,
stacked layers and a head that trains beside the adapters. Adapters are random everywhere, DoRA's lengths,
AdaLoRA's spectrum and VeRA's vectors included: at the start most of them do nothing, and would prove as much.
"""

import copy
import dataclasses
import functools
from typing import Any, NamedTuple

import encoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import lora_jax
from lora_jax._tree.nodes import Adapter, Fixed
from lora_jax.interop import hf
from lora_jax.models import GPT2Config


SIZES = dict(vocab_size=29, n_positions=9, n_embd=12, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=None)
ROBERTA = encoders.changed(
    encoders.ROBERTA,
    vocab_size=31,
    hidden_size=12,
    intermediate_size=20,
    num_attention_heads=2,
    labels=("a", "b", "c"),
)
IDS = np.random.default_rng(0).integers(2, 29, (3, 7))
LABELS = np.random.default_rng(1).integers(0, 3, IDS.shape)


class Base(NamedTuple):
    """One model in both libraries, and what of it is adapted."""

    torch: Any  # in float32, as PEFT's PiSSA and VeRA want it when they start
    prefix: str  # of PyTorch's names, which ours lack
    scan: bool
    modules: tuple[str, ...]  # PEFT's targets
    kernels: str  # ours
    labels: np.ndarray
    model: Any
    params: dict

    @property
    def axes(self):
        return {"(h|layer)/.*kernel": "layer in out"} if self.scan else None


class Pair(NamedTuple):
    """An adapted model here and there, the same numbers in both."""

    frozen: Any
    delta: Any
    theirs: Any  # PEFT's model


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft", reason="PEFT is not installed: pip install 'lora_jax[torch]'")


@pytest.fixture(scope="module")
def base(torch, tmp_path_factory):
    """`base("gpt2")` and `base("roberta")`, each made once."""

    @functools.cache
    def make(name, tie="share"):
        if name == "gpt2":
            theirs, prefix, labels = _gpt2(torch), "transformer.", LABELS
            modules, kernels = (
                ("c_attn", "c_proj", "c_fc"),
                "attn/c_attn/kernel|(attn|mlp)/c_proj/kernel|mlp/c_fc/kernel",
            )
        else:
            theirs, prefix, labels = (
                encoders.theirs(torch, ROBERTA, "sequence_classification"),
                "roberta.",
                LABELS[:, 0],
            )
            modules, kernels = ("query", "value", "dense"), "layer/.*(query|value|dense)/kernel"
        directory = tmp_path_factory.mktemp(name)
        copy.deepcopy(theirs).double().save_pretrained(directory)
        with jax.enable_x64(True):
            model, params = hf.load(directory, tie=tie, scan=name == "roberta")
        return Base(theirs, prefix, name == "roberta", modules, kernels, labels, model, params)

    return make


def _gpt2(torch):
    import transformers

    settings = transformers.GPT2Config(**GPT2Config(**SIZES).to_hf(), attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(settings).eval()
    _disturb(torch, model.parameters(), 0.1)
    return model


def _disturb(torch, parameters, scale):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parameters:
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


# --- from PEFT's model to our trees -------------------------------------------------------------------------

# Its layers hold one of each kind, by adapter.
_KINDS = {
    "a": ("lora_A", "lora_embedding_A"),
    "b": ("lora_B", "lora_embedding_B", "vera_lambda_b"),
    "d": ("vera_lambda_d",),
    "e": ("lora_E",),
    "m": ("lora_magnitude_vector",),
}


def _modules(base, theirs, path):
    """PyTorch's module of a leaf of ours, or, if that is stacked, those of all layers."""
    path = path.rpartition("/")[0].replace("/", ".")
    path = path if path.startswith("classifier") else base.prefix + path
    names = (
        [path.replace("layer.", f"layer.{i}.", 1) for i in range(ROBERTA.num_hidden_layers)]
        if base.scan
        else [path]
    )
    return [theirs.base_model.model.get_submodule(name) for name in dict.fromkeys(names)]


def _array(base, theirs, name, path, read=lambda tensor: tensor):
    """Our array `name` of the adapter at `path`, or the leaf itself if that is None. PEFT's matrices are
    ours transposed.
    """

    def of(module):
        if name is None:
            return module.weight if path.endswith("kernel") else module.bias
        item = next(
            kinds["default"] for kind in _KINDS[name] if "default" in (kinds := getattr(module, kind, {}))
        )
        return getattr(item, "weight", item)

    arrays = [read(of(module)).detach().numpy().T for module in _modules(base, theirs, path)]
    return jnp.asarray(arrays[0] if len(arrays) == 1 else np.stack(arrays))


def from_peft(base, theirs, delta, read=lambda tensor: tensor):
    """`delta` with PEFT's values in place of ours, or with what `read` makes of its parameters."""

    def node(path, leaf):
        if not isinstance(leaf, Adapter):
            return None if leaf is None else _array(base, theirs, None, path, read)
        arrays = {
            name: _array(base, theirs, name, path, read).reshape(array.shape)
            for name, array in leaf.arrays.items()
        }
        return dataclasses.replace(leaf, arrays=arrays)

    return mapped(node, delta)


def _fixed_from_peft(base, theirs, started, frozen):
    """What a method keeps beside the weight: LoRA-FA's A, and PiSSA's start. What follows from the weight
    or a seed stays ours.
    """

    def node(path, leaf):
        if not isinstance(leaf, Fixed):
            return leaf
        sources = {"a": (theirs, "a"), "start_a": (started, "a"), "start_b": (started, "b")}
        known = {name: _array(base, *sources[name], path) for name in leaf.arrays if name in sources}
        return dataclasses.replace(leaf, arrays={**leaf.arrays, **known})

    return mapped(node, frozen)


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def mapped(node, tree):
    return traverse_util.unflatten_dict(
        {path: node(path, leaf) for path, leaf in flat(tree).items()}, sep="/"
    )


def adapters(delta):
    return {path: leaf for path, leaf in flat(delta).items() if isinstance(leaf, Adapter)}


# --- the two sides ------------------------------------------------------------------------------------------


def with_peft(peft, base, kind, **settings):
    """PEFT's model at its start, in float64."""
    task = "SEQ_CLS" if base.scan else "CAUSAL_LM"
    settings = {
        "target_modules": list(base.modules),
        "fan_in_fan_out": not base.scan,
        "task_type": task,
        **settings,
    }
    model = peft.get_peft_model(
        copy.deepcopy(base.torch), getattr(peft, kind)(**settings), autocast_adapter_dtype=False
    )
    return model.eval().double()


def paired(torch, base, methods, started, params=None):
    """`started` with its adapters randomised, and the same here. `methods` maps our patterns to methods."""
    theirs = copy.deepcopy(started)
    _disturb(torch, [parameter for parameter in theirs.parameters() if parameter.requires_grad], 0.3)
    frozen, delta = lora_jax.lorafy(base.params if params is None else params, methods, axes=base.axes)
    return Pair(_fixed_from_peft(base, theirs, started, frozen), from_peft(base, theirs, delta), theirs)


def merged_by_peft(base, theirs, directory, tie="share"):
    """The parameters of PEFT's model with its adapters merged, as ours.

    Merged in place and copied over: PEFT 0.21's VeRA cannot unload a model whose head trains too.
    """
    theirs, plain = copy.deepcopy(theirs), copy.deepcopy(base.torch).double()
    theirs.merge_adapter()
    values = {}
    for name in plain.state_dict():
        module, _, last = name.rpartition(".")
        owner = theirs.base_model.model.get_submodule(module)
        values[name] = getattr(getattr(owner, "base_layer", owner), last)
    plain.load_state_dict(values)
    plain.save_pretrained(directory)
    return hf.load(directory, tie=tie, scan=base.scan)[1]


def ours(base, pair):
    """Logits, the gradients of all that trains, and the merged weights: one program."""

    def loss(delta):
        logits = lora_jax.adapt(base.model.apply)({"params": lora_jax.combine(pair.frozen, delta)}, IDS)
        scores = jnp.take_along_axis(jax.nn.log_softmax(logits), base.labels[..., None], axis=-1)
        return -jnp.mean(scores), logits

    def everything(delta):
        gradients, logits = jax.grad(loss, has_aux=True)(delta)
        return logits, gradients, lora_jax.merge(pair.frozen, delta)

    return jax.jit(everything, compiler_options=encoders.QUICKLY)(pair.delta)


def peft_logits_and_gradients(torch, base, pair):
    """The cross entropy is not the model's own, which goes through float32."""
    logits = pair.theirs(input_ids=torch.tensor(IDS)).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, -2), torch.tensor(base.labels).flatten()).backward()
    return logits.detach().numpy(), from_peft(base, pair.theirs, pair.delta, lambda tensor: tensor.grad)


def close(found, expected, tolerance, where=""):
    """Within `tolerance` of the largest number of the array, which is not zero."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape and found.dtype == expected.dtype == np.float64, where
    assert (largest := np.abs(expected).max()) > 0, where
    np.testing.assert_allclose(found, expected, atol=tolerance * largest, rtol=0, err_msg=where)


def all_close(found, expected, tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        close(one, other, tolerance, jax.tree_util.keystr(path))


def agree(torch, base, pair, their_merged, but=()):
    logits, gradients, merged = ours(base, pair)
    their_logits, their_gradients = peft_logits_and_gradients(torch, base, pair)
    close(logits, their_logits, 1e-12)
    all_close(gradients, their_gradients, 1e-10)
    before, merged, their_merged = (flat(tree) for tree in (base.params, merged, their_merged))
    for path in adapters(pair.delta):  # and they do something
        assert np.abs(merged[path] - before[path]).max() > 0.1 * np.abs(before[path]).max(), path
    for path in but:
        del merged[path], their_merged[path]
    all_close(merged, their_merged, 1e-12)
