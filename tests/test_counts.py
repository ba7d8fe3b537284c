"""How many numbers train, at the models' real sizes and from shapes alone: the papers' figures, and those
of PEFT and loralib.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from lora_jax import AdaLoRA, DoRA, Full, LoRA, LoRAFA, PiSSA, VeRA
from lora_jax.models import (
    Bert,
    BertConfig,
    DebertaV2,
    DebertaV2Config,
    GPT2,
    GPT2Config,
    Roberta,
    RobertaConfig,
)


IDS = jax.ShapeDtypeStruct((1, 4), jnp.int32)
QUERY_VALUE = "attention/self/(query|value)(_proj)?/kernel"
C_ATTN = "attn/c_attn/kernel"


@functools.cache
def shapes(name, scan):
    """The model, and the shapes of its parameters."""
    if name.startswith("gpt2"):
        model = GPT2(GPT2Config.named(name), scan=scan)
    else:
        pairs = ((Bert, BertConfig), (Roberta, RobertaConfig), (DebertaV2, DebertaV2Config))
        kind, config = next(pair for pair in pairs if name in pair[1].sizes)
        model = kind(config.named(name), head="sequence_classification", scan=scan)
    return model, jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]


ROBERTA_HEAD = 592_130  # two layers, for two labels
TABLE = [
    # LoRA (Hu et al. 2022), table 2: 0.3, 0.8 and 4.7 million on query and value, heads aside.
    ("roberta-base", {QUERY_VALUE: LoRA(rank=8)}, 294_912),
    ("roberta-base", {QUERY_VALUE: LoRA(rank=8), "classifier/.*": Full()}, 294_912 + ROBERTA_HEAD),
    ("roberta-large", {QUERY_VALUE: LoRA(rank=8)}, 786_432),
    ("deberta-v2-xxlarge", {QUERY_VALUE: LoRA(rank=16)}, 4_718_592),
    # BERT's are as many as RoBERTa's of the same width and depth, and its new head is one layer.
    ("bert-base-uncased", {QUERY_VALUE: LoRA(rank=8), "classifier/.*": Full()}, 294_912 + 1_538),
    ("bert-large-uncased", {QUERY_VALUE: LoRA(rank=8)}, 786_432),
    # The same leaves by other methods; VeRA's paper says 0.043 million.
    ("roberta-base", {QUERY_VALUE: DoRA(rank=8)}, 313_344),
    ("roberta-base", {QUERY_VALUE: LoRAFA(rank=8)}, 147_456),
    ("roberta-base", {QUERY_VALUE: VeRA(rank=1024)}, 43_008),
    ("roberta-base", {QUERY_VALUE: AdaLoRA(rank=12)}, 442_656),
    ("roberta-base", {QUERY_VALUE: PiSSA(rank=8)}, 294_912),
    # loralib on query and value of the fused projection; PEFT, on all of it, trains as many numbers in
    # another class of functions.
    ("gpt2-medium", {C_ATTN: LoRA(rank=4, blocks=(True, False, True))}, 393_216),
    ("gpt2-medium", {C_ATTN: LoRA(rank=4)}, 393_216),
    ("gpt2-large", {C_ATTN: LoRA(rank=4, blocks=(True, False, True))}, 737_280),
    ("gpt2-xl", {C_ATTN: LoRA(rank=4, blocks=(True, False, True))}, 1_228_800),
    # The first of these as PEFT has to store it: both blocks in one adapter of twice the rank.
    ("gpt2-medium", {C_ATTN: LoRA(rank=8)}, 786_432),
    ("gpt2-medium", {C_ATTN: DoRA(rank=4)}, 466_944),
    ("gpt2-medium", {"bias": Full()}, 271_360),  # BitFit
]


# Without `scan` every layer is traced: once for each kind of model is enough.
ROWS = [
    (*row, scan)
    for row in TABLE
    for scan in (False, True)
    if scan or row[0] in ("roberta-base", "gpt2-medium")
]


def _id(value):
    if isinstance(value, dict):
        return "+".join(type(method).__name__ for method in value.values())
    return {True: "scan", False: "unrolled"}[value] if isinstance(value, bool) else str(value)


@pytest.mark.parametrize("name, targets, trained, scan", ROWS, ids=_id)
def test_counts(name, targets, trained, scan, monkeypatch):
    monkeypatch.setattr(lora_jax.methods.vera, "projections", None)  # NumPy's, which are no arrays of JAX's
    check(name, scan, trained, targets, axes={"(h|layer)/.*kernel": "layer in out"} if scan else None)


@pytest.mark.parametrize("scan", [False, True], ids=_id)
def test_every_linear_layer(scan):
    """The axes, and which leaves are linear, are read off the model. Its head is not among them: it is
    the embedding.
    """
    model, _ = shapes("gpt2-medium", scan)
    check(
        "gpt2-medium",
        scan,
        3_145_728,
        "all-linear",
        method=LoRA(rank=8),
        fn=lambda params, ids: model.apply({"params": params}, ids),
        args=(IDS,),
    )


def check(name, scan, trained, targets, **options):
    """The count, and that no array was made to know it."""
    _, params = shapes(name, scan)
    key = jax.random.key(0)
    before = allocated()
    frozen, delta = lora_jax.lorafy(params, targets, key=key, **options)
    assert lora_jax.count(delta) == trained
    assert (
        all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((frozen, delta)))
        and allocated() <= before
    )


def allocated():
    return sum(array.nbytes for array in jax.live_arrays())
