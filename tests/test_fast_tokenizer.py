"""What `tokenizers` alone reads of a directory is what `transformers` makes of it, and a directory that it
makes something else of is left to it.
"""

import json
import random
import shutil
import sys

import pytest
import small_base
from gguf_files import CHARACTERS, write
from runs import BASE
from training import optax_promotes as optax_promotes

from experiments import requirements
from experiments.command_line import main
from experiments.running import base as bases
from experiments.running.base import load_tokenizer
from experiments.tasks import fast_tokenizer, tokenizer as training


NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "all_special_tokens")
NAMES += ("bos_token_id", "eos_token_id", "pad_token_id")
WORDS = (
    "The name 's eat type Pub 1234 naïve £20 日本 🎉 \n\n \t  <|endoftext|> <tag> é don't ,. [UNK] x".split(
        " "
    )
)


def texts():
    draw = random.Random(0)
    found = ["", " ", "a", " a", "<|endoftext|>", "a <|endoftext|> b", " 1 22 333"]
    for _ in range(40):
        found.append(draw.choice(("", " ", "  ")).join(draw.choices(WORDS, k=draw.randint(1, 12))))
    return found


def alike(ours, theirs):
    given = {"add_special_tokens": False, "return_attention_mask": False}
    found = theirs(texts(), **given)["input_ids"]
    assert ours(texts(), **given)["input_ids"] == found
    assert [ours(text, add_special_tokens=False)["input_ids"] for text in texts()] == found
    assert len(ours) == len(theirs)
    for ids in [*found, *([token] for token in range(len(ours)))]:
        assert (
            ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False) == theirs.decode(ids)
        )
    assert {name: getattr(ours, name) for name in NAMES} == {name: getattr(theirs, name) for name in NAMES}


@pytest.fixture(scope="module")
def of_transformers():
    transformers = pytest.importorskip("transformers")

    def read(directory):
        return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)

    return read


def trained(tmp_path):
    documents = [f"{word} {number} of the text<|endoftext|>" for number, word in enumerate(WORDS)]
    training.train(documents, 270, tmp_path / "trained")
    return tmp_path / "trained"


@pytest.mark.parametrize("made", ["ours", "trained"])
def test_what_a_run_writes_is_read_without_transformers(tmp_path, of_transformers, made):
    directory = small_base.TOKENIZER if made == "ours" else trained(tmp_path)
    ours = fast_tokenizer.read(directory)
    assert ours is not None
    alike(ours, of_transformers(directory))


ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# Changes of tokenizer_config.json, of tokenizer.json and of its model, and further files.
CHANGES = {
    "as it is": {},
    "a token for padding": {"config": {"pad_token": "<|endoftext|>"}},
    "fast": {"config": {"tokenizer_class": "GPT2TokenizerFast"}},
    "the file alone": {"config": {"tokenizer_class": "TokenizersBackend"}},
    "the file alone, under an old name": {"config": {"tokenizer_class": "PreTrainedTokenizerFast"}},
    "begins a text": {"config": {"add_bos_token": True}},
    "ends a text": {"config": {"tokenizer_class": "TokenizersBackend", "add_eos_token": True}},
    "beside gpt2": {"files": {"config.json": {"model_type": "gpt2"}}},
    "beside llama": {"files": {"config.json": {"model_type": "llama"}}},
    "the file alone, beside llama": {
        "config": {"tokenizer_class": "TokenizersBackend"},
        "files": {"config.json": {"model_type": "llama"}},
    },
    "the file alone, digits": {
        "config": {"tokenizer_class": "TokenizersBackend"},
        "file": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}},
    },
    "the file alone, lower case": {
        "config": {"tokenizer_class": "TokenizersBackend"},
        "file": {"normalizer": {"type": "Lowercase"}},
    },
    "the file alone, an added word": {
        "config": {"tokenizer_class": "TokenizersBackend"},
        "added": [{**ADDED, "special": False, "content": "<tag>", "id": 4096}],
    },
    "a prefix": {
        "config": {"add_prefix_space": True},
        "file": {"pre_tokenizer": {**BYTES, "add_prefix_space": True}},
    },
}
# Here `transformers` may make another tokenizer than the file has, or it knows of special tokens that the
# file does not name.
REFUSED = {
    "a prefix in the file": {"file": {"pre_tokenizer": {**BYTES, "add_prefix_space": True}}},
    "a prefix, not in the file": {"config": {"add_prefix_space": True}},
    "digits": {"file": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}}},
    "lower case": {"file": {"normalizer": {"type": "Lowercase"}}},
    "no pattern": {"file": {"pre_tokenizer": {**BYTES, "use_regex": False}}},
    "whole words first": {"model": {"ignore_merges": True}},
    "merges at random": {"model": {"dropout": 0.5}},
    "an added word": {"added": [{**ADDED, "special": False, "content": "<tag>", "id": 4096}]},
    "a word that takes blanks": {
        "config": {"tokenizer_class": "TokenizersBackend"},
        "added": [{**ADDED, "lstrip": True, "content": "<tag>", "id": 4096}],
    },
    "an end that is not in the file": {"config": {"eos_token": "<end>"}},
    "no end": {"config": {"eos_token": None}},
    "an end with properties": {"config": {"eos_token": {"content": "<|endoftext|>", "__type": "AddedToken"}}},
    "more special tokens": {"config": {"extra_special_tokens": ["<tag>"]}},
    "another class": {"config": {"tokenizer_class": "Qwen2Tokenizer"}},
    "no class": {"config": {"tokenizer_class": None}},
    "beside qwen2": {
        "config": {"tokenizer_class": "TokenizersBackend"},
        "files": {"config.json": {"model_type": "qwen2"}},
    },
    "cut": {
        "file": {
            "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
        }
    },
    "cleaned": {"config": {"clean_up_tokenization_spaces": True}},
    "special tokens as text": {"config": {"split_special_tokens": True}},
    "an earlier version": {"files": {"special_tokens_map.json": {"eos_token": "<tag>"}}},
}


def changed(directory, *, config={}, file={}, model={}, added=[], files={}):
    shutil.copytree(small_base.TOKENIZER, directory)
    for name, change in (("tokenizer_config.json", config), ("tokenizer.json", file)):
        tree = json.loads((directory / name).read_text("utf-8")) | change
        if name == "tokenizer.json":
            tree["model"] |= model
            tree["added_tokens"] += added
        (directory / name).write_text(json.dumps(tree), "utf-8")
    for name, tree in files.items():
        (directory / name).write_text(json.dumps(tree), "utf-8")
    return directory


@pytest.mark.parametrize("case", CHANGES)
def test_what_is_read_is_what_transformers_makes_of_it(tmp_path, of_transformers, case):
    directory = changed(tmp_path / "changed", **CHANGES[case])
    ours = fast_tokenizer.read(directory)
    assert ours is not None
    alike(ours, of_transformers(directory))


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_left_to_transformers(tmp_path, case):
    assert fast_tokenizer.read(changed(tmp_path / "changed", **REFUSED[case])) is None


@pytest.mark.parametrize(
    "case", ["digits", "lower case", "no pattern", "a prefix in the file", "beside qwen2"]
)
def test_another_tokenizer_is_left_to_transformers_for_a_reason(tmp_path, of_transformers, case):
    """It does not make of these what the file says."""
    directory = changed(tmp_path / "changed", **REFUSED[case])
    as_it_is = fast_tokenizer.read(small_base.TOKENIZER)
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    with pytest.raises(AssertionError):
        alike(fast_tokenizer.FastTokenizer(backend, as_it_is.named), of_transformers(directory))


def test_a_directory_without_the_files(tmp_path):
    assert fast_tokenizer.read(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{")
    (tmp_path / "tokenizer.json").write_text("[]")
    assert fast_tokenizer.read(tmp_path) is None


def test_what_it_does_not_do_is_refused():
    ours = fast_tokenizer.read(small_base.TOKENIZER)
    with pytest.raises(ValueError, match="`add_special_tokens`"):
        ours("a", add_special_tokens=True)
    with pytest.raises(ValueError, match="`clean_up_tokenization_spaces`"):
        ours.decode([1], clean_up_tokenization_spaces=True)


def test_a_run_needs_no_transformers(tmp_path, monkeypatch):
    """Nor PyTorch, which compares the exported model where it is installed."""
    for module in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, module, None)  # an import of it fails
    found = [module for module in requirements.OF_EVERY_RUN if module != "transformers"]
    monkeypatch.setattr(requirements, "OF_EVERY_RUN", tuple(found))
    architecture = BASE["base"]["architecture"]
    config = {**BASE, "base": {"architecture": architecture, "tokenizer": str(small_base.TOKENIZER)}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["run", str(tmp_path / "config.json"), "--workdir", str(tmp_path / "run")]) == 0
    merged = fast_tokenizer.read(tmp_path / "run" / "merged")
    assert merged is not None and merged.pad_token == "<|endoftext|>"


def test_the_loader_chooses(tmp_path):
    assert isinstance(load_tokenizer(small_base.TOKENIZER), fast_tokenizer.FastTokenizer)
    pytest.importorskip("transformers")
    other = changed(tmp_path / "changed", **REFUSED["digits"])
    assert not isinstance(load_tokenizer(other), fast_tokenizer.FastTokenizer)


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """A GGUF file with a tokenizer, and how often it was asked for that."""
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    file, asked, read = tmp_path / "model.gguf", [], bases.gguf.tokenizer
    write(file, extra=CHARACTERS)
    monkeypatch.setattr(bases.gguf, "tokenizer", lambda file: asked.append(file) or read(file))
    return file, asked


def test_the_tokenizer_of_a_gguf_file_is_made_once(packed, tmp_path):
    """A second start, and each further process, reads what is there."""
    file, asked = packed
    first, second = (bases._unpacked(file, tmp_path / "tokenizer") for _ in range(2))
    assert asked == [file]
    theirs = bases.gguf.tokenizer(file)
    for ours in (first, second):
        assert isinstance(ours, fast_tokenizer.FastTokenizer)
        for text in ("a to b<|im_end|>", "b", " t a", ""):
            ids = theirs(text, add_special_tokens=False)["input_ids"]
            assert ours(text, add_special_tokens=False)["input_ids"] == ids
            assert ours.decode(ids) == theirs.decode(ids)
        assert {name: getattr(ours, name) for name in NAMES} == {
            name: getattr(theirs, name) for name in NAMES
        }


@pytest.mark.parametrize("what", ["another file", "a crash"])
def test_the_tokenizer_of_a_gguf_file_is_made_again(packed, tmp_path, what):
    file, asked = packed
    bases._unpacked(file, tmp_path / "tokenizer")
    if what == "another file":
        write(file, extra={**CHARACTERS, "general.name": "another"})
    else:
        (tmp_path / "tokenizer" / bases.UNPACKED).unlink()
    bases._unpacked(file, tmp_path / "tokenizer")
    assert len(asked) == 2
    assert (tmp_path / "tokenizer" / bases.UNPACKED).is_file()
