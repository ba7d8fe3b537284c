"""Random adapters of ours, in PEFT: it computes the same, we read them again, or nothing is written.

An adapter is drawn for each kind of leaf apart: low-rank, trained whole, or frozen; containers and all biases
now and then. What of it PEFT can have, and under which names, is what `save` must know.
"""

import re

import numpy as np
import peft_files
import pytest
from peft_files import assert_close, in_torch, output, output_of_theirs, trained

import lora_jax
from lora_jax import DoRA, Full, LoRA, PiSSA, VeRA
from lora_jax._paths import named_leaves
from lora_jax.interop import hf, peft


theirs = peft_files.theirs
bases = peft_files.bases
pytestmark = peft_files.ignored_warnings

_METHODS = [
    LoRA(rank=2),
    LoRA(rank=2, rs=True),
    LoRA(rank=1, alpha=3),
    DoRA(rank=2),
    VeRA(rank=2),
    PiSSA(rank=2),
]
# What PEFT has no word for, and may therefore be refused.
_REFUSALS = (
    "`delta` holds no adapter|PEFT trains those of all adapted modules or of none|PEFT would save whole; "
    "adapt it or train the whole|`delta` holds DoRA and|acts in the head too"
)
_BASES = [
    ("gpt2", None),
    ("gpt2 untied", None),
    ("bert untied", "masked_lm"),
    ("bert", "sequence_classification"),
    ("roberta", "masked_lm"),
    ("roberta untied", "masked_lm"),
    ("roberta", "sequence_classification"),
    ("roberta", "features"),
    ("roberta", "question_answering"),
    ("deberta", "token_classification"),
    ("deberta untied", "masked_lm"),
    ("deberta of version 3", "masked_lm"),
]


def drawn(paths, draw):
    """Targets for `lorafy`, each of which matches something that no earlier one takes."""
    own = _METHODS[draw.integers(len(_METHODS))]
    whole = draw.choice([0.02, 0.15, 0.6])
    wanted = {}
    if draw.random() < 0.5:  # all of a container
        parts = paths[draw.integers(len(paths))].split("/")
        wanted["/".join(parts[: draw.integers(1, len(parts))]) + "/.*"] = Full()
    for kind in draw.permutation(sorted({re.sub(r"/\d+/", "/[0-9]+/", path) for path in paths})):
        chance = draw.random() if "token_type" not in kind else 1.0  # one row: nothing is of low rank
        if chance < {"kernel": 0.3, "embedding": 0.1}.get(kind.rpartition("/")[2], 0):
            wanted[str(kind)] = own if draw.random() < 0.9 else _METHODS[0]
        elif chance > 1 - whole:
            wanted[str(kind)] = Full()
    if draw.random() < 0.3:
        wanted["bias"] = Full()
    targets, taken = {}, set()
    for pattern, method in wanted.items():
        matched = {path for path in paths if re.search(f"(^|/)({pattern})$", path)} - taken
        if matched:
            targets[pattern], taken = method, taken | matched
    return targets


@pytest.mark.parametrize("family_and_head", _BASES, ids=lambda pair: "-".join(map(str, pair)))
def test_what_we_write_peft_reads(torch, theirs, bases, tmp_path, family_and_head):
    base = bases(*family_and_head)
    model, params = hf.load(base, scan=False)
    paths = [path for path, _ in named_leaves(params)]
    axes = (
        {".*conv/conv/kernel": "in in out", ".*": "in out"} if "deberta" in family_and_head[0] else "in out"
    )
    written = 0
    for seed in range(8):
        targets = drawn(paths, np.random.default_rng([seed, *family_and_head[0].encode()]))
        if not targets:
            continue
        frozen, delta = lora_jax.lorafy(params, targets, axes=axes)
        delta = trained(delta)
        adapter = tmp_path / f"{seed}"
        try:
            peft.save(adapter, model, frozen, delta)
        except ValueError as error:
            assert re.search(_REFUSALS, str(error)), (targets, error)
            assert not adapter.exists()
            continue
        written += 1
        expected = output(model, frozen, delta)
        found = theirs.PeftModel.from_pretrained(in_torch(base), adapter).eval()
        assert_close(output_of_theirs(torch, found), expected, 2e-5)
        assert_close(output(model, *peft.load(adapter, model, params)), expected, 2e-5)
    assert written >= 3


@pytest.mark.parametrize(
    ("family", "head", "targets", "saved"),
    [
        # A list of layers, which PEFT cannot copy.
        ("gpt2 untied", None, {"lm_head/kernel": LoRA(rank=2), "h/.*": Full()}, {"h.0", "h.1"}),
        # The head's bias has a second name in PyTorch, which is the one that counts.
        ("roberta untied", "masked_lm", {"query/kernel": LoRA(rank=2), "lm_head/.*": Full()}, {"decoder"}),
        (
            "roberta untied",
            "masked_lm",
            {"query/kernel": LoRA(rank=2), "lm_head/decoder/kernel": Full()},
            {"lm_head.decoder"},
        ),
        ("roberta untied", "masked_lm", {"(query|decoder)/kernel": LoRA(rank=2), "bias": Full()}, set()),
        ("deberta untied", "masked_lm", {"query_proj/kernel": LoRA(rank=2), "bias": Full()}, set()),
        # A pooler that PEFT's user may have fresh is of the head.
        ("bert", "sequence_classification", {"query/kernel": LoRA(rank=2)}, {"classifier", "bert.pooler"}),
        (
            "bert",
            "sequence_classification",
            {"(query|pooler/dense|classifier)/kernel": LoRA(rank=2)},
            {"classifier", "bert.pooler"},
        ),
        # A head only.
        ("roberta", "sequence_classification", {"classifier/.*kernel": LoRA(rank=2)}, {"classifier"}),
        ("deberta", "token_classification", {"classifier/kernel": DoRA(rank=2)}, {"classifier"}),
        # PyTorch reads the weight itself, and would pass an adapter by.
        (
            "deberta",
            "token_classification",
            {"(rel_embeddings/embedding|query_proj/kernel)": LoRA(rank=2)},
            {"rel_embeddings"},
        ),
        (
            "deberta of version 3",
            "masked_lm",
            {"word_embeddings/embedding": LoRA(rank=2)},
            {"word_embeddings"},
        ),
    ],
)
def test_modules_that_peft_saves_whole(torch, theirs, bases, tmp_path, family, head, targets, saved):
    base = bases(family, head)
    model, params = hf.load(base)
    frozen, delta = lora_jax.lorafy(params, targets, axes="in out")
    delta = trained(delta)
    peft.save(tmp_path / "ours", model, frozen, delta)
    expected = output(model, frozen, delta)
    found = theirs.PeftModel.from_pretrained(in_torch(base), tmp_path / "ours").eval()
    assert saved <= {
        name
        for whole in found.peft_config["default"].modules_to_save or ()
        for name in (whole, *(whole.split(".", depth)[-1] for depth in range(1, whole.count(".") + 1)))
    }
    assert_close(output_of_theirs(torch, found), expected)
    again = peft.load(tmp_path / "ours", model, params)
    assert_close(output(model, *again), expected)
