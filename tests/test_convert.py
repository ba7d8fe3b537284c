"""`convert` through the command line: every way between PEFT, loralib and Hugging Face gives the same
logits, and every refusal is one line.
"""

import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoders import ours, QUICKLY, random_params, ROBERTA, some_ids
from safetensors.numpy import load_file

import lora_jax
from experiments.command_line import main
from lora_jax.interop import hf, loralib, peft
from lora_jax.models import GPT2, GPT2Config


GPT2_CONFIG = GPT2Config(
    vocab_size=61, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
)
LORA = lora_jax.LoRA(rank=2, alpha=32)
HEAD = {"head": "sequence_classification", "num_labels": 3}
BLOCKS = lora_jax.LoRA(rank=2, alpha=32, blocks=(True, False, True))
# The base's own model; how it is loaded for the adapter; what is adapted; inputs.
CASES = {
    "gpt2": (
        GPT2(GPT2_CONFIG),
        {},
        {"attn/c_attn/kernel": BLOCKS, "c_fc/kernel": LORA},
        np.arange(12).reshape(2, 6),
    ),
    "roberta": (
        ours(ROBERTA, "masked_lm"),
        HEAD,
        {"(query|value)/kernel": LORA, "classifier/.*": lora_jax.Full()},
        some_ids(ROBERTA, 7)[0],
    ),
}
WAYS = [(source, to) for source in ("peft", "loralib") for to in ("hf", "peft", "loralib")]


@functools.cache
def compiled(model):
    return jax.jit(model.apply, compiler_options=QUICKLY)


def apply(model, params, ids):
    return compiled(model)({"params": params}, ids)


def trained(tree):
    """Another value for every number that trains, as far from zero as a trained one."""
    draw = np.random.default_rng(5)
    return jax.tree.map(lambda leaf: jnp.asarray(draw.normal(0, 0.3, leaf.shape), leaf.dtype), tree)


class Made:
    """A base with adapters in both formats beside it, and the logits of the two together."""

    def __init__(self, root, name, targets=None, **options):
        model, loading, own, self.ids = CASES[name]
        self.root, self.base, self.loading = root, root / "base", {**loading, **options}
        hf.save(self.base, model, random_params(model))
        (self.base / "tokenizer.json").write_text("{}")
        model, params = hf.load(self.base, **self.loading)
        frozen, delta = lora_jax.lorafy(params, targets or own, key=jax.random.key(1))
        delta = trained(delta)
        self.trained = lora_jax.count(delta)
        self.logits = apply(model, lora_jax.merge(frozen, delta), self.ids)
        peft.save(root / "peft", model, frozen, delta, base="base")
        self.alpha = loralib.save(root / "loralib.pt", model, frozen, delta)
        self.sources = {"peft": root / "peft", "loralib": root / "loralib.pt"}

    def arguments(self, source, target, to):
        found = ["convert", self.sources[source], target, "--to", to]
        return found + (["--base", self.base, "--alpha", self.alpha] if source == "loralib" else [])

    def logits_of(self, target, kind):
        if kind == "hf":
            model, params = hf.load(target)
            return apply(model, params, self.ids)
        model, params = hf.load(self.base, **self.loading)
        split = (
            peft.load(target, model, params)
            if kind == "peft"
            else loralib.load(target, model, params, alpha=self.alpha)
        )
        return apply(model, lora_jax.merge(*split), self.ids)


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory):
    return Made(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("gpt2"), "gpt2")


def run(capsys, *arguments):
    """What a command that succeeds prints."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys, *arguments):
    """The one line on standard error of a command that fails."""
    capsys.readouterr()
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stopped:  # argparse leaves so
        status = stopped.code
    assert status not in (0, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("source, to", WAYS, ids=["-".join(way) for way in WAYS])
def test_every_way_gives_the_same_logits(made, source, to, tmp_path, capsys):
    target = tmp_path / ("out.bin" if to == "loralib" else "out")
    printed = run(capsys, *made.arguments(source, target, to))
    np.testing.assert_allclose(made.logits_of(target, to), made.logits, atol=1e-5)
    assert (
        f"{made.trained:,} parameters" in printed
        and f"base {made.base}, a " in printed
        and f"wrote {target}" in printed
    )
    assert ("its lora_alpha is 32, which the file does not hold" in printed) == (to == "loralib")
    assert ("4 adapters, 4 tensors trained whole, " in printed) == (made.loading == HEAD), printed
    if to == "hf":
        assert (target / "tokenizer.json").is_file(), "the tokenizer of the base comes along"
    if to == "peft":
        assert json.loads((target / "adapter_config.json").read_text())["base_model_name_or_path"] == (
            "base" if source == "peft" else str(made.base)
        )


def test_to_loralib_and_back_is_exact(made, tmp_path, capsys):
    run(capsys, *made.arguments("peft", tmp_path / "a.pt", "loralib"))
    run(
        capsys,
        "convert",
        tmp_path / "a.pt",
        tmp_path / "back",
        "--to",
        "peft",
        "--base",
        made.base,
        "--alpha",
        32,
    )
    first, second = (
        load_file(directory / "adapter_model.safetensors")
        for directory in (made.sources["peft"], tmp_path / "back")
    )
    assert first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)
    first, second = (
        json.loads((directory / "adapter_config.json").read_text())
        for directory in (made.sources["peft"], tmp_path / "back")
    )
    assert {**first, "base_model_name_or_path": str(made.base)} == second


def test_a_model_is_read_and_written_again(gpt2, tmp_path, capsys):
    printed = run(capsys, "convert", gpt2.base, tmp_path / "again", "--to", "hf")
    assert "read " in printed and "a GPT2 of " in printed
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        gpt2.base / "model.safetensors"
    ).read_bytes()
    assert (tmp_path / "again" / "tokenizer.json").is_file()


@pytest.mark.parametrize("source", ["peft", "loralib"])
def test_an_adapter_of_the_head_alone_takes_it_from_the_embedding(tmp_path, source, capsys):
    """The base ties the two; the adapter was trained where they are apart."""
    made = Made(tmp_path, "gpt2", {"lm_head/kernel": LORA}, tie="untie")
    printed = run(capsys, *made.arguments(source, tmp_path / "out", "hf"))
    assert "apart from now on" in printed
    np.testing.assert_allclose(made.logits_of(tmp_path / "out", "hf"), made.logits, atol=1e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    run(capsys, *made.arguments(source, tmp_path / "adapter", "peft"))
    np.testing.assert_allclose(made.logits_of(tmp_path / "adapter", "peft"), made.logits, atol=1e-5)


def test_blocks_that_the_file_does_not_say(tmp_path, capsys):
    made = Made(
        tmp_path, "gpt2", {"attn/c_attn/kernel": lora_jax.LoRA(rank=2, alpha=32, blocks=(True, True, False))}
    )
    run(capsys, *made.arguments("loralib", tmp_path / "out", "hf"), "--blocks", "1,1,0")
    np.testing.assert_allclose(made.logits_of(tmp_path / "out", "hf"), made.logits, atol=1e-5)


def test_dora_goes_to_peft_and_into_the_model_and_not_to_loralib(gpt2, tmp_path, capsys):
    model, params = hf.load(gpt2.base)
    frozen, delta = lora_jax.lorafy(params, "c_fc/kernel", method=lora_jax.DoRA(rank=2, alpha=4))
    delta = trained(delta)
    peft.save(tmp_path / "dora", model, frozen, delta)
    run(capsys, "convert", tmp_path / "dora", tmp_path / "merged", "--to", "hf", "--base", gpt2.base)
    expected = apply(model, lora_jax.merge(frozen, delta), gpt2.ids)
    np.testing.assert_allclose(gpt2.logits_of(tmp_path / "merged", "hf"), expected, atol=1e-4)
    assert "DoRA" in refused(
        capsys, "convert", tmp_path / "dora", tmp_path / "a.pt", "--to", "loralib", "--base", gpt2.base
    )
    assert "names none" in refused(capsys, "convert", tmp_path / "dora", tmp_path / "new", "--to", "hf")


def test_what_is_refused(gpt2, tmp_path, capsys):
    """One line each, and nothing is written."""
    peft_dir, file, base, new = gpt2.sources["peft"], gpt2.sources["loralib"], gpt2.base, tmp_path / "new"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.md").write_text("")
    moved = tmp_path / "elsewhere" / "adapter"
    shutil.copytree(peft_dir, moved)
    cases = {
        "nothing is there": [tmp_path / "absent", new, "--to", "hf"],
        "it holds ['base', 'loralib.pt', 'peft']": [gpt2.root, new, "--to", "hf"],
        "is a finished run: pass its adapter,": [tmp_path / "run", new, "--to", "hf"],
        "merged weights hold no adapter any more": [base, new, "--to", "peft"],
        "`--alpha` says what PEFT's format does not leave open": [peft_dir, new, "--to", "hf", "--alpha", 8],
        "`--base` says what Hugging Face's format does not leave open": [
            base,
            new,
            "--to",
            "hf",
            "--base",
            base,
        ],
        "pass `--alpha`, the `lora_alpha`": [file, new, "--to", "hf", "--base", base],
        "a file of loralib's does not name it": [file, new, "--to", "hf", "--alpha", 32],
        "names 'base', which is no such directory, here or beside it": [moved, new, "--to", "hf"],
        "where there is no config.json": [peft_dir, new, "--to", "hf", "--base", tmp_path],
        "must be a file .pt or .bin": [peft_dir, new, "--to", "loralib"],
        "is what is read": [peft_dir, peft_dir, "--to", "peft", "--overwrite"],
        "or replace it with `--overwrite`": [peft_dir, base, "--to", "hf"],
        "argument --alpha": [file, new, "--to", "hf", "--base", base, "--alpha", "much"],
        "argument --blocks": [file, new, "--to", "hf", "--base", base, "--alpha", 1, "--blocks", "1,2"],
        "invalid choice: 'onnx'": [peft_dir, new, "--to", "onnx"],
    }
    for message, arguments in cases.items():
        assert message in refused(capsys, "convert", *arguments)
        assert not new.exists()


def test_another_base_and_a_damaged_file_have_their_way_past(gpt2, tmp_path, capsys):
    model, params = hf.load(gpt2.base)
    hf.save(tmp_path / "other", model, jax.tree.map(lambda leaf: leaf + 1, params))
    arguments = [
        "convert",
        gpt2.sources["peft"],
        tmp_path / "out",
        "--to",
        "hf",
        "--base",
        tmp_path / "other",
    ]
    assert "pass `--any-base`" in refused(capsys, *arguments)
    run(capsys, *arguments, "--any-base")
    assert "--overwrite" in refused(capsys, *arguments, "--any-base")
    run(capsys, *arguments, "--any-base", "--overwrite")

    shutil.copytree(gpt2.sources["peft"], tmp_path / "damaged")
    stored = tmp_path / "damaged" / "adapter_model.safetensors"
    content = bytearray(stored.read_bytes())
    content[-1] ^= 1
    stored.write_bytes(content)
    arguments = ["convert", tmp_path / "damaged", tmp_path / "new", "--to", "hf", "--base", gpt2.base]
    assert "pass `--no-verify`" in refused(capsys, *arguments)
    assert not (tmp_path / "new").exists()
    run(capsys, *arguments, "--no-verify")


def test_the_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert re.search(r"example: python -m experiments convert \S+ \S+ --to", capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_loads_what_is_converted(made, torch, tmp_path, capsys):
    """From loralib's file, by PEFT itself, on the same base in PyTorch."""
    library = pytest.importorskip("peft")
    import transformers

    run(capsys, *made.arguments("loralib", tmp_path / "out", "peft"))
    kind = (
        transformers.AutoModelForSequenceClassification if made.loading else transformers.AutoModelForCausalLM
    )
    loaded = library.PeftModel.from_pretrained(
        kind.from_pretrained(made.base, **({"num_labels": 3} if made.loading else {})), tmp_path / "out"
    ).eval()
    with torch.no_grad():
        logits = loaded(torch.tensor(made.ids)).logits.numpy()
    np.testing.assert_allclose(logits, made.logits, atol=1e-5)
