"""Small models with PEFT's adapters in them, in PyTorch and here, and directories between the two."""

import copy
import dataclasses
import functools
import json
import shutil

import encoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax
from lora_jax._tree.nodes import Adapter, is_node
from lora_jax.interop import hf, peft
from lora_jax.models import GPT2Config


ignored_warnings = [
    # PEFT asks transformers for it under the old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # What PEFT says of configs that these tests make on purpose.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True` and:UserWarning"),
    pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A and vera_B:UserWarning"),
]

GPT2 = GPT2Config(
    vocab_size=29, n_positions=9, n_embd=12, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=None
)
_SIZES = dict(vocab_size=31, hidden_size=12, intermediate_size=20, num_attention_heads=2)
BERT = encoders.changed(encoders.BERT, **_SIZES)
ROBERTA = encoders.changed(encoders.ROBERTA, **_SIZES)
DEBERTA = encoders.changed(encoders.DEBERTA, **_SIZES)
_ENCODERS = {"bert": BERT, "roberta": ROBERTA, "deberta": DEBERTA}
IDS = np.random.default_rng(0).integers(2, 29, (3, 7))
FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("peft", reason="PEFT is not installed: pip install 'lora_jax[torch]'")


@pytest.fixture(scope="module")
def bases(torch, tmp_path_factory):
    """`bases(family, head)`: a directory with random weights, nothing at 0 or 1. The family may end in
    " untied", for a head of its own.
    """
    import transformers

    @functools.cache
    def make(family, head=None):
        dir = tmp_path_factory.mktemp("base") / f"{family}_{head}"
        torch.manual_seed(7)  # or the weights would depend on which tests ran before
        tied = dict(tie_word_embeddings=not family.endswith(" untied"))
        if family.startswith("gpt2"):
            config = dataclasses.replace(GPT2, n_layer=3) if family == "gpt2 of three layers" else GPT2
            model = transformers.GPT2LMHeadModel(
                transformers.GPT2Config(**{**config.to_hf(), **tied}, attn_implementation="eager")
            ).eval()
            disturb(torch, model.parameters(), 0.1)
        else:
            own = dict(legacy=False, embedding_size=None) if family == "deberta of version 3" else {}
            config = encoders.changed(
                _ENCODERS[family.split()[0]],
                labels=("a", "b", "c") if "class" in head else ("LABEL_0", "LABEL_1"),
                **tied,
                **own,
            )
            model = encoders.theirs(torch, config, head)
        model.save_pretrained(dir)
        return dir

    return make


def disturb(torch, parameters, scale):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parameters:
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def in_torch(dir):
    """The base in PyTorch, of the class that its config names; a copy, which may be changed."""
    return copy.deepcopy(_in_torch(dir))


@functools.cache
def _in_torch(dir):
    import transformers

    name = json.loads((dir / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(dir, attn_implementation="eager").eval()


def without_head(dir, architecture, copied):
    """A pretrained model, as fine-tuning begins with."""
    from safetensors.numpy import save_file

    shutil.copytree(dir, copied)
    tensors = load_file(copied / "model.safetensors")
    save_file(
        {
            name: array
            for name, array in tensors.items()
            if not name.startswith(("classifier", "pooler", "bert.pooler", "score"))
        },
        copied / "model.safetensors",
        metadata={"format": "pt"},
    )
    settings = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**settings, "architectures": [architecture]}))
    return copied


def output_of_theirs(torch, model):
    with torch.no_grad():
        return encoders.run_theirs(torch, model, IDS).numpy()


def output(model, frozen, delta):
    found = encoders.apply(model, lora_jax.merge(frozen, delta), IDS)
    return np.asarray(found[0] if isinstance(found, tuple) else found)


def assert_close(found, expected, tolerance=1e-5):
    assert np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


def trained(delta, seed=5, scale=0.1):
    """Random, and of the size of the base's weights: three times as large, it saturates softmax in some
    models, and rounding counts ten times as much.
    """
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(
            np.asarray(leaf, np.float32) + draw.normal(0, scale, leaf.shape), leaf.dtype
        ),
        delta,
    )


def bytes_of(dir):
    return {name: (dir / name).read_bytes() for name in FILES}


def adapters(delta):
    return [leaf for leaf in jax.tree.leaves(delta, is_leaf=is_node) if isinstance(leaf, Adapter)]


def axes(scan):
    return {"(h|layer)/.*kernel": "layer in out", ".*embedding": "in out"} if scan else None


GPT2_CONFIGS = {
    "LoRA": dict(r=3, target_modules=["c_attn"], task_type="CAUSAL_LM"),
    "targets of the table": dict(r=2, task_type="CAUSAL_LM"),
    "rsLoRA": dict(r=3, target_modules=["c_attn", "c_proj"], use_rslora=True),
    "DoRA": dict(r=3, target_modules=["c_attn", "c_fc"], use_dora=True),
    "patterns": dict(
        r=3,
        target_modules=["c_attn", "c_fc"],
        rank_pattern={"h.0.attn.c_attn": 2},
        alpha_pattern={"c_fc": 5},
    ),
    "all-linear": dict(r=2, target_modules="all-linear"),
    "a regular expression": dict(r=2, target_modules=r".*h\.1\..*c_proj"),
    "some layers": dict(r=2, target_modules=["c_attn"], layers_to_transform=[1], layers_pattern="h"),
    "excluded": dict(r=2, target_modules=["c_proj"], exclude_modules=["mlp.c_proj"]),
    "biases of the targets": dict(r=2, target_modules=["c_attn"], bias="lora_only"),
    "all biases": dict(r=2, target_modules=["c_attn"], bias="all"),
    "norms": dict(r=2, target_modules=["c_attn"], modules_to_save=["ln_1", "ln_f"]),
    "PiSSA": dict(r=2, target_modules=["c_attn"], init_lora_weights="pissa"),
    "positions": dict(r=2, target_modules=["wpe", "c_attn"], init_lora_weights="gaussian"),
    "DoRA of positions": dict(r=2, target_modules=["wpe"], use_dora=True),
    "AdaLoRA": dict(init_r=4, target_modules=["c_attn"], total_step=10),
    "VeRA": dict(r=6, target_modules=["c_attn", "c_fc"], task_type="CAUSAL_LM"),
    "VeRA without projections": dict(
        r=6, target_modules=["c_attn", "c_fc"], save_projection=False, projection_prng_key=5
    ),
}
# Adapters of a part of the layers, or different ones.
NOT_STACKED = {"patterns", "a regular expression", "some layers"}


def config_of(theirs, options):
    kind = (
        theirs.VeraConfig
        if "projection_prng_key" in options or options.get("r") == 6
        else theirs.AdaLoraConfig
        if "init_r" in options
        else theirs.LoraConfig
    )
    return kind(**options)


def written_by_peft(torch, theirs, base, options, dir):
    """An adapter with everything that trains random, and what the model computes with it."""
    torch.manual_seed(7)
    model = theirs.get_peft_model(in_torch(base), config_of(theirs, options)).eval()
    disturb(torch, [parameter for parameter in model.parameters() if parameter.requires_grad], 0.1)
    model.save_pretrained(dir)
    return output_of_theirs(torch, model)


def check_both_ways(torch, theirs, base, dir, tmp_path, expected, tolerance=1e-5, **options):
    """Read, written again and read again, here and in PEFT: one output, and the same bytes from the first
    writing on.
    """
    model, params = hf.load(base, **options)
    frozen, delta = peft.load(dir, model, params)
    assert_close(output(model, frozen, delta), expected, tolerance)
    peft.save(tmp_path / "ours", model, frozen, delta)
    assert_close(
        output_of_theirs(torch, theirs.PeftModel.from_pretrained(in_torch(base), tmp_path / "ours").eval()),
        expected,
        tolerance,
    )
    again = peft.load(tmp_path / "ours", model, params)
    peft.save(tmp_path / "again", model, *again)
    assert bytes_of(tmp_path / "ours") == bytes_of(tmp_path / "again")
    return frozen, delta


@pytest.fixture
def ours(bases, tmp_path):
    """A base and an adapter that we wrote."""
    model, params = hf.load(bases("gpt2"))
    frozen, delta = lora_jax.lorafy(params, "c_attn/kernel", method=lora_jax.LoRA(rank=2))
    peft.save(tmp_path / "adapter", model, frozen, trained(delta))
    return model, params, tmp_path / "adapter"
